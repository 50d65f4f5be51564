PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint soak rebuild clean
.DEFAULT_GOAL := help

help:
	@echo "make demo            install, distil the embedded tiny world with DFD, report, write a sample video"
	@echo "make test            install, run the tests"
	@echo "make lint            ruff and the type checker"
	@echo "make soak            the long tests"
	@echo "make rebuild         train assets/tiny again from nothing (hours)"

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python train.py --config dfd_ar.yaml --resume
	$(BIN)/python -m selfforcing_dfd sample --run runs/dfd_ar

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not soak and not gpu"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(VENV)/.installed
	$(BIN)/python -m pytest -m soak

rebuild: $(VENV)/.installed
	$(BIN)/python -m selfforcing_dfd rebuild

clean:
	rm -rf runs data
