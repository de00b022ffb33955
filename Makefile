# make demo, make test: each sets up its own environment first. Nothing else needs to be typed before.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests that run side by side; each uses one thread.
WORKERS ?= 2

.PHONY: setup demo demo-short test check format vision-test bench-fashion clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/luce compare recipes/demo.yaml --out runs/demo

# The same in a quarter of a minute, for continuous integration.
demo-short: setup
	$(BIN)/luce compare recipes/demo.yaml --out runs/demo-short --seeds '[0, 1]' --training.epochs 5 --teacher_training.epochs 5

test: setup
	$(BIN)/python -m pytest -n $(WORKERS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# timm and torchvision stay out of the environment: beside a CPU build of torch they break other packages.
vision-test: setup
	$(BIN)/python -m pip install --quiet --no-deps --target .venv-vision -c constraints.txt torchvision timm
	PYTHONPATH=.venv-vision $(BIN)/python -m pytest -p tests.vision_cure tests/models

# Fashion-MNIST in both settings, four methods and five seeds: about half an hour on two cores.
bench-fashion: setup
	$(BIN)/luce compare recipes/fashion-mnist.yaml --out runs/fashion-mnist

clean:
	rm -rf $(VENV) .venv-vision runs
