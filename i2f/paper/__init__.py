"""The companion: data, networks, sweeps, claims, the pipeline, one module per experiment and per figure."""
