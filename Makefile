# Two commands do all set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# bitplan needs llama.cpp without its image and audio part: a third less to build.
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF

.PHONY: demo test lint bench clean

demo: $(VENV)/.ready
	$(BIN)/bitplan demo --out demo-out

test: $(VENV)/.ready-hf
	$(BIN)/python -m pytest

lint: $(VENV)/.ready-hf
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.ready-hf
	$(BIN)/python benchmarks/presets.py
	$(BIN)/python benchmarks/probes.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/study.py
	$(BIN)/python benchmarks/reuse.py
	$(BIN)/python benchmarks/scorers.py
	$(BIN)/python benchmarks/profiles.py
	$(BIN)/python benchmarks/formats.py

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# PyTorch and transformers, for the models that they run; the demo does without.
$(VENV)/.ready-hf: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,hf]'
	touch $@

clean:
	rm -rf $(VENV) demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
