# make run, make test: all set-up included. make lint: what has to be clean before a commit, and is
# looked at then where pre-commit(1) has been installed for it: pre-commit install.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

FUZZ_SECONDS ?= 180

.PHONY: run test unit lowest kernel soak bench fuzz lint format clean

# Who has a checkout decides what it runs, so its files may as well be his.
run: $(VENV)/installed
	$(BIN)/dtrace-exporter --allow-insecure-files --config.file=config/dtrace_exporter.yml $(ARGS)

# Everything: unit tests, then a real DTrace in virtual machines.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(ARGS)

unit: $(VENV)/installed-dev
	$(BIN)/python -m pytest --ignore=tests/kernel $(ARGS)

# What others send us, with the lowest versions that pyproject.toml permits.
lowest: $(VENV)-lowest/installed
	$(VENV)-lowest/bin/python -m pytest $(ARGS) $(addprefix tests/test_, hostile.py access.py auth.py \
	    config.py web.py web_config.py web_properties.py exposition.py collector.py sock_diag.py)

kernel: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/kernel $(ARGS)

# An hour of traffic, reloads, kills and scrapes in a virtual machine; make test has a short one.
soak: $(VENV)/installed-dev
	SOAK_SECONDS=3600 $(BIN)/python -m pytest tests/kernel -k soak $(ARGS)

# What it all costs, into docs/performance.*: the kernel's half in virtual machines.
bench: $(VENV)/installed-dev
	$(BIN)/python bench/run.py $(ARGS)

# Twelve minutes on one core; what it finds it leaves in tests/seeds.
fuzz: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	for target in rows stderr config web_config; do \
	    $(BIN)/python tests/fuzz.py $$target $(FUZZ_SECONDS) || exit 1; \
	done

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/kernel/conftest.py

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The pictures in docs/, by the tests that look at the page in a browser.
.PHONY: screenshots
screenshots: $(VENV)/installed-dev
	DTRACE_EXPORTER_SCREENSHOTS=docs/screenshots $(BIN)/python -m pytest tests/test_page.py $(ARGS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) is too old: name Python 3.11 or newer, as make PYTHON=python3.12 run" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "trying to install what python3 -m venv needs"; \
	    apt-get install --yes python3-venv && $(PYTHON) -m venv $(VENV); }

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[auth,dev]'
	touch $@

$(VENV)-lowest/installed: $(VENV)/bin/python pyproject.toml tests/lowest.py
	$(BIN)/python -m venv --clear $(VENV)-lowest
	$(BIN)/python tests/lowest.py >$(VENV)-lowest/constraints
	$(VENV)-lowest/bin/python -m pip install --quiet --constraint=$(VENV)-lowest/constraints \
	    --editable '.[auth]' hypothesis pytest pytest-asyncio trustme
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
