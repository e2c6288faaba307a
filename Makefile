# make demo | test | ep-matrix | fuzz | lint | types | bench | examples | aot | clean
# Everything runs in .venv, made once from constraints.txt; only Python (3.11+) and a C++ compiler are assumed.

PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed

# Arguments for pytest: two workers of one thread each suit two cores, and each begins with half of the tests, so that few
# fixtures of modules are made twice; e.g. PYTEST_ARGS="-m 'not slow'".
PYTEST_ARGS ?= -n 2 --dist worksteal
# Small tensors: more threads than this cost more than they give.
OMP_NUM_THREADS ?= 2
export OMP_NUM_THREADS
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

CODE := moepass lowering kernels tests examples benchmarks

.PHONY: demo test ep-matrix fuzz lint types bench examples aot install clean format

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# Without the processes that Inductor keeps at hand for Triton kernels: on a CPU it makes none.
test: $(STAMP)
	OMP_NUM_THREADS=1 TORCH_WARM_POOL=0 $(BIN)/python -P -m pytest $(PYTEST_ARGS)

# Expert parallelism compiled, over 1, 2 and 4 processes: every form, capacity and routing, of which the suite takes
# some; about ten minutes on two cores.
ep-matrix: $(STAMP)
	for ranks in 1 2 4; do MOEPASS_EP_MATRIX=$$ranks OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest \
	    tests/distributed/test_ep_training.py -k compiled || exit 1; done

# New random inputs in every run, FUZZ_TIMES as many as in CI; the log ends with what was tried.
fuzz: $(STAMP)
	HYPOTHESIS_PROFILE=explore OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest $(FUZZ_ARGS) tests/fuzz

lint: $(STAMP)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/codespell $(CODE) docs README.md CHANGELOG.md Makefile pyproject.toml

# setuptools maps lowering/ and kernels/ to moepass.lowering and moepass.kernels; mypy reads folders, so it is shown a
# tree of links with the names that importers use.  `strict` is in pyproject.toml.
types: $(STAMP)
	rm -rf build/types
	mkdir -p build/types/moepass
	ln -s $(CURDIR)/moepass/* $(CURDIR)/lowering $(CURDIR)/kernels build/types/moepass/
	MYPYPATH=build/types $(BIN)/mypy --package moepass

bench: $(STAMP)
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.compile_time
	$(BIN)/python -m benchmarks.regret
	$(BIN)/python -m benchmarks.moe_models
	$(BIN)/python -m benchmarks.generate

# Compiles every kernel configuration that the schedule selects for four GPUs and holds it to kernels/aot/budgets.json.
# No GPU is needed; after a change of tiles: $(BIN)/python -m moepass.kernels.aot --write
aot: $(STAMP)
	$(BIN)/python -m moepass.kernels.aot --jobs 2

examples: $(STAMP)
	$(BIN)/python examples/demo.py
	$(BIN)/python examples/convert_and_save.py
	$(BIN)/python examples/train_tiny.py
	$(BIN)/python examples/upcycle_qwen3.py
	$(BIN)/python examples/upcycle_llama.py
	$(BIN)/python examples/train_upcycled.py
	$(BIN)/torchrun --nproc-per-node 2 examples/train_ep.py

format: $(STAMP)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

install: $(STAMP)

# One resolution with every version pinned; without build isolation, so that setuptools is pinned too.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -c "import torch; print('moepass runs on torch', torch.__version__)"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
