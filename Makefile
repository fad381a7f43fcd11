# Each target is complete on a machine that has only Python, pip and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test lint types layers unit slow bench docs dist compat clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "protopush needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/protopush demo --config recipes/elpv.yaml --out runs/demo

# Two jobs at a time: the checks keep one core busy, and the tests need not wait for them.
test: $(READY)
	$(MAKE) -j 2 lint types layers unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports

# One thread a process, a process a core: torch's own threads would only get in each other's way.
# Each process begins with its share of the files, in their order: the tests of a file share a run, a server or a browser.
# One that has done its share takes over half of what another has left, so that none waits long for the last file.
unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --dist worksteal -m "not slow and not gpu"

slow: $(READY)
	$(BIN)/pytest -q -m "slow"

# Each benchmark of speed in short, held against the committed figures, alone on the machine. Those that need a run are
# left out without `make bench DATA=manifest.csv`.
bench: $(READY)
	$(BIN)/python benchmarks/bench.py $(if $(DATA),--data $(DATA))

# The guide as a site, in site/index.html; a warning is an error. (The variable silences a notice about another program.)
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The sdist and the wheel, in dist/, as a release uploads them.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

# The wheel in clean environments outside the tree, with the lowest and the newest versions of all that it needs.
compat: dist
	$(BIN)/python tests/scripts/environments.py dist/protopush-*.whl

clean:
	rm -rf .venv dist runs site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
