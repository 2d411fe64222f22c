# make quickstart   raw text to a model that speaks the language, on a laptop (runs/quickstart/report/report.html)
# make quickstart-encoder   the same for an encoder from scratch (runs/quickstart-encoder/report/report.html)
# make test         the tests, in less than half an hour of two cores
# make test-all     those and the long ones; PART=long (kernels' combinations, a second language) or PART=matrix (checkpoints): one part
# make lint         ruff, shellcheck and mypy
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
SHELL_SCRIPTS := $(wildcard slurm/*.sh slurm/lib/*.sh slurm/*.sbatch apptainer/*.sh .ci/run tests/slurm/lab tests/slurm/*.sh benchmarks/*.sh)

.PHONY: quickstart quickstart-encoder test test-all test-long test-matrix lint clean

quickstart: $(VENV)/installed
	slurm/pipeline.sh quickstart --local

quickstart-encoder: $(VENV)/installed
	slurm/pipeline.sh quickstart-encoder --local

test: $(VENV)/installed-dev
	pytest -m "not long" -n $$(($$(nproc) + 1)) --dist loadfile --no-loadscope-reorder # one more than cores: a third of the time is waiting

test-all: $(if $(PART),test-$(PART),test test-long test-matrix)

test-long: $(VENV)/installed-dev
	pytest -m long -n $$(nproc) --dist loadfile

test-matrix: $(VENV)/installed-dev
	for program in cpt mlm; do \
	  python tests/support/matrix.py --program $$program --bf16 --resume_cells false || exit 1; \
	  python tests/support/matrix.py --program $$program --worlds 1 2 || exit 1; \
	done

lint: $(VENV)/installed-dev
	ruff check .
	ruff format --check .
	shellcheck $(SHELL_SCRIPTS)
	mypy dilqur

# torch first and alone: a CPU-only machine may have its own build of that version, and what comes later must not replace it.
$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 2; }
	@[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	pip install --quiet "$$(grep '^torch==' requirements.txt)"
	pip install --quiet -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	pip install --quiet -r requirements-dev.txt
	# for the test of fp8, and beside the environment: transformers imports it wherever it is installed
	pip install --quiet --no-deps --upgrade --target $(VENV)/beside torchao==0.18.0
	@touch $@

clean:
	rm -rf $(VENV) runs
