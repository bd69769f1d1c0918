# Everything a newcomer needs: `make quickstart` and `make test` set up what they use. CI calls `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Files copied flat into every model repository on the Hub; they are linted as such.
HUB_FILES := modeling_fusedvlm/configuration_fusedvlm.py $(wildcard modeling_fusedvlm/modeling_fusedvlm*.py) \
	$(wildcard processing/processing_fusedvlm*.py) $(wildcard processing/image_processing_*fusedvlm*.py)
PYTEST_ARGS ?=
# vLLM pins older versions of torch and transformers.
VLLM_VENV ?= .venv-vllm
# The oldest versions that pyproject.toml allows of what changes most.
OLDEST_VENV ?= .venv-oldest
OLDEST := "transformers==5.18.*" "huggingface_hub==1.31.*"

.PHONY: help install development quickstart goals test lint types format pytest test-oldest env-vllm test-vllm fuzz mutants env-vlmeval env-lmms docs wheel-smoke stranger bench-guard bench-gpu clean

help:  ## Show this help.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(BIN)/fusedvlm: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.development: pyproject.toml | $(BIN)/fusedvlm
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	$(BIN)/python tests/common/fetch.py  # transformers' own test classes, from its source distribution
	touch $@

install: $(BIN)/fusedvlm  ## Create .venv with the package.

development: $(VENV)/.development  ## The same with what tests and linters need.

quickstart: install  ## Train a small family of variants from scratch on this machine and ask it questions.
	$(BIN)/fusedvlm quickstart $(ARGS)

goals: development  ## Ask the family in FAMILY (runs/quickstart) whether it reached what the quickstart promises.
	FUSEDVLM_FAMILY=$(abspath $(or $(FAMILY),runs/quickstart)) $(BIN)/pytest -n 0 tests/quickstart/goals.py

test: lint pytest  ## Lint and run the whole test suite; what CI runs.

lint: development  ## Check style, formatting and the rules for files that travel to the Hub.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/lint_hub_files.py $(HUB_FILES)
	$(BIN)/python setup.py --quiet links
	$(BIN)/mypy

types: development  ## Check types alone (part of lint; the first run reads torch and transformers and takes a minute).
	$(BIN)/python setup.py --quiet links
	$(BIN)/mypy

format: development  ## Fix style and formatting.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pytest: development  ## Run the tests on all cores.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadscope $(PYTEST_ARGS)

env-vllm:  ## Make an environment for vLLM on CPUs, with this checkout in it, in .venv-vllm (3.5 GB, some minutes).
	PYTHON=$(PYTHON) bash tests/vllm_tier/make_env.sh $(VLLM_VENV)

test-vllm: development  ## Compare vLLM, with our plugin and behind our fusion service, with generate; after make env-vllm.
	test -x $(VLLM_VENV)/bin/vllm || $(MAKE) env-vllm
	$(BIN)/python -m fusedvlm.tests.serving.api_cases build/vllm-case
	FUSEDVLM_VLLM_CASE=$(abspath build/vllm-case) $(VLLM_VENV)/bin/python -m pytest --import-mode=importlib --timeout 1200 tests/vllm_tier/vllm_answers.py

fuzz: development  ## Try 10,000 damaged cases of every kind of input; what fails goes into tests/fuzz/corpus. CASES=100000 tries more.
	OMP_NUM_THREADS=1 FUSEDVLM_FUZZ_CASES=$(or $(CASES),10000) $(BIN)/pytest -n 2 --dist loadfile --durations 8 tests/fuzz

mutants: development  ## Change one line of the library at a time; every change must be noticed by its test. ARGS="--only exif" tries some.
	$(BIN)/python tests/mutants/run_mutants.py $(ARGS)

$(OLDEST_VENV)/.oldest: pyproject.toml
	test -x $(OLDEST_VENV)/bin/python || $(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST_VENV)/bin/python -m pip install --quiet --editable '.[test]' $(OLDEST)
	$(OLDEST_VENV)/bin/python tests/common/fetch.py
	touch $@

test-oldest: $(OLDEST_VENV)/.oldest  ## Run the test suite with the oldest supported transformers, in an environment of its own.
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -n auto --dist loadscope $(PYTEST_ARGS)

bench-guard: development  ## Re-measure the cheap speed ratios and fail when one fell 25 % below its record. ARGS="--slow sweep" shows it fail.
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/guard.py $(ARGS)

bench-gpu: development  ## Measure the paper's size with random weights on this machine's GPU; about 20 minutes, goes on where it was.
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# Layered environments: the tools pin against each other, and against us; each lies over .venv, which stays as it is.
.venv-vlmeval/.ready: pyproject.toml | $(BIN)/fusedvlm
	$(BIN)/python -m venv .venv-vlmeval
	$(BIN)/python tests/evaluation/layer.py .venv-vlmeval
	.venv-vlmeval/bin/python -m pip install --quiet "ms-vlmeval==0.0.20" "rouge_score==0.1.2" "pycocoevalcap==1.2"
	touch $@

env-vlmeval: .venv-vlmeval/.ready development  ## Install VLMEvalKit beside .venv, for `fusedvlm evaluate --harness vlmevalkit`, and compare scores.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 0 tests/evaluation/test_paper_benchmarks.py tests/evaluation/test_harnesses.py

.venv-lmms/.ready: pyproject.toml | $(BIN)/fusedvlm
	$(BIN)/python -m venv .venv-lmms
	$(BIN)/python tests/evaluation/layer.py .venv-lmms
	.venv-lmms/bin/python -m pip install --quiet "lmms-eval==0.7.3"
	touch $@

env-lmms: .venv-lmms/.ready development  ## Install lmms-eval beside .venv, for `fusedvlm evaluate --harness lmms-eval`, and run it.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 0 tests/evaluation/test_harnesses.py

docs: development  ## Build the docs as a site, with the API, in build/site; a warning is an error. ARGS=serve shows them while you write.
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python setup.py --quiet links
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs $(or $(ARGS),build)

wheel-smoke:  ## Build the wheel, install it with all it asks for into an empty environment, and try it there.
	rm -rf build/wheel-smoke build/lib
	$(PYTHON) -m venv build/wheel-smoke/venv
	build/wheel-smoke/venv/bin/python -m pip install --quiet --upgrade pip
	build/wheel-smoke/venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel-smoke .
	build/wheel-smoke/venv/bin/python -m pip install --quiet build/wheel-smoke/*.whl
	cd build/wheel-smoke && venv/bin/python -I ../../tests/wheel_smoke.py

stranger:  ## Follow the README in a fresh clone and a new shell, until the first right answer.
	$(PYTHON) tests/stranger.py

clean:  ## Remove what was built here, but not runs/.
	rm -rf $(VENV) $(OLDEST_VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
