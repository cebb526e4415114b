# make quickstart: set-up, then train, evaluate and rank a small SDDPM on embedded digits.
# make test: lint, types, tests.   make regress: every method trained small and compared with its baseline.   CI runs both.
# make gpu: on a GPU, its tests and the speed suite, with the packages of PYTHON.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup quickstart test lint regress gpu clean

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

quickstart: setup
	@$(BIN)/python -m benchmark fit --config configs/quickstart.yaml
	@$(BIN)/python -m benchmark test
	@$(BIN)/python -m benchmark leaderboard

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

regress: setup
	$(BIN)/python -m benchmark regress

gpu:
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 8 --dist worksteal tests/test_cuda.py
	$(PYTHON) -m benchmark speed

clean:
	rm -rf .venv build *.egg-info
