# Two commands matter: `make test` and `make book`. Each makes the environment it needs in $(VENV) the first
# time, says what it is doing, and leaves the Python it was started with alone. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
# Another wheel index for torch and torchvision, e.g. https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Test processes. Each imports torch (about 0.5 GB) and computes on one thread.
WORKERS ?= 2
PORT ?= 8000

PY := $(VENV)/bin/python
HTML := _build/html
CODE := detcore tests tools
SAY = @printf '\n\033[1m== %s\033[0m\n'

# The user's settings must not leak in: no user site, no PYTHONPATH, no `pip install --user` by default.
# MPLBACKEND would keep the figures out of the executed notebooks.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV MPLBACKEND
export PYTHONNOUSERSITE := 1
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help test lint unit plain compile book notebooks test-book check types serve clean distclean surface FORCE
# A recipe that fails leaves no stamp behind.
.DELETE_ON_ERROR:

help:
	@echo 'make test        make the environment, run the whole test suite'
	@echo 'make book        make the environment, execute the notebooks, build $(HTML)/index.html'
	@echo 'make test-book   open the built book in headless Chromium and move its figures'
	@echo 'make check       lint, format, notebooks stripped, spelling: what pre-commit runs'
	@echo 'make types       pyright on detcore'
	@echo 'make notebooks   run every notebook as a reader does, with live widgets'
	@echo 'make serve       show the built book on http://localhost:$(PORT)'
	@echo 'make surface     rewrite tests/api_surface.txt after a public name came or went'
	@echo 'make clean       remove the built book and caches;  make distclean: the environment too'
	@echo
	@echo 'variables: PYTHON=$(PYTHON) VENV=$(VENV) WORKERS=$(WORKERS) TORCH_INDEX=$(TORCH_INDEX)'

# --- environments: a stamp per set of packages, redone when pyproject.toml changes ---------------------------

# Holds the index that torch came from; touched only when another one is asked for by name.
$(VENV)/.torch-index: FORCE
	@$(PYTHON) tools/make_venv.py $(VENV)
	@if [ ! -f $@ ] || { [ -n '$(TORCH_INDEX)' ] && [ '$(TORCH_INDEX)' != "$$(cat $@)" ]; }; then \
		if [ -n '$(TORCH_INDEX)' ]; then \
			printf '\n\033[1m== installing torch and torchvision from %s\033[0m\n' '$(TORCH_INDEX)'; \
			$(PY) -m pip install --upgrade --force-reinstall --index-url '$(TORCH_INDEX)' torch torchvision || exit 1; \
		fi; \
		echo '$(TORCH_INDEX)' > $@; \
	fi

$(VENV)/.test-stamp: pyproject.toml $(VENV)/.torch-index
	$(SAY) 'installing detcore and its test tools into $(VENV) (first time: about 5 GB with torch for GPUs, a few minutes)'
	$(PY) -m pip install --editable '.[test]'
	@touch $@

$(VENV)/.book-stamp: pyproject.toml $(VENV)/.torch-index
	$(SAY) 'installing detcore and the book tools into $(VENV) (first time: about 5 GB with torch for GPUs, a few minutes)'
	$(PY) -m pip install --editable '.[test,book]'
	@touch $@ $(VENV)/.test-stamp

$(VENV)/.dev-stamp: pyproject.toml $(VENV)/.torch-index
	$(SAY) 'installing the developer tools into $(VENV)'
	$(PY) -m pip install --editable '.[test,dev]'
	@touch $@ $(VENV)/.test-stamp

# --- tests -----------------------------------------------------------------------------------------------------

test: lint unit plain compile
	$(SAY) 'make test: all green'

lint: $(VENV)/.test-stamp
	$(SAY) 'ruff: rules and format'
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(SAY) 'notebooks carry no outputs'
	@set -- notebooks/*.ipynb; [ ! -e "$$1" ] || $(PY) -m nbstripout --keep-id --verify "$$@"

unit: $(VENV)/.test-stamp
	$(SAY) 'tests and doctests, shapes checked at every call, $(WORKERS) processes'
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -m 'not compile and not browser'

# Assignment, losses, selection and the models that are made of them, by the plain functions that the fast ones stand for.
plain: $(VENV)/.test-stamp
	$(SAY) 'the same without the fast forms'
	DETCORE_KERNELS=0 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m 'not compile and not slow' $(wildcard \
		tests/test_assigners*.py tests/test_fcos_assign.py tests/test_losses_*.py tests/test_models*.py \
		tests/test_postprocess.py)

# The shape hook splits a compiled graph (even disabled it stays around dataclasses), so these run without it.
compile: $(VENV)/.test-stamp
	$(SAY) 'compiled training and inference graphs'
	JAXTYPING_DISABLE=1 $(PY) -m pytest -o addopts=--strict-markers tests -n $(WORKERS) -m compile

notebooks: $(VENV)/.test-stamp
	$(SAY) 'notebooks with live widgets'
	$(PY) -m pytest -n $(WORKERS) --nbmake --nbmake-timeout=600 notebooks

# --- the book ----------------------------------------------------------------------------------------------------

# Pages are written afresh (a page that was read before would not repeat its warnings, and a removed one would
# stay); executed notebooks come from the cache in _build/.jupyter_cache while their code and detcore are unchanged.
book: $(VENV)/.book-stamp
	$(SAY) 'executing the notebooks and building the book; a warning is an error'
	@rm -rf $(HTML) _build/.doctrees
	$(VENV)/bin/jupyter-book build . -W -n --keep-going
	@test -f $(HTML)/index.html
	$(SAY) 'the book: $(HTML)/index.html (make serve shows it)'

test-book: $(VENV)/.test-stamp
	$(SAY) 'the built book in headless Chromium, and its settings'
	@test -f $(HTML)/index.html || { echo 'make: there is no $(HTML)/index.html; run make book first' >&2; exit 1; }
	$(PY) -m pytest tests/browser tests/test_book_config.py -m 'not compile'

serve:
	@test -f $(HTML)/index.html || { echo 'make: there is no $(HTML)/index.html; run make book first' >&2; exit 1; }
	$(PYTHON) -m http.server --directory $(HTML) --bind 127.0.0.1 $(PORT)

# --- upkeep --------------------------------------------------------------------------------------------------------

check: lint $(VENV)/.dev-stamp
	$(SAY) 'spelling'
	@$(PY) -m codespell_lib

types: $(VENV)/.dev-stamp
	$(SAY) 'types'
	$(PY) -m pyright --pythonpath $(PY)

surface: $(VENV)/.test-stamp
	$(PY) tools/api_surface.py

clean:
	rm -rf _build .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
