# PYTHON: the interpreter of the environment that has `pip install -e '.[megatron,dev]'`.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python)
JOBS ?= 2
# A file stays with one process, for its fixtures; files in their order, where quick ones are last.
SPREAD = -n $(JOBS) --dist loadfile --no-loadscope-reorder
COMPAT_VENV ?= .venv-compat
# pyenv's python3.12 stands behind a shim that runs only where a version is chosen.
COMPAT_PYTHON ?= $(shell prefix=$$(pyenv prefix 3.12 2>/dev/null) && echo $$prefix/bin/python3.12 || echo python3.12)
COMPAT_PINS ?= "megatron-core>=0.19,<0.20" "transformers>=4.57,<4.58"
COMPAT_TESTS ?= tests/families tests/weights tests/llm tests/megatron

.PHONY: venv check format test test-slow test-dist test-faults test-all test-gpu test-compat test-transformers4 docs quickstart clean

venv:  ## .venv with everything the tests need
	python3.11 -m venv .venv
	.venv/bin/python -m pip install -qq torch==2.13.0
	.venv/bin/python -m pip install -qq -c tests/constraints.txt -e '.[megatron,dev]'

check:  ## style, layout, types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:  ## the fast tests, no network; JOBS=N of them at a time
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q $(SPREAD) --durations 15

test-slow:
	$(PYTHON) -m pytest -q -m "slow and not dist and not gpu"

test-dist:  ## two and four processes on one machine (gloo)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m dist $(SPREAD) --durations 40

test-faults:  ## kills, full disks, damaged files; docs/faults.md
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m faults $(SPREAD)

test-all:  ## test, test-dist and test-faults in one session: imported and collected once, both workers busy to the end
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m "not slow and not gpu" $(SPREAD) --durations 40

test-gpu:  ## needs CUDA
	$(PYTHON) -m pytest -q -m gpu

test-compat:  ## the other end of the supported versions: Python 3.12, newest megatron-core, transformers 4.57
	test -x $(COMPAT_VENV)/bin/python || $(COMPAT_PYTHON) -m venv $(COMPAT_VENV)
	$(COMPAT_VENV)/bin/python -m pip install -qq torch==2.13.0
	$(COMPAT_VENV)/bin/python -m pip install -qq -e '.[megatron,dev]' $(COMPAT_PINS)
	$(COMPAT_VENV)/bin/python -m pytest -q $(COMPAT_TESTS)

test-transformers4:  ## the same tests with Python 3.11 and transformers 4.57
	$(MAKE) test-compat COMPAT_VENV=.venv-transformers4 COMPAT_PYTHON=python3.11 COMPAT_PINS='"transformers>=4.57,<4.58"'

docs:  ## the site, into output/site; needs pip install -e '.[docs]', no network
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

quickstart:
	bash examples/quickstart.sh

clean:
	rm -rf output build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
