# The verbs of this project. `make` lists them.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
LAKE ?= .assay/demo
WORKERS ?= 2
EXTRAS := spark,ray,train,ann,int8,label-cpu,s3,mlflow,demo,notebook,dev
export HF_HUB_OFFLINE ?= 1
export RAY_ENABLE_UV_RUN_RUNTIME_ENV := 0

.DEFAULT_GOAL := help
.PHONY: help install demo notebook test test-slow lint format docs constraints wheel clean

help:  ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

install: .venv/.installed  ## make .venv and install everything into it

.venv/.installed: pyproject.toml constraints.txt overrides.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@# compiled here, since where PYTHONDONTWRITEBYTECODE is set every process would compile vLLM and torch anew: 15 s
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --constraints constraints.txt \
	  --overrides overrides.txt --editable '.[$(EXTRAS)]'
	@touch $@

demo: install  ## run the whole loop on a generated marketplace
	@$(BIN)/assay loop demo

notebook: install  ## run a notebook and write it as HTML: NAME=audit_overview LAKE=.assay/demo [QUERY="red shoes"]
	@$(BIN)/python notebooks/render.py $(NAME) lake='$(LAKE)' query='$(QUERY)'

test: install  ## run the tests (under 40 minutes on 2 cores), WORKERS=2 files of them at once
	$(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder

test-slow: install  ## run the tests that are marked slow
	$(BIN)/python -m pytest -m slow

lint: install  ## ruff, mypy --strict and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## write docs/tables.md and docs/guideline.md from their sources
	$(BIN)/python -m lake.describe > docs/tables.md
	$(BIN)/python -m embeddings.guideline > docs/guideline.md

constraints: install  ## write constraints.txt from what is installed
	@{ echo '# Exact versions of everything, for Python 3.11 and newer on Linux x86-64; written by `make constraints`.'; \
	  $(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable | grep -vE '^(uv|pip|setuptools)=='; } > constraints.txt

wheel: install  ## build dist/assay-*.whl
	$(BIN)/python -m build --wheel --installer uv

clean:  ## remove build output; .venv and lakes stay
	rm -rf dist build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
