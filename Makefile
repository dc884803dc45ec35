# Every target does its own set-up, once. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients

export CXX
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo sharded claims claims-verdicts test clients docs bench gpu lint wheel wheels clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16
	@echo "PYTHON=python3.12 names the interpreter of a new $(VENV), CXX=clang++ the compiler."

demo: $(VENV)/installed ## fine-tune a small network with every optimizer (examples/out/)
	$(BIN)/python examples/finetune_digits.py

sharded: $(VENV)/installed ## train a small GPT by FSDP2 over two processes, and resume it
	$(BIN)/python examples/fsdp2_stdlib.py

claims: $(VENV)/installed ## try what papers claim of decay (docs/claims/); ANEW=1 runs all of it again
	$(BIN)/python -m claims $(if $(ANEW),--anew) $(NAMES)

claims-verdicts: $(VENV)/installed ## recompute every verdict from docs/claims/*.json, in seconds
	$(BIN)/python -m claims --verdicts $(NAMES)

test: $(VENV)/installed ## run the tests
	$(BIN)/python -m pytest

clients: $(VENV)/installed $(CLIENTS)/ready ## train by others' tools: Trainer, PEFT, Accelerate, Lightning, torchtitan
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) \
	    $(CLIENTS)/bin/python -m pytest tests/clients tests/test_docs.py

docs: $(VENV)/installed ## build the documentation as a site (site/)
	$(BIN)/mkdocs build

bench: $(VENV)/installed ## compare speed with torch.optim and others (bench/results/)
	$(BIN)/python -m bench

gpu: ## on an NVIDIA GPU: build, test, sanitize, bench; installs nothing, takes what PYTHON has
	@PYTHON=$(PYTHON) tools/gpu

lint: $(VENV)/ready ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/* tests/cuda/*)

wheel: $(VENV)/ready ## build a source archive, and from it a wheel (dist/)
	$(BIN)/python -m build --outdir dist

wheels: $(VENV)/ready ## wheels to hand out: without CUDA, and for each toolkit in CUDA_HOMES
	.ci/wheels $(BIN)/python

clean: ## remove whatever the other targets made, environments included
	rm -rf $(VENV) $(CLIENTS) build dist site claims/out examples/out *.egg-info wdkernels/_C.*.so
	rm -rf .benchmarks .hypothesis .*_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# ---- set-up: each stamp in .venv is newer than what it was made from -----------------------------

$(VENV)/installed: $(VENV)/ready setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/ready: requirements-dev.txt | $(BIN)/python
	@echo "Installing torch and the tools of requirements-dev.txt into $(VENV): minutes, once."
	$(BIN)/python -m pip install --requirement requirements-dev.txt
	@touch $@

$(CLIENTS)/ready: requirements-clients.txt | $(BIN)/python
	@echo "Installing torch and the tools of requirements-clients.txt into $(CLIENTS): minutes, once."
	$(BIN)/python -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --requirement requirements-clients.txt
	@touch $@

# What a machine may lack is said here, before anything is downloaded.
$(BIN)/python:
	@stop() { echo "wdkernels: $$1" >&2; exit 1; }; \
	command -v $(PYTHON) >/dev/null || \
	    stop "$(PYTHON) was not found: install Python 3.10 or newer, or name one (make PYTHON=...)."; \
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	    stop "$(PYTHON) is older than Python 3.10: name a newer one (make PYTHON=python3.12 ...)."; \
	$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
	    stop "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt install python3-venv)."; \
	[ "$$WDK_NATIVE" = 0 ] || command -v $(firstword $(CXX)) >/dev/null || \
	    stop "$(CXX) was not found: install it (Debian, Ubuntu: apt install g++), name another \
	compiler (make CXX=...), or do without the compiled kernels (make WDK_NATIVE=0 ...)."; \
	[ "$$WDK_NATIVE" = 0 ] || $(PYTHON) -c "import sysconfig; \
	    open(sysconfig.get_path('include') + '/Python.h')" 2>/dev/null || \
	    stop "Python.h of $(PYTHON) was not found: install it (Debian, Ubuntu: apt install \
	python3-dev), or do without the compiled kernels (make WDK_NATIVE=0 ...)."
	$(PYTHON) -m venv $(VENV)
