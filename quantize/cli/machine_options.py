"""Options that name a machine to forecast for, and the forecast in words."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..errors import InputError
from ..plan.conversion import Conversion
from ..plan.machines import BF16_TFLOPS, DEFAULT_DISK, DISKS, HUB_BYTES, Disk, Machine, find_gpu
from ..plan.measured import MEASURED_GPU
from .output import Output, gigabytes

F = TypeVar("F", bound=Callable[..., Any])
_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9}


def _rate(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """A rate such as `1.7GB/s` in bytes a second."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]b)/s", value.strip().lower())
    rate = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not rate:
        raise click.BadParameter(f"{value!r} is not a rate. Write it as 1.7GB/s or 100MB/s.", ctx, parameter)
    return rate


def _disk(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Disk | None:
    """A disk by its name, or one that reads and writes at a rate."""
    if value is None or value in DISKS:
        return None if value is None else DISKS[value]
    try:
        rate = _rate(ctx, parameter, value)
    except click.BadParameter as error:
        known = ", ".join(DISKS)
        raise click.BadParameter(
            f"{value!r} is not a disk. Write {known}, or a rate such as 1.7GB/s.", ctx, parameter
        ) from error
    return Disk("", rate or 0.0, rate or 0.0)


def machine_options(function: F) -> F:
    """`--on`, `--disk`, `--network`, `--low-disk`, `--price`."""
    for option in (
        click.option(
            "--price",
            type=click.FloatRange(min=0),
            metavar="USD",
            help="Compute the cost with this price of an hour of the machine.",
        ),
        click.option(
            "--low-disk",
            is_flag=True,
            help="Forecast with convert's --low-disk, which keeps nothing of a MODEL on the Hub.",
        ),
        click.option(
            "--network",
            metavar="RATE",
            callback=_rate,
            help="Assume that the source comes from the Hub at this rate.",
            show_default="100MB/s for a MODEL on the Hub",
        ),
        click.option(
            "--disk",
            metavar="DISK",
            callback=_disk,
            help=f"Assume one of the disks {', '.join(DISKS)}, or a rate such as 1.7GB/s.",
            show_default=DEFAULT_DISK,
        ),
        click.option(
            "--on",
            metavar="GPU",
            help="Forecast time, memory, disk and cost of the conversion on this machine, such as H200, 8xH100 or cpu.",
        ),
    ):
        function = option(function)
    return function


def read_machine(
    on: str | None, disk: Disk | None, network: float | None, low_disk: bool, price: float | None, from_hub: bool
) -> Machine | None:
    """The machine that the options name, or None without --on.

    Args:
        from_hub: whether MODEL is on the Hub.
    Raises:
        InputError: an option has no effect without another one, or contradicts another one.
    """
    given = {"--disk": disk, "--network": network, "--low-disk": low_disk or None, "--price": price}
    if on is None:
        named = [option for option, value in given.items() if value is not None]
        if named:
            raise InputError(f"{named[0]} affects only the forecast of a machine", hint="Name the machine with --on")
        return None
    count, gpu = find_gpu(on)
    if from_hub and network is None:
        network = HUB_BYTES
    if low_disk and network is None:
        raise InputError(
            "--low-disk works only for models on the Hub", where="--low-disk", hint="Give their rate with --network too"
        )
    if low_disk and count > 1:
        raise InputError(
            "every rank would fetch the whole model", where="--low-disk", hint=f"Drop the option, or use one of {on}"
        )
    return Machine(gpu, count, disk or DISKS[DEFAULT_DISK], network, low_disk)


def print_conversion(conversion: Conversion, quantizer: str, price: float | None, out: Output) -> None:
    """The forecast on stdout."""
    machine, work, times = conversion.machine, conversion.work, conversion.times
    tokens = f"{work.samples} x {work.sequence_length} tokens" if work.samples else "no calibration"
    out.tell(f"\nForecast on {machine.words}, {_source_words(machine)}, {tokens}, {quantizer}:\n")
    stages = [("start of the process", times.start_seconds), ("then, in parallel:", None)]
    stages += [(f"  {name}", seconds) for name, seconds in _lanes(conversion).items() if seconds]
    stages += [("total", times.total_seconds)]
    out.table(["stage", "seconds"], [[name, "" if s is None else f"{s:,.1f}"] for name, s in stages])
    cost = "" if conversion.cost_usd is None else f" At {price:g} USD an hour it costs {conversion.cost_usd:.2f} USD."
    out.tell(f"\nThe longest part is {times.bound_by}.{cost}")
    each = "" if machine.count == 1 else " on each"
    out.tell(
        f"The run needs up to {gigabytes(conversion.memory.host_bytes)} of host memory, "
        f"{gigabytes(conversion.memory.gpu_bytes)} of GPU memory{each}, and {gigabytes(conversion.disk_bytes)} of disk."
    )
    if not conversion.fits:
        out.tell(f"It does not fit: one {machine.gpu} cannot hold two layers and a batch.")
    if any(layer.solve_flop for layer in work.layers):
        out.tell(f"The time of {quantizer} assumes rates in float32 that are not measured.")
    if not machine.is_measured:
        out.tell(_not_measured(machine))


def _lanes(conversion: Conversion) -> dict[str, float]:
    """Each part of the parallel work, in its own seconds."""
    times = conversion.times
    return {
        "reading the layers": times.read_seconds,
        "forward": times.forward_seconds,
        "quantizing": times.quantize_seconds,
        "writing the layers": times.write_seconds,
        "copying the rest": times.copy_seconds,
        "the disk, for all of them": times.disk_seconds,
        "the network": times.network_seconds,
    }


def _source_words(machine: Machine) -> str:
    if machine.network_bytes is None:
        return f"the source on the {machine.disk.words}"
    how = "by ranges, output" if machine.low_disk else "cache and output"
    return f"the source from the Hub at {machine.network_bytes / 1e9:.3g} GB/s, {how} on the {machine.disk.words}"


def _not_measured(machine: Machine) -> str:
    if machine.gpu is None or machine.gpu == MEASURED_GPU:
        return "This forecast is not measured. Its constants come from runs of one process."
    rates = f"{BF16_TFLOPS[machine.gpu]:g} and {BF16_TFLOPS[MEASURED_GPU]:g} TFLOP/s"
    several = " Runs of several processes were not measured." if machine.count > 1 else ""
    scaled = f"It scales the runs of an {MEASURED_GPU} by the published BF16 rates ({rates})."
    return f"This forecast is not measured on this GPU. {scaled}{several}"
