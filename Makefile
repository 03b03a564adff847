# Two commands do everything on a fresh machine with python3, g++ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# torch comes first and bounded, so that nothing else can pull a newer build.
TORCH := "torch>=2.8,<2.14"

.PHONY: install demo test test-gpu test-kernels test-oldest check format docs clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools --constraint constraints.txt
	$(BIN)/python -m pip install --quiet $(TORCH) --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,data,export,harness,wandb,tensorboard]" --constraint constraints.txt
	touch $@

demo: install
	$(BIN)/python launch/demo.py --output demo

# Two processes for two cores: most tests use one.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

# On a machine with a GPU: PYTHON is one whose torch fits its driver, with .[gpu,test] installed under constraints-gpu.txt.
test-gpu:
	ECP_TEST_GPU=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/gpu --numprocesses 8

# Kernels for a GPU as machine code, without one; triton (0.9 GB) stays out of the environment.
test-kernels: install
	test -d build/triton || $(BIN)/python -m pip install --quiet --no-deps --target build/triton triton==3.8.0
	PYTHONPATH=build/triton $(BIN)/python -m pytest tests/kernels -m exhaustive

# The core on the oldest torch that pyproject.toml allows, in an environment of its own; PIP_EXTRA_INDEX_URL of PyTorch's
# CPU builds keeps gigabytes of CUDA out of it, as in .github/workflows/ci.yml.
OLDEST := build/oldest/bin/python
test-oldest:
	test -x $(OLDEST) || $(PYTHON) -m venv build/oldest
	$(OLDEST) -m pip install --quiet --upgrade pip setuptools --constraint constraints-gpu.txt
	$(OLDEST) -m pip install --quiet "torch>=2.8,<2.9" --constraint constraints-gpu.txt
	$(OLDEST) -m pip install --quiet --no-build-isolation --editable ".[test,data,export]" --constraint constraints-gpu.txt
	OMP_NUM_THREADS=1 $(OLDEST) -m pytest tests/attention tests/models tests/parallel tests/zero --numprocesses 2

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install
	$(BIN)/python -m pip install --quiet --editable ".[docs]" --constraint constraints.txt
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) demo build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
