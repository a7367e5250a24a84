# make run, make test: all set-up included. make lint: what has to be clean before a commit, and is
# looked at then where pre-commit(1) has been installed for it: pre-commit install.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

FUZZ_SECONDS ?= 180

# A half-made environment must not be taken for a whole one at the next try.
.DELETE_ON_ERROR:

.PHONY: run test unit lowest coverage kernel soak bench fuzz dist release lint format clean

# Who has a checkout decides what it runs, so its files may as well be his.
run: $(VENV)/installed
	$(BIN)/dtrace-exporter --allow-insecure-files --config.file=config/dtrace_exporter.yml $(ARGS)

# Unit tests, then a real DTrace in virtual machines, each case once on the kernels that matter to it.
test: unit
	$(BIN)/python -m pytest tests/kernel $(ARGS)

# On as many processors as there are, and one more: a test waits more than it computes. Packages are
# built once, for the tests that are a group. A test that hangs fails after 20 minutes.
unit: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses=$$(($$(nproc) + 1)) --dist=loadgroup --timeout=1200 \
	    --ignore=tests/kernel $(ARGS)

# What others send us, with the lowest versions that pyproject.toml permits.
lowest: $(VENV)-lowest/installed
	$(VENV)-lowest/bin/python -m pytest $(ARGS) $(addprefix tests/test_, hostile.py access.py auth.py \
	    config.py web.py web_config.py web_properties.py exposition.py negotiation.py paths.py \
	    certificates.py collector.py sock_diag.py)

# How much of the package its quick tests run, which may not become less: pyproject.toml says how much.
coverage: $(VENV)/installed-dev
	$(BIN)/python -m coverage run -m pytest --quiet $(ARGS) $(addprefix tests/test_, \
	    accounts.py audit.py btf.py collector.py config.py diagnostics.py dtrace.py \
	    exactness.py exposition.py extras.py families.py heartbeat.py kernel_facts.py lines.py \
	    log.py negotiation.py netstat.py notify.py owners.py paths.py process.py program.py \
	    rows.py sampling.py script_config.py script_metrics.py scripts_reader.py \
	    scripts_rendering.py scripts_rows.py senders.py session.py sockets.py source.py \
	    series.py tally.py top.py uprobes.py views.py watched.py web_config.py)
	$(BIN)/python -m coverage report --skip-covered

# Every case on every kernel.
kernel: $(VENV)/installed-dev
	EVERY_KERNEL=1 $(BIN)/python -m pytest tests/kernel $(ARGS)

# An hour of traffic, reloads, kills and scrapes in a virtual machine, and the verdicts of Prometheus
# on ten minutes; make test has short ones.
soak: $(VENV)/installed-dev
	SOAK_SECONDS=3600 $(BIN)/python -m pytest tests/kernel -k 'soak or verdicts' $(ARGS)

# What it all costs, into docs/performance.*: the kernel's half in virtual machines.
bench: $(VENV)/installed-dev
	$(BIN)/python bench/run.py $(ARGS)

# Twelve minutes on one core; what it finds it leaves in tests/seeds.
fuzz: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	for target in rows stderr config web_config; do \
	    $(BIN)/python tests/fuzz.py $$target $(FUZZ_SECONDS) || exit 1; \
	done

# All kinds of packages that this machine has the tools for, into dist/.
dist: $(VENV)/installed-dev
	$(BIN)/python packages/distribution.py $(ARGS)

# What is in place for a release is looked at first; `packages/release.py date` dates the changelog.
release: $(VENV)/installed-dev
	$(BIN)/python packages/release.py check
	.ci/run
	$(MAKE) dist
	$(BIN)/python packages/release.py tag

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
	    echo "$(PYTHON) is missing or too old: name Python 3.11 or newer, as make PYTHON=python3.12 run" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "trying to install what python3 -m venv needs"; \
	    apt-get install --yes python3-venv && $(PYTHON) -m venv $(VENV); }

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed constraints.txt
	$(BIN)/python -m pip install --quiet --constraint=constraints.txt --editable '.[auth,dev]'
	touch $@

$(VENV)-lowest/installed: $(VENV)/bin/python pyproject.toml constraints.txt tests/lowest.py
	$(BIN)/python -m venv --clear $(VENV)-lowest
	$(BIN)/python tests/lowest.py >$(VENV)-lowest/constraints
	$(VENV)-lowest/bin/python -m pip install --quiet --constraint=$(VENV)-lowest/constraints \
	    --editable '.[auth]' hypothesis pytest pytest-asyncio trustme
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
