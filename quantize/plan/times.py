"""The time of a conversion on a machine, from its stages at measured speeds and from the devices that they share.

While a layer is computed, the next one is read and the last two are written, so the slowest stage sets the pace. Copies
run in parallel. A disk or a network that several stages share limits them all together. The stages come from
convert.engine, and the speeds from plan.measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from .machines import Machine
from .measured import CPU_RATES, GPU_RATES, Rates
from .work import LayerWork, Work

SLOTS = 2  # layers on the device: one in use, one on its way
WRITERS = 2  # shards of one process on their way to the disk


@dataclass(frozen=True)
class Times:
    """Seconds of a conversion. Stages that run in parallel have their own seconds each.

    Attributes:
        start_seconds: of the process before it converts.
        read_seconds: of the decoder's layers, by each process.
        forward_seconds: of the calibration through all layers.
        quantize_seconds: of the matrices.
        write_seconds: of the layers' shards.
        copy_seconds: of the rest of the model.
        disk_seconds: of all reads and writes of the disk.
        network_seconds: of all transfers over the network.
        conversion_seconds: from the first header to the last byte, with overlapping stages, as `convert` reports it.
        bound_by: the stage or device that takes longest.
    """

    start_seconds: float
    read_seconds: float
    forward_seconds: float
    quantize_seconds: float
    write_seconds: float
    copy_seconds: float
    disk_seconds: float
    network_seconds: float
    conversion_seconds: float
    bound_by: str

    @property
    def total_seconds(self) -> float:
        """Of the complete process."""
        return self.start_seconds + self.conversion_seconds


@dataclass(frozen=True)
class _Stages:
    """Seconds of each layer in each stage, and the arrival of each layer's files."""

    arrivals: Sequence[float]
    reads: Sequence[float]
    forwards: Sequence[float]
    quantizes: Sequence[float]
    writes: Sequence[float]

    @property
    def computes(self) -> list[float]:
        return [forward + quantize for forward, quantize in zip(self.forwards, self.quantizes, strict=True)]


def forecast_times(work: Work, quantizer: str, machine: Machine) -> Times:
    """The time of a conversion.

    Args:
        quantizer: its name. Groups that are solved on the quantized path have operations of their own.
    """
    rates = CPU_RATES if machine.gpu is None else GPU_RATES
    stages = _stages(work, quantizer, machine, rates)
    begin = rates.begin_seconds.value
    lanes = {
        "reading": sum(stages.reads),
        "computing": sum(stages.computes),
        "writing": sum(stages.writes),
        "copying": work.copied_bytes / min(rates.copy_bytes.value, machine.disk.read_bytes),
        "the disk": _disk_seconds(work, machine),
        "the network": sum(work.shards.values()) / machine.network_bytes if machine.network_bytes else 0.0,
    }
    in_turn = pipeline_seconds(
        stages.arrivals,
        stages.reads,
        stages.computes,
        stages.writes,
        begin=begin,
        ready=begin + rates.build_seconds.value,
        on_their_way=WRITERS * machine.count,
    )
    shared = (lanes["copying"], lanes["the disk"], lanes["the network"])
    return Times(
        rates.start_seconds.value,
        lanes["reading"],
        sum(stages.forwards),
        sum(stages.quantizes),
        lanes["writing"],
        *shared,
        conversion_seconds=max(in_turn, begin + max(shared)),
        bound_by=max(lanes, key=lambda name: lanes[name]),
    )


def pipeline_seconds(
    arrivals: Sequence[float],
    reads: Sequence[float],
    computes: Sequence[float],
    writes: Sequence[float],
    *,
    begin: float = 0.0,
    ready: float = 0.0,
    on_their_way: int = WRITERS,
) -> float:
    """The end of the last layer's write, if each stage has one layer at a time and passes it to the next.

    Args:
        arrivals, reads, computes, writes: of each layer, in the order of the walk: the time at which it can be read,
            and the duration of each stage.
        begin: time at which reading begins.
        ready: time at which computing can begin.
        on_their_way: layers that may wait for the end of their write. The next one waits on the device.
    """
    read, computed, written = begin, [ready], [0.0]  # the first element stands for what was before the first layer
    for at in range(len(reads)):
        slot_free = computed[at + 1 - SLOTS] if at >= SLOTS else 0.0
        read = max(read, slot_free, arrivals[at]) + reads[at]
        room = written[at + 1 - on_their_way] if at >= on_their_way else 0.0
        computed.append(max(max(read, computed[-1]) + computes[at], room))
        written.append(max(computed[-1], written[-1]) + writes[at])
    return max(written[-1], ready)


def _stages(work: Work, quantizer: str, machine: Machine, rates: Rates) -> _Stages:
    """With calibration every process walks all layers, with its share of samples and matrices. Without it each
    process has its share of the layers."""
    ranks, speed, disk = machine.count, machine.speed, machine.disk
    layers = work.layers if work.samples else work.layers[::ranks]
    sharing = ranks if work.samples else 1
    known = rates.quantize
    elements = (known[quantizer] if quantizer in known else min(known.values(), key=lambda rate: rate.value)).value
    source = machine.network_bytes if machine.low_disk and machine.network_bytes else disk.read_bytes
    read_bytes = min(rates.read_bytes.value, source / ranks)
    write_bytes = min(WRITERS * ranks * rates.write_bytes.value, disk.write_bytes) / (1 if work.samples else ranks)
    return _Stages(
        _arrivals(work, layers, machine),
        [layer.read_bytes / read_bytes for layer in layers],
        [_forward_seconds(work, layer, machine, rates) for layer in layers],
        [_quantize_seconds(layer, elements * speed * sharing, rates.solve_flop.value * speed) for layer in layers],
        [layer.written_bytes / write_bytes for layer in layers],
    )


def _quantize_seconds(layer: LayerWork, elements: float, solve_flop: float) -> float:
    """Of one layer. Every process solves all groups, and shares the others.

    Args:
        elements, solve_flop: a second.
    """
    return layer.elements / elements if not layer.solve_flop else layer.solve_flop / solve_flop


def _forward_seconds(work: Work, layer: LayerWork, machine: Machine, rates: Rates) -> float:
    """Of one layer on one of the processes: the GPU's time, or that of the launches if it is longer. Then the second
    moments of inputs."""
    sequences = ceil(work.samples / machine.count)
    batches = ceil(sequences / work.batch_size)
    flop = sequences * (layer.linear_flop * work.sequence_length + layer.attention_flop)
    once = max(batches * rates.call_seconds.value, flop / (rates.flop.value * machine.speed))
    moments = sequences * work.sequence_length * layer.moment_flop / (rates.moment_flop.value * machine.speed)
    return layer.passes * once + moments


def _arrivals(work: Work, layers: Sequence[LayerWork], machine: Machine) -> list[float]:
    """The times at which the files of each layer have been downloaded, in the order of need, or 0 without downloads and
    with reads by ranges."""
    if not machine.network_bytes or machine.low_disk:
        return [0.0] * len(layers)
    come: dict[str, float] = {}
    seconds = 0.0
    for file in (*work.outer_files, *(file for layer in layers for file in layer.files)):
        if file not in come:
            seconds += work.shards[file] / machine.network_bytes
            come[file] = seconds
    return [max(come[file] for file in (*work.outer_files, *layer.files)) for layer in layers]


def _disk_seconds(work: Work, machine: Machine) -> float:
    """Of all reads and writes of the disk: the source by each process that walks it, the output, and the kept files of
    a source on the Hub."""
    disk = machine.disk
    times = machine.count if work.samples else 1
    read = times * work.layer_bytes + work.copied_bytes
    kept = 0
    if machine.network_bytes:
        kept = work.outer_bytes if machine.low_disk else work.source_bytes
        read = kept if machine.low_disk else read
    return read / disk.read_bytes + (kept + work.written_bytes) / disk.write_bytes


def disk_bytes(work: Work, machine: Machine) -> int:
    """Bytes that must be free: those of the output, and of the kept files of a source on the Hub."""
    if not machine.network_bytes:
        return work.written_bytes
    return work.written_bytes + (work.outer_bytes if machine.low_disk else sum(work.shards.values()))
