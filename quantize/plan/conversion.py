"""The needs of a conversion on a named machine: time, memory, disk and money."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from .forecast import Memory, fixed_memory, forecast_memory
from .machines import Machine
from .plan import Plan
from .times import Times, disk_bytes, forecast_times
from .work import Work, measure_work

SHARE_FOR_LAYERS = 0.9  # of a GPU's memory; the rest is CUDA's own and what cannot be used in small pieces


@dataclass(frozen=True)
class Conversion:
    """The forecast of a conversion.

    Attributes:
        memory: of the host, all processes together, and of each GPU. Hidden states that do not fit the GPU are on the
            host (the run itself puts them into a file if they do not fit the host either).
        fits: whether two layers and a batch fit the GPU.
        disk_bytes: free space that the run requires at the beginning.
        cost_usd: None without a price.
    """

    machine: Machine
    work: Work
    times: Times
    memory: Memory
    fits: bool
    disk_bytes: int
    cost_usd: float | None


def forecast_conversion(
    plan: Plan,
    machine: Machine,
    samples: int,
    sequence_length: int,
    batch_size: int = 1,
    usd_per_hour: float | None = None,
) -> Conversion:
    """Forecast the conversion that a plan describes.

    Args:
        samples, sequence_length, batch_size: of the calibration. They are ignored if the recipe has none.
        usd_per_hour: the price of the machine with all its GPUs.
    """
    work = measure_work(plan, samples, sequence_length, batch_size)
    times = forecast_times(work, plan.quantizer, machine)
    memory, fits = _memory(plan, work, machine)
    cost = None if usd_per_hour is None else times.total_seconds / 3600 * usd_per_hour
    return Conversion(machine, work, times, memory, fits, disk_bytes(work, machine), cost)


def _memory(plan: Plan, work: Work, machine: Machine) -> tuple[Memory, bool]:
    """Peak memory, and whether the data that must stay on the GPU fits it."""
    is_gpu, sequences = machine.gpu is not None, ceil(work.samples / machine.count)
    batch_tokens = work.batch_size * work.sequence_length if work.samples else 0
    fixed = fixed_memory(plan, batch_tokens, is_gpu)
    whole = forecast_memory(plan, sequences, work.sequence_length, work.batch_size, is_gpu)
    if not is_gpu:
        return Memory(machine.count * whole.host_bytes, 0), True
    most = int(SHARE_FOR_LAYERS * machine.gpu_bytes)
    gpu = max(fixed.gpu_bytes, min(whole.gpu_bytes, most))
    host = fixed.host_bytes + whole.gpu_bytes - gpu
    return Memory(machine.count * host, gpu), fixed.gpu_bytes <= most


def as_json(conversion: Conversion) -> dict[str, Any]:
    """The object `time` of `plan --json`."""
    machine, work, times = conversion.machine, conversion.work, conversion.times
    return {
        "gpu": machine.gpu,
        "count": machine.count,
        "is_measured": machine.is_measured,
        "disk": asdict(machine.disk),
        "network_bytes": machine.network_bytes,
        "low_disk": machine.low_disk,
        "tokens": work.samples * work.sequence_length,
        "read_bytes": work.source_bytes,
        "written_bytes": work.written_bytes,
        "forward_flop": _forward_flop(work),
        **{key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(times).items()},
        "total_seconds": round(times.total_seconds, 3),
        "memory": asdict(conversion.memory),
        "fits": conversion.fits,
        "disk_bytes": conversion.disk_bytes,
        "cost_usd": None if conversion.cost_usd is None else round(conversion.cost_usd, 4),
    }


def _forward_flop(work: Work) -> int:
    """Operations of the calibration's forward through all layers."""
    flop = sum(layer.linear_flop * work.sequence_length + layer.attention_flop for layer in work.layers)
    return round(work.samples * flop)
