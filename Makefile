# make demo: set up and run the main job. make test: set up and pass the tests. Needs Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
OUT := demo

.PHONY: setup demo test lint

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup
	mkdir -p $(OUT)
	$(BIN)/bagel-opt generate "a red circle" --seed 0 --out $(OUT)/picture.png
	$(BIN)/bagel-opt edit $(OUT)/picture.png "make it green" --seed 0 --out $(OUT)/edited.png
	$(BIN)/bagel-opt understand $(OUT)/edited.png "what is in the image?" --max-think-tokens 24
	$(BIN)/python -m bagel_opt.export --format onnx --profile tiny --out $(OUT)/bundle
	$(BIN)/bagel-opt inspect $(OUT)/bundle
	$(BIN)/bagel-opt generate "a red circle" --seed 0 --checkpoint $(OUT)/bundle --out $(OUT)/picture-onnx.png

test: setup
	$(BIN)/pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
