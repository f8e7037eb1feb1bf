# Works on a fresh clone with nothing but make and Python >= 3.11. `make` alone lists what there is.
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DRIVER := $(VENV)/.installed-playwright
# The environment of the fake CUDA runtime: torch's CUDA build, some 5 GB. CUDA_PYTHON=… names one that is there already.
CUDA_VENV   := .venv-cuda
CUDA_PYTHON ?= $(CUDA_VENV)/bin/python
FAKE_BUILD  := $(CURDIR)/$(CUDA_VENV)/fakecuda
FAKE        := FAKE_CUDA_BUILD=$(FAKE_BUILD) tests/fakecuda/fakecuda $(CUDA_PYTHON)
FAKE_TESTS  := OMP_NUM_THREADS=1 $(FAKE) -m pytest -n 2 -m gpu --assert=plain
ARGS   ?=
# Two workers of one thread each: a thread that finds the other core busy waits longer than it saves.
WORKERS := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile
LAYERS  := $(BIN)/lint-imports --no-cache --no-logo
# PYTHON=/path/to/python3.12 picks the interpreter that .venv is made from.
PYTHON ?=

NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
STRIP     := $(BIN)/nbstripout --keep-output --keep-count --keep-id \
             --extra-keys "metadata.language_info.version metadata.vscode metadata.colab metadata.accelerator"

# A notebook's `!lowvram …` and its `python3` kernel are then those of .venv, and stdout is left to the commands.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all browser lab lint format gpu-check fake-cuda fake-cuda-build fake-cuda-short forecast-table architectures notebooks coverage dist publish-links clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## the whole story once, on this machine (ARGS=--json for JSON)
	@$(BIN)/lowvram demo $(ARGS)

test: $(STAMP) ## lint, tests with coverage, and every notebook
	$(BIN)/ruff check
	$(LAYERS)
	$(WORKERS) --cov --cov-report=term-missing $(ARGS)
	$(call run_notebooks)

test-all: $(STAMP) $(DRIVER) ## also the slow, network, GPU and browser tests (those this machine can run)
	$(BIN)/ruff check
	$(LAYERS)
	HF_HUB_OFFLINE=0 $(WORKERS) -m "" --cov --cov-report=term-missing $(ARGS)
	$(call run_notebooks)

browser: $(DRIVER) ## the panels in a real browser (needs Chromium: apt-get install chromium)
	$(BIN)/pytest -m browser tests/faces/test_browser.py $(ARGS)

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=notebooks $(ARGS)

lint: $(STAMP) ## ruff and the floors of imports, check only
	$(BIN)/ruff check
	$(LAYERS)
	$(BIN)/ruff format --check

format: $(STAMP) ## ruff, mend in place
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

gpu-check: $(STAMP) ## all that only a CUDA card can answer, in nine minutes, into one JSON
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

fake-cuda: $(FAKE_BUILD)/libcupti.so.13 ## all gpu tests, accuracy and make gpu-check's script on CUDA without a card (tests/fakecuda)
	FAKE_CUDA_ARITHMETIC=1 $(FAKE) tests/fakecuda/check.py
	FAKE_CUDA_ARITHMETIC=1 $(FAKE_TESTS) --cov --cov-config=tests/fakecuda/coveragerc --cov-report= $(ARGS)
	$(CUDA_PYTHON) tests/fakecuda/cuda_lines.py
	for capability in 7.5 8.6 9.0 12.0; do \
	  FAKE_CUDA_CC=$$capability $(FAKE_TESTS) tests/memory/test_attention.py tests/test_cuda.py \
	    -k 'attention or forecast' $(ARGS) || exit 1; \
	done
	$(FAKE) benchmarks/forecast_accuracy.py
	$(FAKE) benchmarks/gpu_check.py --small --parts forecast trace speed offload --output $(FAKE_BUILD)/gpu_check.json

fake-cuda-build: $(FAKE_BUILD)/libcupti.so.13 ## the fake CUDA runtime and its environment alone

fake-cuda-short: $(FAKE_BUILD)/libcupti.so.13 ## the part of fake-cuda that needs no values: bytes, in a few minutes
	$(FAKE) tests/fakecuda/check.py
	$(FAKE_TESTS) -q tests/memory tests/test_cuda.py $(ARGS)

forecast-table: $(FAKE_BUILD)/libcupti.so.13 ## forecast against PyTorch's counters on the fake cards; half an hour, writes data/forecast_table.json
	for capability in 7.5 8.6 9.0 12.0; do \
	  FAKE_CUDA_CC=$$capability OMP_NUM_THREADS=1 $(FAKE) benchmarks/forecast_table.py $(ARGS) || exit 1; \
	done

architectures: $(STAMP) ## every model type of the installed transformers beside stock; writes docs/architectures.md
	LOWVRAM_COMPILE=0 OMP_NUM_THREADS=1 $(BIN)/python -m tests.architectures.sweep --processes 2

notebooks: $(STAMP) ## run the notebooks in place, keeping outputs
	$(if $(NOTEBOOKS),$(BIN)/jupyter nbconvert --to notebook --execute --inplace $(NOTEBOOKS))
	$(if $(NOTEBOOKS),$(STRIP) $(NOTEBOOKS))
	$(if $(NOTEBOOKS),$(BIN)/python -c '$(strip_views)' $(NOTEBOOKS))

coverage: $(STAMP) ## tests with an HTML coverage report in htmlcov/
	$(BIN)/pytest --cov --cov-report=term --cov-report=html $(ARGS)

# The wheel is made from the sdist, in a folder of its own: what an older build/ here holds cannot come in.
dist: $(STAMP) ## build wheel and sdist into dist/
	rm -rf dist
	@$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' >/dev/null
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz
	@ls dist/*

# REPO reaches the script by the environment, as it was typed.
publish-links: $(STAMP) ## write where the notebooks are published: REPO=owner/name, or REPO= for nowhere
	@$(BIN)/python notebooks/publish_links.py $(if $(filter undefined,$(origin REPO)),,"$$REPO")

clean: ## remove caches and reports (.venv stays)
	rm -rf .pytest_cache .ruff_cache .hypothesis .coverage htmlcov build dist
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -print | xargs rm -rf

# nbstripout takes a widget's state away, but leaves a view of it in the output: a reference to nothing.
define strip_views
import sys, nbformat; \
names = sys.argv[1:]; \
books = [nbformat.read(name, 4) for name in names]; \
[out.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None) \
 for book in books for cell in book.cells for out in cell.get("outputs", [])]; \
[nbformat.write(book, name) for book, name in zip(books, names)]
endef

define run_notebooks
	$(if $(NOTEBOOKS),$(BIN)/pytest --nbmake --nbmake-timeout=600 --durations=0 $(NOTEBOOKS),@echo "no notebooks yet")
endef

# The stamp is written last. An install that was killed half-way leaves .venv/.installing behind, and the next run
# starts from an empty .venv; one that pip refused by itself (no network, say) is simply tried again.
works = $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' && $(BIN)/python -m pip --version

$(STAMP): pyproject.toml constraints.txt
	@{ \
	if test -e $(VENV)/.installing || ! { $(works); } >/dev/null 2>&1; then \
	  for py in $(or $(PYTHON),python3 python3.11 python3.12 python3.13 python3.14 python); do \
	    "$$py" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; py=; \
	  done; \
	  test -n "$$py" || { echo "make: found no Python >= 3.11 with venv in: $(or $(PYTHON),PATH); install one or say make PYTHON=/path/to/python3"; exit 1; }; \
	  "$$py" -m venv --clear $(VENV) || exit 1; \
	fi; \
	echo "Installing into $(VENV) (once; a few minutes) ..."; \
	touch $(VENV)/.installing; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[notebook,test,export]'; status=$$?; \
	rm -f $(VENV)/.installing; \
	test $$status -eq 0 || exit $$status; \
	touch $@; \
	} >&2

# torch's CUDA build comes from PyPI alone: another index may hold a build without CUDA under the same version.
$(CUDA_VENV)/.installed: pyproject.toml constraints.txt
	@{ \
	echo "Installing torch's CUDA build into $(CUDA_VENV) (once; 3 GB) ..."; \
	python3 -m venv --clear $(CUDA_VENV) || exit 1; \
	PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= $(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  "$$(grep '^torch==' constraints.txt)" 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*' || exit 1; \
	$(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]' ipywidgets || exit 1; \
	touch $@; \
	} >&2

$(FAKE_BUILD)/libcupti.so.13: $(if $(filter $(CUDA_VENV)/%,$(CUDA_PYTHON)),$(CUDA_VENV)/.installed) \
  $(wildcard tests/fakecuda/src/*) tests/fakecuda/build.sh
	FAKE_CUDA_BUILD=$(FAKE_BUILD) tests/fakecuda/build.sh $(CUDA_PYTHON)

# The `browser` extra. Where it cannot be had the browser test is skipped, and the next run asks for it again.
$(DRIVER): $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt playwright >&2 && touch $@ \
	  || echo "make: could not install playwright" >&2
