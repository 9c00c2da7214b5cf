# `make demo` and `make test` need Python 3.10+ with venv, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint clean

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,examples,peft,trl]"
	touch $@

demo: $(STAMP)
	$(BIN)/dpo-fast demo

lint: $(STAMP)
	$(BIN)/ruff check .

# Two workers with one thread each: the interpreter and the ahead-of-time compilers are single-threaded.
test: lint
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n 2 --dist worksteal

clean:
	rm -rf $(VENV) runs build dist *.egg-info
