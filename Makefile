# `make test` is the whole gate, from nothing installed. Everything lives in .venv, vibe/ and run/.
PYTHON := .venv/bin/python

.PHONY: help test lint format run stop clean venv demo pin-digests

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

test: lint demo
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
	rm -rf .venv run vibe/demo vibe/.demo.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
