"""Logs of real starts (vLLM 0.32.0 on a CPU, shortened) are understood; lines of GPUs by the formats in its code."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvquant.serving.kernels import kernel_named
from nvquant.serving.log import parse_log, phase_of, read_line

LOGS = Path(__file__).parent / "logs"
WORKER = "(Worker_TP1 pid=812) INFO 11-26 16:58:51 [gpu_model_runner.py:5150] "


def log(name: str) -> str:
    return (LOGS / f"{name}.log").read_text()


def test_facts_of_a_start_with_a_worker_process() -> None:
    facts = parse_log(log("w4a4-multiprocess"))
    assert facts.version == "0.32.0"
    assert [kernel.name for kernel in facts.kernels] == ["CpuNvFp4LinearKernel"]
    assert facts.kernels[0].arithmetic == "w4a4"
    assert facts.kv_tokens == 46592
    assert facts.max_model_len == 512
    assert facts.weights_bytes is None
    assert facts.faults == facts.warnings == ()


def test_facts_of_a_weight_only_start() -> None:
    facts = parse_log(log("weight-only"))
    assert [kernel.arithmetic for kernel in facts.kernels] == ["weight_only"]


def test_facts_that_only_gpus_give() -> None:
    facts = parse_log(
        f"{WORKER}Model loading took 18.71 GiB memory and 12.345678 seconds\n"
        "(Worker_TP0 pid=811) INFO 11-26 16:58:51 [gpu_model_runner.py:5150] Model loading took 18.73 GiB\n"
        f"{WORKER}Using MarlinNvFp4LinearKernel for NVFP4 GEMM\n"
        f"{WORKER}Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN', 'TRITON_ATTN'].\n"
        f"{WORKER}Available KV cache memory: 102.5 GiB\n"
        "(EngineCore pid=9) INFO 11-26 16:58:55 [kv_cache_utils.py:2327] GPU KV cache size: 1,127,291 tokens\n"
        f"{WORKER.replace('INFO', 'WARNING')}Marlin requires thread-tile padding for some weights.\n"
    )
    assert facts.weights_bytes == round(18.73 * 2**30)
    assert facts.kernels == (kernel_named("MarlinNvFp4LinearKernel"),)
    assert facts.attention == "FLASH_ATTN"
    assert facts.kv_bytes == round(102.5 * 2**30)
    assert facts.kv_tokens == 1127291
    assert len(facts.warnings) == 1 and "Marlin" in facts.warnings[0]


def test_a_context_that_vllm_shortened_counts() -> None:
    facts = parse_log(
        "Using max model len 262144\nAuto-fit max_model_len: reduced from 262144 to 71000 to fit in memory\n"
    )
    assert facts.max_model_len == 71000


@pytest.mark.parametrize("kind", ["weight", "input"])
def test_different_global_scales_of_fused_parts_are_a_fault(kind: str) -> None:
    line = (
        f"(Worker pid=1) WARNING 11-26 16:58:51 [a.py:103] In NVFP4 linear, the {kind} global scale is different for x"
    )
    assert kind in parse_log(line).faults[0]


@pytest.mark.parametrize(
    ("raw", "process", "level", "text"),
    [
        ("(EngineCore pid=8380) INFO 11-26 16:58:42 [core.py:133] Hello", "EngineCore", "INFO", "Hello"),
        ("(VllmWorker-0 pid=8420) WARNING 11-26 16:58:51 [vllm.py:725] Hello", "Worker", "WARNING", "Hello"),
        ("\x1b[0;36m(APIServer pid=9)\x1b[0;0m ERROR 11-26 16:58:51 [x.py:7] Hello", "APIServer", "ERROR", "Hello"),
        ("ERROR 07-20 18:15:01 [core.py:586] Hello", "", "ERROR", "Hello"),
        ("a: 10%\ra: 20%", "", "", "a: 20%"),
        ("Hello (Worker pid=1)", "", "", "Hello (Worker pid=1)"),
    ],
)
def test_prefixes_are_stripped(raw: str, process: str, level: str, text: str) -> None:
    line = read_line(raw)
    assert (line.process, line.level, line.text) == (process, level, text)


def test_a_start_goes_through_phases_that_a_user_understands() -> None:
    phases = [phase for line in log("w4a4-multiprocess").splitlines() if (phase := phase_of(line))]
    assert list(dict.fromkeys(phases)) == [
        "reading the configuration",
        "starting the engine",
        "building the model",
        "loading weights 0 %",
        "loading weights 26 %",
        "loading weights 65 %",
        "loading weights 97 %",
        "loading weights 100 %",
        "preparing weights",
        "measuring memory",
        "opening the port",
    ]


def test_phases_of_gpus() -> None:
    assert (
        phase_of("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  42%|####  | 1/3")
        == "capturing CUDA graphs 42 %"
    )
    assert phase_of(
        "(EngineCore pid=1) INFO 11-26 16:58:42 [backends.py:1167] Dynamo bytecode transform time: 3 s"
    ) == ("compiling")
    assert phase_of("INFO:     127.0.0.1 - GET /health") is None
    # What is said of compiling where there is none, is no phase.
    assert phase_of("Enforce eager set, disabling torch.compile, CUDAGraphs") is None


def test_a_kernel_of_another_version_has_words_but_no_arithmetic() -> None:
    kernel = kernel_named("QuantumNvFp4LinearKernel")
    assert kernel.arithmetic is None
    assert "QuantumNvFp4LinearKernel" in kernel.words
