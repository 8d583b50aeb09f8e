# Two commands matter: `make demo` and `make test`. `make help` names the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
CACHE ?= $(or $(DISTILL_CACHE),$(HOME)/.cache/distillation-operator)
export DISTILL_CACHE := $(CACHE)
OPERATOR_PYTHON := operator/.venv/bin/python
WORKERS_PYTHON := workers/.venv/bin/python
export PATH := $(CACHE)/bin:$(PATH)
# A machine may forbid bytecode; recompiling torch and SGLang in every process costs a factor of two.
unexport PYTHONDONTWRITEBYTECODE
unexport PYTHONPATH

.PHONY: help
help: ## Name the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

.PHONY: demo
# The clock of everything that the demo prints, the setup before it included.
demo: export DISTILL_STARTED := $(shell date +%s.%N)
demo: setup tools models ## Embedded Kubernetes, KubeRay, the operator, one real distillation; prints what it reached
	@$(OPERATOR_PYTHON) dev/demo.py

.PHONY: setup
setup: ## Debian packages and one virtual environment per folder (nothing to do when up to date)
	@dev/setup.sh

.PHONY: tools
tools: ## Kubernetes, KubeRay, Helm and CoreDNS from Go modules, cached
	@dev/tools.sh

.PHONY: models
models: setup ## The small models and data of the examples, cached
	@$(WORKERS_PYTHON) dev/models/arithmetic.py
	@$(WORKERS_PYTHON) dev/models/calculator.py
	@$(WORKERS_PYTHON) dev/models/smollm2.py

.PHONY: crds
crds: setup ## Generate the CRDs, their copies in the chart, the references and the chart's rules
	@$(OPERATOR_PYTHON) -m distill_api.generate.crd crds
	@mkdir -p charts/distillation-operator/files/crds && cp crds/*.yaml charts/distillation-operator/files/crds/
	@$(OPERATOR_PYTHON) -m distill_api.generate.docs docs/api.md
	@$(OPERATOR_PYTHON) dev/chart_readme.py > charts/distillation-operator/README.md
	@$(OPERATOR_PYTHON) -m distill_api.generate.metrics_docs docs/metrics.md
	@$(OPERATOR_PYTHON) -m distill_cli.reference docs/cli.md
	@$(OPERATOR_PYTHON) -m distill_operator.chart_rules > charts/distillation-operator/templates/_rules.tpl

.PHONY: dashboards
dashboards: setup ## Generate the Grafana dashboards from dev/dashboards
	@$(OPERATOR_PYTHON) dev/dashboards/generate.py charts/distillation-operator/files/dashboards

.PHONY: lock
lock: ## Make the hashed locks from pyproject.toml again (dev/lock.sh --upgrade: the newest versions)
	@dev/lock.sh

.PHONY: docs
docs: setup ## The documentation as a site, in build/site
	@operator/.venv/bin/mkdocs build --strict --quiet && echo build/site/index.html

.PHONY: images
images: setup ## Both images; REGISTRY=... builds and pushes those of a release, GPU=1 builds the workers' for GPUs
	@dev/images.sh all

.PHONY: install
install: tools ## Install the chart into CONTEXT=... (REGISTRY=... as for images)
	@dev/install.sh

.PHONY: cluster-up
cluster-up: setup tools ## The embedded Kubernetes
	@dev/cluster/up.sh

.PHONY: cluster-down
cluster-down: ## Stop the embedded Kubernetes; leaves no process, mount or interface
	@dev/cluster/prometheus.sh stop
	@dev/cluster/down.sh

.PHONY: lint
lint: setup ## ruff, mypy, import contracts
	@operator/.venv/bin/ruff check . && operator/.venv/bin/ruff format --check .
	@operator/.venv/bin/mypy crds/distill_api operator/distill_operator
	@workers/.venv/bin/mypy workers/distill_workers cli/distill_cli
	@PYTHONPATH=crds:operator:cli:workers operator/.venv/bin/lint-imports

.PHONY: test
test: setup tools ## Every layer, cheap ones first
	@dev/test.sh lint unit api chart workers e2e

.PHONY: soak
soak: setup tools models ## What needs hours: lives, manifests, seeds, kills (SOAK_MINUTES=120, SOAK_RUNS, SOAK_SEED)
	@dev/soak.sh

.PHONY: bench
bench: setup ## Every benchmark beside its peer (BENCH=name for one)
	@dev/bench.sh $(BENCH)

# Not a part of `make test`: it needs a GPU, and is skipped without. Another PyTorch than workers/.venv's: docs/guides/first-gpu-run.md.
.PHONY: test-gpu
test-gpu: setup ## What one GPU can show; table and JSON in build/gpu
	@$(WORKERS_PYTHON) -W ignore tests/gpu/run.py

.PHONY: test-unit test-api test-workers test-chart test-e2e test-isa
test-unit test-api test-workers test-chart test-e2e test-isa: test-%: setup tools ## One layer; isa: numbers on other processors
	@dev/test.sh $*
