# Every target sets up the environment that it needs; nothing has to be run before.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests that run side by side; each uses one thread.
WORKERS ?= 2
# Tests of one xdist group share what they start, such as two processes that train.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: setup native sanitize demo demo-short test test-slow test-all check format docs docs-serve dist vision-test \
  bench-fashion bench gpu-check clean

setup: $(VENV)/.ready

# PyTorch comes first and the build is not isolated from it, because the native kernels are compiled with its headers.
$(VENV)/.ready: pyproject.toml constraints.txt hatch_build.py $(wildcard csrc/* csrc/kernels/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch hatchling editables cmake ninja
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $@

# The native kernels alone, after a change in csrc/.
native:
	$(BIN)/python hatch_build.py

# The kernels' tests under the address and undefined-behaviour sanitizers, on every instruction set.
CXX ?= g++
sanitize: setup
	$(BIN)/python hatch_build.py --sanitize
	for set in x86-64-v2 x86-64-v3 best; do \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 LUCE_INSTRUCTION_SET=$$set LUCE_NATIVE_LIBRARY=build/sanitized/luce_native.so \
	  $(BIN)/python -m pytest -n $(WORKERS) tests/ops || exit 1; \
	done

demo: setup
	$(BIN)/luce compare recipes/demo.yaml --out runs/demo

# A shorter demo for continuous integration: two seeds and few epochs, a quarter of a minute.
demo-short: setup
	$(BIN)/luce compare recipes/demo.yaml --out runs/demo-short --seeds '[0, 1]' --training.epochs 5 --teacher_training.epochs 5

# Every formula, dtype, mask, gradient, resume and fault, in under ten minutes on two cores.
test: setup
	$(PYTEST) -m "not slow"

# Ahead-of-time compilation, large arrays, process launches, every command of the documentation.
test-slow: setup
	$(PYTEST) -m slow

test-all: setup
	$(PYTEST)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, built strictly into build/site; docs-serve shows it on port 8000 and follows changes.
export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs
	$(BIN)/mkdocs serve --watch src/luce

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed --no-build-isolation -c constraints.txt -e '.[docs]'
	touch $@

# An sdist, and from it a wheel that contains the native kernels.
dist: setup
	$(BIN)/python -m build --no-isolation

# timm and torchvision stay out of the environment, because torchvision breaks other packages beside a CPU build of torch.
vision-test: setup
	$(BIN)/python -m pip install --quiet --no-deps --target .venv-vision -c constraints.txt torchvision timm
	PYTHONPATH=.venv-vision $(BIN)/python -m pytest -p tests.vision_cure tests/models

# Fashion-MNIST in both settings, four methods and five seeds: about half an hour on two cores.
bench-fashion: setup
	$(BIN)/luce compare recipes/fashion-mnist.yaml --out runs/fashion-mnist

# Speed and memory of losses and operators against their baselines, on a machine that does nothing else: about
# half an hour, or less for named cases: make bench CASES='pld kd/kl'.
bench: setup
	$(BIN)/python -m benchmarks run $(CASES)

# On a machine with a GPU, with nothing but this checkout and a Python that has PyTorch, NumPy and Triton: the GPU
# tests (where there is pytest), then the Triton kernels against their baselines and goals. Eight minutes.
GPU_PYTHON ?= python3
gpu-check:
	PYTHONPATH=src $(GPU_PYTHON) -m benchmarks run --device gpu

clean:
	rm -rf $(VENV) .venv-vision build runs
