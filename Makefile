# Two commands on a fresh machine: `make repro` and `make test`. See `make help`.
# Every target that needs the environment makes it first; once it stands, it costs nothing.

VENV   := .venv
BIN    := $(CURDIR)/$(VENV)/bin
READY  := $(VENV)/.ready
# The first interpreter on the PATH that starts and is 3.11, 3.12 or 3.13; override with PYTHON=...
CHECK  := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
            $$p -c '$(CHECK)' >/dev/null 2>&1 && { echo $$p; break; }; done)

export PATH := $(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export JUPYTER_PLATFORM_DIRS := 1
ifdef DEVICE
export I2F_DEVICE := $(DEVICE)
endif
ifdef SCHEDULER
export I2F_SCHEDULER := $(SCHEDULER)
endif
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH

.DEFAULT_GOAL := help
.PHONY: help env repro solve publish test lab lint format docs bench lock clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

env: $(READY) ## make the environment (.venv), from requirements.lock

# Compiled when it is installed: where Python may not write bytecode, each process would compile PyTorch anew.
$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "i2f needs Python 3.11, 3.12 or 3.13 (with venv); none was found. Try: make env PYTHON=/path/to/python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    "uv==$$(sed -n 's/^uv==\([^ ]*\).*/\1/p' requirements.lock)"
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# Two runs at a time: reading rows and drawing is one core's work. The last call of DVC finds them done.
repro: $(READY) ## run every notebook on the published rows (DVC), then solve a sample of the rows anew. SEED=: another sample; BUDGET=: its minutes of two cores (8); SHARE=1: all rows; DEVICE=auto | cuda | mps
	@dvc pull --quiet data.dvc
	dvc repro --quiet source && python -m i2f.paper keys | xargs -P 2 -I KEY dvc --wait-for-lock repro --single-item run@KEY && dvc repro --quiet
	python -m i2f.paper verify $(if $(SEED),--seed $(SEED)) $(if $(BUDGET),--budget $(BUDGET)) $(if $(SHARE),--share $(SHARE))

solve: $(READY) ## solve what a run is missing, to publish it: RUN=KEY of params.yaml; resumable; SCHEDULER=tcp://HOST:PORT: on a Dask cluster
	@test -n "$(RUN)" || { echo "which run? make solve RUN=KEY, one of:" >&2; python -m i2f.paper keys >&2; exit 1; }
	python -m i2f.paper solve $(RUN)

publish: $(READY) ## make finished runs the published ones (RUN=KEY; default: all): tables, figures, claims, notebooks' outputs, README
	python -m i2f.paper publish $(RUN)
	dvc repro --quiet

# A file of tests, or a notebook, stays in one process; there is one per core. Not sorted by their number of tests: the
# recipes, few and long, would come last and leave the other cores idle.
test: $(READY) ## run the tests and validate every notebook
	@dvc pull --quiet data.dvc
	pytest -n auto --dist loadfile --no-loadscope-reorder

lab: $(READY) ## open the notebooks in JupyterLab
	@dvc pull --quiet data.dvc
	jupyter lab --notebook-dir=notebooks --LabApp.news_url=None

lint: $(READY) ## check style and types
	ruff check . && ruff format --check . && mypy

format: $(READY) ## apply style
	ruff check --fix . && ruff format .

docs: $(READY) ## build the site into runs/site: the notebooks as stored, the ledgers, the mathematics, the API; no network
	sphinx-build -W --keep-going --quiet -j auto -c docs . runs/site
	@echo "open runs/site/docs/index.html"

bench: $(READY) ## rerun the benchmarks and rewrite their tables
	for script in jacobian attacks convergence imports rows; do python benchmarks/$$script.py || exit 1; done

# rfc3987-syntax is left out: an optional check of addresses, whose grammar jsonschema would parse for two seconds
# at the start of every process that reads a notebook
lock: $(READY) ## rebuild requirements.lock from pyproject.toml
	uv pip compile --quiet pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
	    --no-emit-package rfc3987-syntax --no-emit-package lark \
	    --no-emit-index-url --custom-compile-command "make lock" --upgrade --output-file requirements.lock

clean: ## remove the environment and every cache (results and data stay in git and DVC)
	rm -rf $(VENV) .dvc/cache .dvc/tmp .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
