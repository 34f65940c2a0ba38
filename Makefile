# SPDX-License-Identifier: Apache-2.0
# Everything a newcomer types. Needs Python 3.11 or 3.12 and pip; the rest goes into .venv.
# The interpreter: PYTHON=... if given, else the first of these that is 3.11 or 3.12.

FITS := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PEERS ?= .peers
PLANS ?= .plans
RUNS ?= runs
# Minutes after which `make plans` begins no other compilation for a config and a machine.
SEARCH ?= 1
TORCH ?= torch==2.13.0
# Files of tests side by side: most of their time is one thread's, compiling. 2 GB of memory each.
BESIDE ?= -n logical --maxprocesses 4 --dist loadfile
# A test that hangs for a quarter of an hour says where and ends all, as one that kills its process
# does: xdist would run that again and again.
HUNG ?= --max-worker-restart 0 -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

.PHONY: help env quickstart demos plans test test-all test-peers test-plans test-slurm test-browser \
	lint clean

help:
	@echo 'make quickstart   speech, two trained models, evaluation, audio and one report'
	@echo 'make demos        docs/systems.md: every system trained at demo size and measured, hours'
	@echo 'make env          installs into $(VENV), about 1.5 GB; then: . $(VENV)/bin/activate'
	@echo 'make test         the test suite (no accelerator needed)'
	@echo 'make test-all     also the slow tests'
	@echo 'make test-peers   compares with the PyTorch implementations, in $(PEERS)'
	@echo 'make test-browser the page to talk on, in a chromium that is on the PATH'
	@echo 'make test-slurm   trains, stops, kills and resumes on a Slurm of two nodes made here (root)'
	@echo 'make plans        PLANS.md: what training takes on TPUs and GPUs, none of which is needed'
	@echo 'make test-plans   compiles for them, in $(PLANS)'
	@echo 'make lint         ruff'
	@echo 'make clean        removes the caches of Python, pytest and ruff; keeps data, runs and $(VENV)'

$(VENV)/.complete: setup.py
	@$(if $(PYTHON),,echo 'make: needs Python 3.11 or 3.12 on the PATH, or PYTHON=/path/to/one' >&2; exit 1)
	@'$(PYTHON)' -c '$(FITS)' || { echo 'make: $(PYTHON) is not Python 3.11 or 3.12' >&2; exit 1; }
	@echo 'environment: installing into $(VENV) (about 1.5 GB, some minutes the first time)'
	@'$(PYTHON)' -m venv '$(VENV)'
	@'$(VENV)/bin/python' -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

env: $(VENV)/.complete

quickstart: env
	@PYTHON='$(VENV)/bin/python' RUNS='$(RUNS)' bash launch/quickstart.sh

demos: env
	@PYTHON='$(VENV)/bin/python' RUNS='$(RUNS)/demos' bash launch/demos.sh

test: env
	'$(VENV)/bin/python' -m pytest $(BESIDE) $(HUNG)

test-all: env
	'$(VENV)/bin/python' -m pytest $(BESIDE) -m 'not peers and not plans and not slurm and not browser'

# moshi pins older torch and numpy than it needs, jax2onnx an older orbax-checkpoint (which it does
# not import), hence --no-deps, last, and their needs by hand.
$(PEERS)/.complete: setup.py Makefile $(VENV)/.complete
	@echo 'environment: installing the peers into $(PEERS)'
	@'$(VENV)/bin/python' -m venv '$(PEERS)'
	@'$(PEERS)/bin/python' -m pip install --quiet --disable-pip-version-check $(TORCH)
	@'$(PEERS)/bin/python' -m pip install --quiet --disable-pip-version-check -e '.[test,onnx,wandb]' \
		einops huggingface_hub sphn 'transformers>=5.23,<6' 'peft>=0.18,<1' 'numpy<2.5'
	@'$(PEERS)/bin/python' -m pip install --quiet --disable-pip-version-check --no-deps moshi==0.2.13 \
		jax2onnx==0.17.1
	@touch $@

test-peers: $(PEERS)/.complete
	'$(PEERS)/bin/python' -m pytest -m peers tests/peers

test-browser: env
	'$(VENV)/bin/python' -m pytest -m browser tests/browser

# Needs Debian's slurmctld, slurmd, slurm-client and munge, and root; cluster.sh says what lacks.
test-slurm: env
	bash tests/slurm/cluster.sh '$(VENV)/bin/python' -m pytest -m slurm tests/slurm

# The compilers for TPUs and for GPUs, the latter without the CUDA packages that only running needs.
$(PLANS)/.complete: setup.py Makefile $(VENV)/.complete
	@echo 'environment: installing the compilers for TPUs and GPUs into $(PLANS)'
	@'$(VENV)/bin/python' -m venv '$(PLANS)'
	@'$(PLANS)/bin/python' -m pip install --quiet --disable-pip-version-check -e '.[test,plan]'
	@version=$$('$(PLANS)/bin/python' -c 'import jax; print(jax.__version__)') && \
		'$(PLANS)/bin/python' -m pip install --quiet --disable-pip-version-check --no-deps \
		"jax-cuda13-pjrt==$$version" "jax-cuda13-plugin==$$version"
	@touch $@

plans: $(PLANS)/.complete
	'$(PLANS)/bin/python' -m jaxsd plan --config $(filter-out configs/_%,$(wildcard configs/*.py)) \
		--topology v5e:16x16 v5p:8x8x8 h200:8 --search $(SEARCH) --out PLANS.md

test-plans: $(PLANS)/.complete
	'$(PLANS)/bin/python' -m pytest -m plans tests/plans

lint: env
	'$(VENV)/bin/ruff' check .

clean:
	rm -rf .pytest_cache .ruff_cache
	find jaxsd data_pipelines configs tests -name __pycache__ -type d -prune -exec rm -rf {} +
