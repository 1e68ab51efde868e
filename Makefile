# `make` lists what there is. Everything sets up .venv first; versions stand in pyproject.toml.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST_ARGS ?= -n 2 --dist loadfile
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check
SMOKE = runs/smoke
N ?= 2000
SEED ?= $(shell date +%s)

.PHONY: help setup setup-test demo demo-full demo-t2i demo-t2i-full lab compare photos test test-peers test-slow fuzz smoke lint docs docs-serve clean

help:        ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/installed               ## .venv with what lit_jax needs
setup-test: $(VENV)/installed-test     ## and with what the tests need

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "lit_jax needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(INSTALL) -e ".[test]"
	touch $@

$(VENV)/installed-peers: $(VENV)/installed-test
	$(INSTALL) -e ".[test,peers,export]"
	touch $@

# The TPU compiler (for --plan) and gs:// are only needed by slow tests.
$(VENV)/installed-slow: $(VENV)/installed-peers
	$(INSTALL) -e ".[test,peers,export,tpu,gcs]"
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(INSTALL) -e ".[docs]"
	touch $@

demo: setup            ## the whole method on MNIST: convert, inherit, align, distil, compare (CPU, minutes)
	$(BIN)/python -m examples.mnist

demo-full: setup       ## the same, training the teacher first
	$(BIN)/python -m examples.mnist --train_teacher --workdir demo/full

demo-t2i: setup        ## from captions: rendered shapes
	$(BIN)/python -m examples.shapes

demo-t2i-full: setup   ## the same, training text encoder and teacher first
	$(BIN)/python -m examples.shapes --train_teacher --workdir=demo/shapes_full

lab: setup             ## every student of the MNIST demo and LiT's guidelines, three seeds each (hours, resumes)
	$(BIN)/python -m examples.mnist.lab

compare: setup         ## every system of the papers on digits, three seeds each
	$(BIN)/python -m examples.digits.compare

photos: setup-test     ## from a folder of images (photographs of scikit-image) to images
	$(BIN)/python -m examples.photos

test: setup-test       ## the tests, without PyTorch
	$(BIN)/python -m pytest -m "not slow and not peers" $(PYTEST_ARGS)

test-peers: $(VENV)/installed-peers    ## against PyTorch, diffusers, transformers and the official metrics
	$(BIN)/python -m pytest -m "(peers or parity) and not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/installed-slow      ## what takes longer than ten seconds
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

fuzz: $(VENV)/installed-peers          ## damaged files for every reader: make fuzz N=10000 SEED=7
	PYTHONPATH=.:tests $(BIN)/python -m fuzz.campaign --cases=$(N) --seed=$(SEED)

# As a user has it: the package alone, built as a wheel, in a folder of its own.
smoke: setup           ## the installed package in a minute: convert, draw, one step
	rm -rf $(SMOKE) && mkdir -p $(SMOKE)/work
	$(INSTALL) --no-deps --target $(SMOKE)/site .
	cd $(SMOKE)/work && export PYTHONPATH=../site LIT_JAX_MODELS=. && lit="$(abspath $(BIN))/python -m lit_jax" && \
	$$lit convert assets/digits_dit.safetensors --out digits_dit && \
	$$lit sample --from digits_dit --classes 0,1,2,3 --per_class 1 --out digits.png && \
	$$lit train --config=digits_lit --config.train.steps=1 --config.sample.every=0 --workdir=run

lint: setup-test       ## ruff, the order of the rooms, types
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(VENV)/installed-docs           ## the documentation as a site, in site/
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/installed-docs     ## the same, served here and built anew at each change
	$(BIN)/mkdocs serve

clean:                 ## removes .venv, site, and what the demos wrote
	rm -rf $(VENV) demo runs site
