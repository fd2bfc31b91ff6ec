# Everything sets itself up from nothing in .venv: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo install test quick lint clean

demo: .venv/installed          ## the whole pipeline on the built-in dataset
	$(BIN)/python run_pipeline.py

install: .venv/installed       ## the environment alone

test: lint                     ## ruff, then every test: two processes, a core each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

quick: lint                    ## ruff, then the tests that take no time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not browser"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt requirements-app.txt requirements-blip.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-app.txt -r requirements-blip.txt -r requirements-dev.txt
	touch $@

clean:                         ## remove the environment and what the demo and the notebook made
	rm -rf .venv data/shapes data/notebook runs/shapes
