# The README's two commands, `make demo` and `make test`, each work alone on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install test lint types demo demo-train notebook docs fix clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): PyTorch, transformers and the tools of the tests, once, in minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

test: lint types
	$(BIN)/python -m pytest -n auto

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(INSTALLED)
	$(BIN)/mypy

demo: $(INSTALLED)
	$(BIN)/python -m benchmarks.demo

demo-train: $(INSTALLED)
	$(BIN)/python -m benchmarks.demo_train

# The outputs that readers of the notebook see.
notebook: $(INSTALLED)
	$(BIN)/jupyter-execute --inplace examples/first_merge.ipynb

fix: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) site .demo examples/merged .accuracy .fuzz build dist
