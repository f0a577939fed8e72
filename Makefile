# Two commands matter: `make demo` and `make test`. Both set up a fresh machine by themselves.
PYTHON ?= python3
# On a CPU-only Linux machine, point TORCH at a CPU build to avoid several GB of CUDA packages.
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0

BIN := .venv/bin
# Two OpenMP threads on two shared cores spin against each other; one is faster there.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help venv demo test test-slow lint bench clean

help:
	@echo "make demo       quantize the embedded model: float, RTN and GPTQ side by side"
	@echo "make test       lint, types, import contract and the default tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make bench      the tables of the README"

# torch first, so that nothing that follows pulls another build of it.
.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(TORCHVISION)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev,video]"
	touch $@

venv: .venv/ready

demo: venv
	rm -rf demo-out
	$(BIN)/prismquant demo --out demo-out

test: venv lint
	$(BIN)/python -m pytest -q -m "not slow" -n auto --maxprocesses 4

test-slow: venv
	$(BIN)/python -m pytest -q -m slow

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: venv
	$(BIN)/python -m bench.methods --seeds 3
	$(BIN)/python -m bench.formats
	$(BIN)/python -m bench.rotations
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.engine --models qwen2-vl-2b --blocks 2
	$(BIN)/python -m bench.solver --sizes 1536 3584
	$(BIN)/python -m bench.stream --shape qwen2-vl-2b
	$(BIN)/python -m bench.ranges
	$(BIN)/python -m bench.scaling

clean:
	rm -rf .venv demo-out bench-out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
