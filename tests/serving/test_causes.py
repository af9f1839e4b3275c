"""A failed start's log gives its root cause, in logs of real failures (vLLM 0.32.0, shortened)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from nvquant.serving.causes import MOST_CHARACTERS, root_cause
from nvquant.serving.faults import START_FAILURES, hint_for

LOGS = Path(__file__).parent / "logs"

# Log, how its root cause begins, and a word of the hint.
FAILURES = {
    "no-plugin-multiprocess": (
        "ValueError: Failed to find a kernel that can implement the NVFP4 linear layer. Reasons:",
        "integrations/vllm_cpu",
    ),
    "no-plugin-weight-only": (
        "ValueError: Forced NVFP4 kernel MarlinNvFp4LinearKernel is not supported: Marlin FP4 not available",
        "Marlin",
    ),
    "missing-scale": (
        "ValueError: Following weights were not initialized from checkpoint: "
        "{'model.layers.1.mlp.down_proj.weight_scale'}",
        "lacks",
    ),
    "truncated-shard": ("SafetensorError: Error while deserializing header", "cut off"),
    "partly-ignored": ("ValueError: Found different quantization schemes for the shards of", "ignore list"),
    "packed-but-ignored": ("ValueError: There is no module or parameter named", "quantized on disk"),
    "context-too-long": (
        "ValidationError: 1 validation error for ModelConfig Value error, User-specified max_model_len (100000)",
        "--max-model-len",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_cause_of_a_failed_start_is_found_and_has_a_hint(name: str) -> None:
    beginning, word = FAILURES[name]
    cause = root_cause((LOGS / f"{name}.log").read_text())
    assert cause is not None
    assert cause.startswith(beginning)
    assert len(cause) <= MOST_CHARACTERS + 2
    hint = hint_for(cause)
    assert hint is not None and word in hint.hint


@pytest.mark.parametrize("name", ["w4a4-multiprocess", "weight-only"])
def test_a_good_start_has_no_cause(name: str) -> None:
    assert root_cause((LOGS / f"{name}.log").read_text()) is None


def test_an_error_without_words_is_told_by_the_function_that_raised_it() -> None:
    log = (
        "(EngineCore pid=1) ERROR 11-26 10:00:00 [core.py:1] Traceback (most recent call last):\n"
        '(EngineCore pid=1) ERROR 11-26 10:00:00 [core.py:1]   File "/x/modelopt.py", line 9, in tie_weights\n'
        "(EngineCore pid=1) ERROR 11-26 10:00:00 [core.py:1]     raise NotImplementedError\n"
        "(EngineCore pid=1) ERROR 11-26 10:00:00 [core.py:1] NotImplementedError\n"
    )
    cause = root_cause(log)
    assert cause == "NotImplementedError in tie_weights"
    hint = hint_for(cause)
    assert hint is not None and hint.source == "issue 48238"


def test_the_workers_error_counts_before_the_engines() -> None:
    log = (
        "(Worker_TP0 pid=1) ERROR 11-26 10:00:00 [w.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried\n"
        "(EngineCore pid=2) ERROR 11-26 10:00:01 [core.py:1] ValueError: something that follows from it\n"
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
    )
    cause = root_cause(log)
    assert cause == "OutOfMemoryError: CUDA out of memory. Tried"
    hint = hint_for(cause)
    assert hint is not None and "--tensor-parallel" in hint.hint


def test_an_unknown_flag_is_told() -> None:
    cause = root_cause("usage: api_server.py [-h]\napi_server.py: error: unrecognized arguments: --no-such-flag=1\n")
    assert cause is not None and "--no-such-flag" in cause
    hint = hint_for(cause)
    assert hint is not None and "--vllm-flag" in hint.hint


def test_every_failure_has_a_pattern_a_hint_and_a_source() -> None:
    for failure in START_FAILURES:
        re.compile(failure.pattern)
        assert failure.hint and not failure.hint.endswith(".") and failure.source


def test_no_failure_hides_another() -> None:
    # A text that only the later pattern was written for must not be caught by an earlier one.
    texts = {
        "Failed to find a kernel that can implement the NVFP4 linear layer. Reasons: A: needs SM100": "reasons",
        "There is no module or parameter named 'layers.3.mlp.down_proj.weight' in LlamaModel.": "unquantized",
        "KeyError: There is no module or parameter named 'lm_head.input_scale'": "builds it unquantized",
        "ValueError: No available memory for the cache blocks. Try increasing": "leave no room",
        "ValueError: Free memory on device cuda:0 (3/79 GiB) on startup is less than desired GPU memory utilization": (
            "another program"
        ),
    }
    for text, word in texts.items():
        hint = hint_for(text)
        assert hint is not None and word in hint.hint, text
