"""The known faults of servers that apply to a checkpoint on a server."""

from __future__ import annotations

from ..recipe.heads import is_tied
from ..recipe.roles import Role, text_config
from ..serving.faults import Situation, known_faults
from ..serving.log import LogFacts
from ..serving.machine import gpus
from ..serving.server import ServeOptions
from .served_arithmetic import stored_arithmetics
from .subject import Subject


def hints_of(
    subject: Subject, options: ServeOptions, facts: LogFacts, is_cpu: bool, capability: tuple[int, int] | None
) -> list[str]:
    """A sentence for each known fault, with its source.

    Args:
        is_cpu: whether the server computes on a CPU.
        capability: of the GPU. None for this machine's own.
    """
    situation = Situation(
        vllm=facts.version,
        capability=_capability(options, is_cpu, capability),
        is_cpu=is_cpu,
        model_type=str(text_config(subject.config).get("model_type") or ""),
        layout=subject.layout.name,
        arithmetics=stored_arithmetics(subject),
        is_tied=is_tied(subject.config),
        has_experts=Role.EXPERT in set(subject.roles.values()),
        kv_cache_dtype=options.kv_cache_dtype,
        columns_per_rank=frozenset(
            matrix.cols // (options.tensor_parallel if module.endswith(("o_proj", "down_proj")) else 1)
            for module, matrix in subject.sound.items()
        ),
        kernel=facts.kernels[0].name if facts.kernels else None,
    )
    return [f"{fault.hint} ({fault.source})" for fault in known_faults(situation)]


def _capability(options: ServeOptions, is_cpu: bool, capability: tuple[int, int] | None) -> tuple[int, int] | None:
    if capability is not None or options.url is not None or is_cpu:
        return capability
    return next((gpu.capability for gpu in gpus()), None)
