# The habits of this repository, one target each. Python is $(PYTHON); everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quick nightly matrix ray-next check format hooks bench gpu lock clean

# Train a residual network on real images with two workers, on this machine.
demo: .venv/.installed
	$(BIN)/python -m raytrainer experiment=resnet

# What CI runs: lint and types, and beside them the tests, in several processes. SHARD=1/3: a third of the files.
test: .venv/.installed-dev
	.ci/tests $(BIN)/python $(if $(SHARD),--shard=$(SHARD))

# The tests that take seconds.
quick: .venv/.installed-dev
	$(BIN)/python -m pytest -m "not slow and not gpu and not nightly" --ignore=tests/integration --ignore=tests/faults

# Longer launches than `make test` has, whose promises it keeps by shorter ones; and a run through everything that a team
# has around it, at once: nodes, proxies, MLflow, PostgreSQL, S3.
nightly: .venv/.installed-dev
	$(BIN)/python -m pytest -m nightly

# Each supported version of Ray and MLflow: contracts, launches, and jobs between versions. Takes about an hour.
matrix: .venv/.installed-dev
	$(BIN)/python -m tests.matrix --write docs/versions.md

# Contracts and a launch with the newest Ray of the package index, pre-releases included, in .venv-ray-next.
ray-next: .venv/.installed-dev
	$(BIN)/python -m tests.matrix.newest

check: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python .ci/language.py

format: .venv/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Lint and types before each commit.
hooks: .venv/.installed-dev
	$(BIN)/pre-commit install

# Every claim about speed, with its peer beside it; the results go to benchmarks/results/.
bench: .venv/.installed-dev
	set -e; for file in benchmarks/bench_*.py; do $(BIN)/python -m "benchmarks.$$(basename "$$file" .py)"; done

# Where there is a GPU: the tests that need one, and the benchmarks of one, whose results go to benchmarks/results/gpu-*.
gpu: .venv/.installed-dev
	$(BIN)/python -m pytest -m gpu tests/gpu
	set -e; for file in benchmarks/gpu/bench_*.py; do $(BIN)/python -m "benchmarks.gpu.$$(basename "$$file" .py)"; done

# Pin what .venv holds now. torch's local version (+cpu, +cu130) is left out: it says where it came from.
lock: .venv/.installed-dev
	echo "# The versions that are tested, exactly; \`make lock\` writes this file again from .venv." > constraints.tmp
	$(BIN)/python -m pip freeze --all --exclude pip --exclude raytrainer | sed 's/+[a-z0-9.]*$$//' >> constraints.tmp
	mv constraints.tmp constraints.txt
	touch .venv/.installed .venv/.installed-dev

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The stamps make a second call quick: pip runs again only when what is to be installed has changed.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "raytrainer needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . -c constraints.txt
	touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@ .venv/.installed
