"""What every test and every notebook under test inherits, before PyTorch loads."""

import os

os.environ["I2F_PROGRESS"] = "off"  # bars would be part of what nbval compares
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # small problems: threads that wait for each other cost more than they bring
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a hub for a model, or waits for one that does not answer
