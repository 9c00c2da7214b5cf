# Every target needs Python 3.10+ with venv, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := -m pip install --quiet --disable-pip-version-check

# $(call suite,environment,budget in processor minutes,marks)
suite = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(1)/bin/python tests/budget.py $(2) \
	$(1)/bin/python -m pytest -q -m "$(3)"
# Two workers with one thread each: the interpreter and the ahead-of-time compilers are single-threaded.
WORKERS := -n 2 --dist worksteal

# `make interop NAME ...`: what follows is no target
ifeq ($(firstword $(MAKECMDGOALS)),interop)
NAMES := $(wordlist 2,$(words $(MAKECMDGOALS)),$(MAKECMDGOALS))
$(NAMES): interop ; @:
endif

.PHONY: demo notebooks bench interop check test test-all test-machines fuzz faults scan lint floor ceiling trl-versions clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) -c constraints.txt -e ".[dev,examples,notebooks,peft,trl]"
	touch $@

demo: $(STAMP)
	$(BIN)/dpo-fast demo

# Executes the notebooks and writes their outputs back: minutes each
notebooks: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python examples/notebooks/execute.py

# Against the last run; `make bench BENCH="--benchmark-compare-fail=median:10%"` fails where something got slower
bench: $(STAMP)
	$(BIN)/python $(INSTALL) -c constraints.txt -e ".[bench]"
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest benchmarks -rs --benchmark-autosave \
		$$(ls .benchmarks/*/*.json >/dev/null 2>&1 && echo --benchmark-compare) \
		--benchmark-columns=median,iqr,rounds --benchmark-histogram=.benchmarks/plots/bench $(BENCH)

# Other frameworks' trainers before and after the lines of docs/swap.md, each in an environment of its own, .interop/NAME;
# INTEROP="--rounds 1" for options
interop: $(STAMP)
	$(BIN)/python -m benchmarks.interop $(NAMES) $(INTEROP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Before a commit, in one process: a second one would spend a quarter of the budget on imports
check: lint
	$(call suite,$(VENV),1.5,not gpu and not slow and not thorough)

# Before a push
test: lint
	$(call suite,$(VENV),12,not gpu and not slow) $(WORKERS)

# In CI: the slow tests, too
test-all: lint
	$(call suite,$(VENV),40,not gpu) $(WORKERS)

# The numerical tests as CPUs with other instructions run them, with one thread and two, from three seeds
test-machines: $(STAMP)
	$(BIN)/python tests/machines.py

# 2,000 random calls of each public op, 200 in Triton's interpreter, 20 compiled; FUZZ="--seed 1" for the same again
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(FUZZ)

# 40 runs that are killed, half of them in a save, and taken up again: each ends as one that was left alone does, to the
# bit; FAULTS="--seed 1" for other moments
faults: $(STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tests/faults.py $(FAULTS)

# Every causal language model type of the installed transformers, packed and padded; writes docs/models.md
scan: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/scan.py

# The oldest versions that pyproject.toml declares. Afterwards the oldest TRL that asks for log-probs, for which tests/trl
# is written (older ones: trl-versions), with what it needs. `make floor PYTHON=python3.10` has the oldest Python, too,
# for which that TRL is not.
floor:
	$(PYTHON) -m venv .venv-floor
	$(PYTHON) tests/floor.py dependencies dev examples peft > .venv-floor/pins.txt
	.venv-floor/bin/python $(INSTALL) -c .venv-floor/pins.txt -e ".[dev,examples,peft]"
	.venv-floor/bin/dpo-fast env | sed '/^$$/q'
	$(call suite,.venv-floor,40,not gpu) $(WORKERS)
	.venv-floor/bin/python $(INSTALL) "trl==1.15.0; python_version >= '3.11'" "numpy<2.4"
	.venv-floor/bin/dpo-fast env | sed '/^$$/q'
	$(call suite,.venv-floor,10,not gpu) $(WORKERS) tests/trl tests/benchmarks/test_train_step.py

# The newest versions that are published
ceiling:
	$(PYTHON) -m venv .venv-ceiling
	.venv-ceiling/bin/python $(INSTALL) --upgrade --upgrade-strategy eager -e ".[dev,examples,notebooks,peft,trl]"
	.venv-ceiling/bin/dpo-fast env | sed '/^$$/q'
	$(call suite,.venv-ceiling,40,not gpu) $(WORKERS)

# TRL's own trainer and ours on the same tiny models, in an environment for each release: how far apart what they log and
# the trained weights are. "TRL/transformers": TRL before 0.29 does not run with transformers 5
TRL_RELEASES ?= 0.18.2/4.57.6 0.20.0/4.57.6 0.22.2/4.57.6 0.24.0/4.57.6 0.26.2/4.57.6 0.28.0/4.57.6 0.29.1/5.23.0 \
	1.0.0/5.23.0 1.3.0/5.23.0 1.6.0/5.23.0 1.9.2/5.23.0 1.12.0/5.23.0 1.14.2/5.23.0 1.16.0/5.23.0
trl-versions:
	for release in $(TRL_RELEASES); do \
		env=.venv-trl/$${release%/*}; \
		$(PYTHON) -m venv $$env && $$env/bin/python $(INSTALL) torch peft pytest \
			trl==$${release%/*} transformers==$${release#*/} && \
		OMP_NUM_THREADS=1 $$env/bin/python -W ignore tests/trl_versions.py || exit 1; \
	done

clean:
	rm -rf $(VENV) .venv-floor .venv-ceiling .venv-trl .interop runs build dist *.egg-info
