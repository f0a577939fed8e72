# Two commands matter: `make demo` and `make test`. Both set up a fresh machine by themselves.
PYTHON ?= python3
# On a CPU-only Linux machine, point TORCH at a CPU build to avoid several GB of CUDA packages.
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0

BIN := .venv/bin
PIP := python -m pip --disable-pip-version-check
# torch, what it brings along on some machines, and the installers.
NOT_LOCKED := '^(torch|torchvision|triton|nvidia-.*|cuda-.*|pip|setuptools|wheel)=='
PYTEST := python -m pytest -q -m "not slow" -n auto --maxprocesses 4
# Two OpenMP threads on two shared cores spin against each other; one is faster there.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help venv demo test test-slow test-gpu test-newest test-oldest newest lock lint bench clean

help:
	@echo "make demo       quantize the embedded model: float, RTN and GPTQ side by side"
	@echo "make test       lint, types, import contract and the default tests"
	@echo "make test-slow  the tests that take minutes, then make test-oldest"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make test-newest, make test-oldest   the default tests on the newest and oldest versions allowed"
	@echo "make lock       take the newest versions over into constraints.txt"
	@echo "make bench      the tables of the README"

# A virtual environment in folder $(1), with further flags for pip in $(2). torch comes first and
# alone, in the build that TORCH names, and is then held, so that nothing pulls another one.
define install
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/$(PIP) install -q $(TORCH)
	$(1)/bin/$(PIP) install -q --no-deps $(TORCHVISION)
	$(1)/bin/$(PIP) list --format=freeze | grep -E '^(torch|torchvision)==' > $(1)/torch.txt
	$(1)/bin/$(PIP) install -q -c $(1)/torch.txt $(2) -e ".[dev,video]"
endef

# The versions of constraints.txt, with which all was tested.
.venv/ready: pyproject.toml constraints.txt
	$(call install,.venv,-c constraints.txt)
	touch $@

venv: .venv/ready

demo: venv
	rm -rf demo-out
	$(BIN)/prismquant demo --out demo-out

test: venv lint
	$(BIN)/$(PYTEST)

test-slow: venv
	$(BIN)/python -m pytest -q -m slow
	$(MAKE) test-oldest

# Fails where there is no device: a check that ran nothing has shown nothing.
test-gpu: venv
	$(BIN)/python -m pytest -q -m gpu

# What was released since counts as well: brought up to date each time.
newest:
	$(call install,.venv-newest,--upgrade --upgrade-strategy eager)

test-newest: newest
	.venv-newest/bin/$(PYTEST)

.venv-oldest/ready: pyproject.toml tools/oldest.py
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python tools/oldest.py > .venv-oldest/oldest.txt
	$(call install,.venv-oldest,-c .venv-oldest/oldest.txt)
	touch $@

test-oldest: .venv-oldest/ready
	.venv-oldest/bin/$(PYTEST)

# Test them before and after: make test-newest lock test.
lock: newest
	(echo "# The versions that were tested; made by make lock. torch comes first: see the Makefile."; \
	 .venv-newest/bin/$(PIP) list --format=freeze --exclude-editable | grep -vE $(NOT_LOCKED)) > constraints.txt

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: venv
	$(BIN)/python -m bench.methods --seeds 3
	$(BIN)/python -m bench.formats
	$(BIN)/python -m bench.automatic
	$(BIN)/python -m bench.search --models plain
	$(BIN)/python -m bench.rotations
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.engine --models qwen2-vl-2b --blocks 2
	$(BIN)/python -m bench.solver --sizes 1536 3584
	$(BIN)/python -m bench.stream --shape qwen2-vl-2b
	$(BIN)/python -m bench.packed
	$(BIN)/python -m bench.ranges
	$(BIN)/python -m bench.scaling

clean:
	rm -rf .venv .venv-newest .venv-oldest demo-out bench-out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
