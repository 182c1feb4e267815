# `make demo` and `make test` need nothing but Python >= 3.11 with pip: they build .venv themselves and reuse it.
# Where that Python has another name: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One BLAS thread in each of the two test processes.
THREADS := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
LIMIT := $(if $(shell command -v timeout),timeout 12m,)
MODERN := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test check compiled gpu format bench vectors changelog clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## build .venv with everything in it (done by the other targets when needed)

# The stamp is written last: an interrupted installation is taken up again, a venv without a working pip is made anew.
$(INSTALLED): pyproject.toml constraints.txt
	@rm -f $@
	@if ! $(BIN)/python -c 'import pip; $(MODERN)' 2>/dev/null; then \
	  $(PYTHON) -c '$(MODERN)' || { \
	    echo "refimpl needs Python >= 3.11, and $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)."; \
	    echo "Name another one, for example: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12"; \
	    exit 1; } >&2; \
	  echo "Creating $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 || { \
	    $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	    $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; } || { \
	    echo "$(PYTHON) can neither make a virtual environment with pip nor lend it its own pip."; \
	    echo "Install its venv module first, for example: apt install python3-venv"; \
	    exit 1; } >&2; \
	fi
	@echo "Installing the packages of constraints.txt into $(VENV); the first time takes some minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[all]'
	@touch $@

demo: $(INSTALLED)  ## judge real implementations; writes out/demo/report.html
	$(BIN)/refimpl demo

test: $(INSTALLED)  ## all tests, then the frozen vectors (12 minutes at most)
	$(THREADS) $(LIMIT) $(BIN)/python -m pytest -n 2 tests
	$(BIN)/refimpl vectors verify

check: $(INSTALLED)  ## ruff, types, layout, changelog fragments
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py tests/test_package.py
	$(BIN)/python changelog.d/build.py --check

format: $(INSTALLED)  ## let ruff lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compiled: $(INSTALLED)  ## judge every operator as torch.compile's code (takes most of an hour)
	$(BIN)/refimpl check torchimpl-compiled --examples 0

gpu: $(INSTALLED)  ## judge the PyTorch operators on a CUDA device: eager, compiled, fused attention
	$(BIN)/refimpl check cuda --html out/gpu.html

bench: $(INSTALLED)  ## run every benchmark; each prints the ratios that the README claims
	@missed=; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || missed="$$missed $$file"; done; \
	if [ -n "$$missed" ]; then echo "claims missed:$$missed" >&2; exit 1; fi

vectors: $(INSTALLED)  ## check the frozen vectors against their hashes and minimum counts
	$(BIN)/refimpl vectors verify

changelog: $(INSTALLED)  ## write CHANGELOG.md from the fragments in changelog.d
	$(BIN)/python changelog.d/build.py

clean:  ## remove caches and out/ (the environment stays: .venv)
	rm -rf out build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
