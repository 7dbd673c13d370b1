# Two commands do all the set-up: `make lab` to explore, `make test` to check.
PYTHON ?= python3
VENV ?= .venv
# The library admits torch 2.11 and newer; this pin is what the tests run with.
TORCH ?= torch==2.13.0
JOBS ?= auto
BIN = $(VENV)/bin
# One thread a process: notebooks and tests share the machine by cores.
ONE_THREAD = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help lab test lint format reproduce report bench install install-test clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install "$(TORCH)" -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install "$(TORCH)" -e ".[test]"
	touch $(VENV)/.installed $@

install: $(VENV)/.installed ## Install into .venv
install-test: $(VENV)/.installed-test ## Install with everything that the tests need

lab: install ## Open JupyterLab on the index of all papers
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/index.ipynb

lint: install-test ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install-test ## Mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: install-test lint ## Run every test: units, contract, all notebooks, other seeds, browser
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --nbval-lax \
	  --nbval-current-env --nbval-cell-timeout=300 tests notebooks

reproduce: install ## Run all notebooks headlessly and write report.html
	$(BIN)/miniature run --all --resume --out runs; status=$$?; \
	$(BIN)/miniature report --from runs --out report.html && exit $$status

report: install ## Write report.html from the committed notebooks
	$(BIN)/miniature report --out report.html

bench: install-test ## Compare speed with what one would use instead
	$(ONE_THREAD) $(BIN)/python -m pytest tests/bench -q -s --benchmark-columns=median,iqr,rounds

clean: ## Remove what running leaves behind
	rm -rf runs report.html .pytest_cache .ruff_cache .benchmarks
	find lib tests -name __pycache__ -prune -exec rm -rf {} +
