# make demo: set up and run the main job. make test: set up and pass the tests, but for
# those that take long; make test-all: all of them. Needs Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
OUT := demo
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test test-all lint

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup
	$(BIN)/python -m bagel_opt.demo --out $(OUT)

test: setup
	$(BIN)/pytest -q $(TWO) -m "not second"

test-all: setup
	$(BIN)/pytest -q $(TWO)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
