# `make help` lists the targets. Needs Python 3.11 or later; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
LOCAL := $(VENV)/.installed-local
DEV := $(VENV)/.installed-dev
CHECKOV := $(VENV)/checkov
.DEFAULT_GOAL := help

.PHONY: help
help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(LOCAL)  ## Start the whole system, ask two questions about a picture, stop it. IMAGE=FILE asks about another.
	@$(BIN)/internvl demo $(if $(IMAGE),--image "$(IMAGE)")

.PHONY: up
up: $(LOCAL)  ## Run the whole system until Ctrl-C: make up MODEL=DIR.
	@$(BIN)/internvl up --model "$(or $(MODEL),$(error say which checkpoint: make up MODEL=DIR))"

.PHONY: setup
setup: $(DEV)  ## Make the virtual environment with everything that development needs.

.PHONY: test
test: lint manifests  ## Run everything that must hold.
	$(BIN)/pytest

.PHONY: lint
lint: $(DEV)  ## Check style, types, import contracts and protos.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos

# Processor limits would throttle what waits for nobody; a container's health is for the orchestrator to ask; the base
# image's tag is an argument, which the checker does not follow.
SKIPPED_CHECKS := CKV_K8S_11,CKV_DOCKER_2,CKV_DOCKER_7

.PHONY: manifests
manifests: $(if $(shell command -v kubectl),$(CHECKOV)/.installed)  ## Check manifests and Dockerfiles for unsafe settings.
ifeq ($(shell command -v kubectl),)
	@echo "kubectl is not on this machine: the manifests are not checked"
else
	@mkdir -p $(CHECKOV)/rendered
	@for overlay in prod prod-large; do \
	  kubectl kustomize deploy/kustomize/overlays/$$overlay > $(CHECKOV)/rendered/$$overlay.yaml || exit 1; done
	$(CHECKOV)/bin/checkov -d $(CHECKOV)/rendered -d deploy/docker --framework kubernetes dockerfile \
	  --skip-check $(SKIPPED_CHECKS) --skip-download --quiet --compact
endif

.PHONY: format
format: $(DEV)  ## Put the code into shape.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: protos
protos: $(DEV)  ## Generate the stubs from the protos.
	$(BIN)/python protos/generate.py

.PHONY: clean
clean:  ## Remove the virtual environment and every cache.
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	@echo "==> Making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch on its own first: it is by far the largest, and its version decides what the rest may be.
$(LOCAL): pyproject.toml constraints.txt hatch_build.py $(wildcard shared/native/*.[ch] shared/native/build.py) | $(BIN)/python
	@echo "==> Installing torch (the largest part; some minutes on a slow line)"
	@$(PIP) torch==2.13.0
	@echo "==> Installing the project and what it needs to run"
	@$(PIP) -e '.[local]'
	@touch $@

# In an environment of its own: it pins half of what the services use, in other versions.
$(CHECKOV)/.installed: | $(BIN)/python
	@echo "==> Installing the checker of manifests"
	@$(PYTHON) -m venv $(CHECKOV)
	@$(CHECKOV)/bin/python -m pip install --quiet --disable-pip-version-check checkov==3.3.30
	@touch $@

$(DEV): pyproject.toml constraints.txt $(LOCAL)
	@echo "==> Installing the tools of development"
	@$(PIP) -e '.[dev]'
	@touch $@
