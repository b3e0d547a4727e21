# Both commands set up what they need: a virtual environment in .venv with pinned versions.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint slow clean

demo: $(READY)  ## optimises all-MiniLM-L6-v2 under a quality budget and runs it in ONNX Runtime
	$(BIN)/python examples/minilm.py

test: $(READY) lint  ## linters, type checker and the test suite
	$(BIN)/python -m pytest -n 2 --dist loadscope

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf,test,bench]'
	touch $@

clean:
	rm -rf $(VENV) out
