# `make demo` shows the whole road on a CPU (`make demo-t2i`: from captions), `make test` proves it. They set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST_ARGS ?= -n 2

.PHONY: setup setup-test demo demo-full demo-t2i demo-t2i-full compare photos test test-parity test-slow lint clean

setup: $(VENV)/installed
setup-test: $(VENV)/installed-test

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "lit_jax needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt requirements-torch.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt -r requirements-torch.txt
	touch $@

# The TPU compiler (for --plan) and gs:// are only needed by slow tests.
$(VENV)/installed-slow: $(VENV)/installed-test requirements-tpu.txt requirements-gcs.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-tpu.txt -r requirements-gcs.txt
	touch $@

demo: setup
	$(BIN)/python -m examples.digits

demo-full: setup
	$(BIN)/python -m examples.digits --train_teacher --workdir demo/full

# Text to image: rendered shapes from captions; the second trains text encoder and teacher first.
demo-t2i: setup
	$(BIN)/python -m examples.shapes

demo-t2i-full: setup
	$(BIN)/python -m examples.shapes --train_teacher --workdir=demo/shapes_full

# Every system of the papers on digits, three seeds each.
compare: setup
	$(BIN)/python -m examples.digits.compare

# Images of one's own, from a folder to images; its photographs ship inside scikit-image.
photos: setup-test
	$(BIN)/python -m examples.photos

test: setup-test
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

# Against the official code once more, optimized as users' programs are; `make test` compiles without (tests/conftest.py).
test-parity: setup-test
	$(BIN)/python -m pytest -k "official or golden or diffusers or transformers" tests/models tests/diffusion tests/checkpoint tests/text $(PYTEST_ARGS)

test-slow: $(VENV)/installed-slow
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: setup-test
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) demo runs
