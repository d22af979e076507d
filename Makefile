# `make run`, `make test` and `make lab` set up .venv by themselves; nothing but Python 3.11+, make and git is needed.
#   make run ARGS=00              a first look: run one notebook, print where the report is
#   make run                      run every notebook, print where the report is
#   make run ARGS="04 --resume"   the same, with arguments for `mmfm run`
#   make test ARGS="-k scenes"    the tests, with arguments for pytest
#   make lab                      open the notebooks in JupyterLab
#   make bench                    what opening a model costs, as a table of ratios
#   make lint                     ruff and the notebook contract
#   make lock                     resolve pyproject.toml into requirements.lock again (UPGRADE=--upgrade for newer versions)
#   make clean                    remove .venv
PYTHON ?= python3
UV_VERSION := 0.13.9
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
UPGRADE ?=

.PHONY: help run test lab bench lint lock setup clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

run: setup
	$(BIN)/mmfm run $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

lab: setup
	$(BIN)/jupyter lab --notebook-dir=notebooks $(ARGS)

bench: setup
	$(BIN)/python benchmarks/opened.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.notebook_contract

lock: setup
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --fork-strategy fewest \
	  --no-header --no-annotate --no-emit-index-url $(UPGRADE) -o requirements.lock

# $(VENV)/.installed holds this folder's name and the lock that was installed: while it agrees, there is nothing to do.
# $(VENV)/.unfinished stands while an installation is under way: where it is found at the start, the last one was
# interrupted and .venv is made anew. uv fetches and installs; unlike pip it takes torch's CUDA build, which has a
# matching torchvision, whatever pip is configured to find first.
setup:
	@set -e; \
	want() { pwd; cat requirements.lock pyproject.toml; }; \
	recent() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }; \
	if [ ! -e $(VENV)/.unfinished ] && recent $(BIN)/python && want | cmp -s - $(VENV)/.installed; then exit 0; fi; \
	if [ -e $(VENV)/.unfinished ] || ! recent $(BIN)/python || ! $(BIN)/python -m pip --version >/dev/null 2>&1 \
	  || { [ -e $(VENV)/.installed ] && [ "$$(head -n 1 $(VENV)/.installed)" != "$$(pwd)" ]; }; then \
	  found=; \
	  for python in "$(PYTHON)" python3.12 python3.13 python3.11 python3.14; do \
	    if recent "$$python"; then found="$$python"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "Python 3.11 or newer is needed; '$(PYTHON)' here is: $$("$(PYTHON)" --version 2>&1 || true)" >&2; \
	    echo "Install one, or name it: make PYTHON=python3.12 ..." >&2; exit 2; \
	  fi; \
	  echo "Making $(VENV) with $$found ($$("$$found" --version))"; \
	  rm -rf $(VENV); mkdir $(VENV); touch $(VENV)/.unfinished; \
	  "$$found" -m venv $(VENV) || { \
	    echo "'$$found -m venv' failed. On Debian and Ubuntu it needs: apt install python3-venv" >&2; exit 2; }; \
	fi; \
	touch $(VENV)/.unfinished; \
	echo "Installing the versions in requirements.lock into $(VENV) (once; several GB on Linux)"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION); \
	if [ -t 2 ]; then quiet=; else quiet=--quiet; fi; \
	$(BIN)/uv pip install $$quiet --python $(BIN)/python -r requirements.lock; \
	$(BIN)/uv pip install $$quiet --python $(BIN)/python --no-deps -e .; \
	want > $(VENV)/.installed; rm $(VENV)/.unfinished

clean:
	rm -rf $(VENV)
