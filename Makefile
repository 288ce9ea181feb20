# `make test` is the whole gate, from nothing installed. Everything lives in .venv, vibe/, run/ and tests/clients/.
PYTHON := .venv/bin/python
NODE_MODULES := tests/clients/node_modules

.PHONY: help test lint format run stop clean venv demo clients pin-digests

help:
	@echo "make test     lint, types and tests (makes .venv and the demo model first)"
	@echo "make lint     ruff and mypy only"
	@echo "make format   let ruff format and mend what it can"
	@echo "make run      ./deploy.sh development"
	@echo "make stop     ./deploy.sh stop"
	@echo "make pin-digests  write what their registries say now behind the names of images"
	@echo "make clean    stop, and remove everything that was made here but .env"

venv:
	@./deploy.sh venv --dev

demo: venv
	@$(PYTHON) tools/prepare_demo_avibe.py

lint: venv
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# The test that needs it skips without it: a machine without Node, or a registry that is down, stops nothing.
clients: $(NODE_MODULES)

$(NODE_MODULES): tests/clients/package-lock.json
	@if ! command -v npm >/dev/null; then echo "npm is not installed: OpenAI's client for Node is not tested"; \
	elif ! npm ci --prefix tests/clients --ignore-scripts --no-audit --no-fund --loglevel error; then \
		echo "Warning: npm could not install OpenAI's client for Node, which is not tested"; \
	else touch $@; fi

test: lint demo clients
	$(PYTHON) -m pytest

format: venv
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

run:
	@./deploy.sh development

stop:
	@./deploy.sh stop

pin-digests:
	@$(PYTHON) tools/pin_digests.py

clean: stop
	rm -rf .venv run $(NODE_MODULES) vibe/demo vibe/.demo.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
