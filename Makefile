# make quickstart: set-up, then train, evaluate and rank a small SDDPM on embedded digits.
# make quick: lint, types, and the tests that train nothing.
# make test: lint, types, tests.   make regress: every method trained small and compared with its baseline.   CI runs both.
# make lowest: the quick tests and the command line on the lowest versions that pyproject.toml allows.   CI runs it too.
# make gpu: on a GPU, its tests and the speed suite, with the packages of PYTHON.
PYTHON ?= python3
BIN := .venv/bin
# its counts, in tests; the data sets of its dependency tonic need expelliarmus, which has no wheels for Python 3.12
NEUROBENCH := neurobench==2.3.0

.PHONY: setup quickstart quick test lint regress lowest gpu clean

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(NEUROBENCH)
	touch $@

quickstart: setup
	@$(BIN)/python -m benchmark fit --config configs/quickstart.yaml
	@$(BIN)/python -m benchmark test
	@$(BIN)/python -m benchmark leaderboard

# files in order: the longest ones, of the command line, come first, so that no process waits for one at the end
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

quick: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m 'not regress and not slow'

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --noconftest tests/test_repository.py tests/test_language.py

regress: setup
	$(BIN)/python -m benchmark regress

lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/python -m uv pip install --quiet --python .venv-lowest --resolution lowest-direct -e '.[dev,benchmark]'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python $(PYTEST) -m 'not regress and not slow'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest tests/benchmark/test_cli.py

gpu:
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 8 --dist worksteal tests/test_cuda.py
	$(PYTHON) -m benchmark speed

clean:
	rm -rf .venv .venv-lowest build *.egg-info
