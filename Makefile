PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)

.PHONY: help demo study study-quick test wheel-test ray-test browser-test lint attack soak rebuild clean
.DEFAULT_GOAL := help

help:
	@echo "make demo            install, distil the embedded tiny world with DFD, report, write a sample video"
	@echo "make study           run the study of docs/study.md; the same command goes on after a stop (hours)"
	@echo "make study-quick     one start and one draw of it, on two cores (a quarter of an hour)"
	@echo "make test            install, run the tests"
	@echo "make wheel-test      build the wheel, install it elsewhere, train and stream with it"
	@echo "make ray-test        install Ray, curate on a cluster of two nodes of this machine"
	@echo "make browser-test    the live page in a real Chromium, which has to be installed"
	@echo "make lint            ruff and the type checker"
	@echo "make attack          harm everything that is read, at random, for ten minutes"
	@echo "make soak            the long tests"
	@echo "make rebuild         train assets/tiny again from nothing (hours)"

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python train.py --config dfd_ar.yaml --resume
	$(BIN)/selfforcing-dfd sample --run runs/dfd_ar

study: $(VENV)/.installed
	$(BIN)/selfforcing-dfd study --plan main --starts
	$(BIN)/selfforcing-dfd study --plan main --jobs $(JOBS)

study-quick: $(VENV)/.installed
	$(BIN)/selfforcing-dfd study --plan quick --jobs 2

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not soak and not gpu and not wheel and not ray and not browser"

wheel-test: $(VENV)/.installed
	$(BIN)/python -m pytest -m wheel

ray-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray

browser-test: $(VENV)/.installed
	$(BIN)/python -m pytest -m browser tests/browser

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

attack: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attack --jobs $(JOBS)

soak: $(VENV)/.installed
	$(BIN)/python -m pytest -m soak

rebuild: $(VENV)/.installed
	$(BIN)/selfforcing-dfd rebuild

clean:
	rm -rf runs data
