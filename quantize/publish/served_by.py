"""Serving of a checkpoint by kind of GPU: the command, the behaviour of NVFP4, and known faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..bench.subject import open_subject
from ..quoting import shell
from ..report.parts import Column, Table
from ..report.words import ABSENT
from ..serving.command import PINNED_VLLM, SERVER_MODULE
from ..serving.faults import KNOWN_FAULTS, KnownFault, Situation, version_key
from ..serving.machine import FP4_WORDS, Capability, fp4_kind, generation

# What each kind of arithmetic runs on, with examples; a compute capability of each generation.
GPUS: tuple[tuple[str, tuple[Capability | None, ...]], ...] = (
    ("B200, B300, RTX PRO 6000, RTX 50, GB10", ((10, 0), (12, 0))),
    ("H100, H200, L40S, RTX 40, A100, T4", ((9, 0), (8, 9), (8, 0), (7, 5))),
    (ABSENT, (None,)),
)
OLDEST_TRIED = "0.24.0"  # faults that are older than this are not worth a reader's time


def hardware_table() -> Table:
    """A table of vLLM's behaviour with NVFP4 on each kind of GPU."""
    lines = [(_names(capabilities), examples, FP4_WORDS[fp4_kind(capabilities[0])]) for examples, capabilities in GPUS]
    columns = (Column("GPU", "text"), Column("such as", "text"), Column("behaviour of NVFP4", "text"))
    return Table("NVFP4 by GPU", columns, tuple(lines))


def serve_command(repo: str) -> str:
    """The command for a machine with a GPU, of whatever kind: vLLM chooses the kernel that it has for it."""
    return shell(["vllm", "serve", repo])


def cpu_command(repo: str) -> str:
    """The command for vLLM's CPU build, whose own script does not start."""
    words = ["python", "-m", SERVER_MODULE, "--model", repo, "--enforce-eager", "--max-model-len", "4096"]
    return f"VLLM_CPU_KVCACHE_SPACE=1 {shell(words)}"


def faults_table(folder: Path, kv_cache_dtype: str) -> Table | None:
    """A table of known faults that affect this checkpoint in some versions of vLLM on some GPUs. None without any.

    Args:
        kv_cache_dtype: vLLM's name.
    """
    subject = open_subject(folder)
    situations = {
        _short(capability): replace(subject.situation(None, capability, capability is None, kv_cache_dtype), vllm=None)
        for _, capabilities in GPUS
        for capability in capabilities
    }
    lines = [
        (fault.hint.replace("--vllm-flag=", ""), ", ".join(kinds), _versions(fault), fault.source)
        for fault in KNOWN_FAULTS
        if (kinds := list(_concerned(fault, situations)))
    ]
    columns = (Column("fault", "text"), Column("GPU", "text"), Column("vLLM", "text"), Column("source", "text"))
    return Table("Known faults that affect this checkpoint", columns, tuple(lines)) if lines else None


def versions_sentence() -> str:
    """A sentence on the tested versions of vLLM."""
    return f"Tested with vLLM {OLDEST_TRIED} to {PINNED_VLLM}, the newest version that this nvquant knows."


def _concerned(fault: KnownFault, situations: dict[str, Situation]) -> Iterator[str]:
    fixed = version_key(fault.fixed_in)
    if fixed is not None and fixed <= (version_key(OLDEST_TRIED) or ()):
        return
    yield from (name for name, situation in situations.items() if fault.applies(situation))


def _versions(fault: KnownFault) -> str:
    since = f"from {fault.since} on" if fault.since else ""
    fixed = f"before {fault.fixed_in}" if fault.fixed_in else ""
    return ", ".join(part for part in (since, fixed) if part) or "any"


def _names(capabilities: tuple[Capability | None, ...]) -> str:
    return ", ".join(dict.fromkeys("CPU" if each is None else generation(each) for each in capabilities))


def _short(capability: Capability | None) -> str:
    return "CPU" if capability is None else f"{generation(capability)} ({capability[0]}.{capability[1]})"
