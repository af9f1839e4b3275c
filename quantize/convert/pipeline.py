"""Convert: execute a plan. While a layer is computed the next one is read and the last one written; one layer is in
flight in each stage."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibrate.samples import CalibrationSet
from ..calibrate.skeleton import ATTENTION, build_skeleton
from ..calibrate.walk import Walk
from ..checkpoint.sidefiles import side_files
from ..checkpoint.source import INDEX_NAME, open_checkpoint, tensor_bytes
from ..checkpoint.writer import TensorEntry, write_bytes, write_json, write_shard
from ..errors import CheckFailed, InputError, NvquantError
from ..plan.plan import Plan, PlannedShard
from ..quantizers import get_quantizer
from ..quantizers.base import Quantizer
from ..recipe.roles import text_config
from .config import output_configs
from .manifest import MANIFEST_NAME, run_identity
from .matrices import groups_of_layer, quantize_group
from .memory import give_back_free_memory, peak_gpu_bytes, peak_host_bytes
from .output import check_output, publish, start_partial

log = logging.getLogger("nvquant.convert")

HIDDEN_SHARE_OF_GPU = 0.5


@dataclass(frozen=True)
class ConvertOptions:
    """How to run a conversion.

    Attributes:
        device: `cpu` or `cuda` (with an index if there are several).
        gpu_budget_bytes: how much GPU memory the run may use; None for all that is free.
        progress: called with (layers done, layers in all, phase).
    """

    output: Path
    quantizer: str
    device: str = "cpu"
    batch_size: int = 1
    gpu_budget_bytes: int | None = None
    progress: Callable[[int, int, str], None] = field(default=lambda done, total, phase: None)


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did; the document of `convert --json`."""

    output: str
    tensors: int
    tensor_bytes: int
    quantized: int
    seconds: float
    peak_host_bytes: int
    peak_gpu_bytes: int
    calibration: dict[str, Any] | None
    marlin_flushed_blocks: int

    def as_json(self) -> dict[str, Any]:
        """The document of `convert --json`."""
        return asdict(self)


def convert(plan: Plan, options: ConvertOptions, calibration: CalibrationSet | None) -> ConvertResult:
    """Execute a plan; the output appears under its final name only when it is whole and as planned.

    Args:
        calibration: None for a recipe that quantizes weights only.
    Raises:
        NvquantError: see each stage; nothing is left behind.
    """
    started = time.monotonic()
    quantizer = get_quantizer(options.quantizer)
    check_output(options.output, plan.file_bytes, plan.source.folder)
    configs = output_configs(plan)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    run = {
        "device": options.device.split(":")[0],
        "dtype": str(dtype).removeprefix("torch."),
        "attention": ATTENTION,
        "batch_size": options.batch_size,
    }
    identity = run_identity(plan, options.quantizer, calibration, run)
    partial = start_partial(options.output, identity)
    try:
        layers = _layers(plan, options, quantizer, calibration, dtype)
        files, records = _write_all(plan, partial, layers, options)
        _write_side_files(plan, partial, configs)
        write_json(partial / MANIFEST_NAME, {**identity, "layers": records, "files": files})
        assert_as_planned(plan, partial)
        publish(partial, options.output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    flushed = sum(group["marlin_flushed_blocks"] for layer in records for group in layer["groups"].values())
    return ConvertResult(
        output=str(options.output),
        tensors=plan.tensors,
        tensor_bytes=plan.tensor_bytes,
        quantized=len(plan.matrices),
        seconds=round(time.monotonic() - started, 3),
        peak_host_bytes=peak_host_bytes(),
        peak_gpu_bytes=peak_gpu_bytes(),
        calibration=calibration.as_json() if calibration else None,
        marlin_flushed_blocks=flushed,
    )


@dataclass(frozen=True)
class _LayerOutput:
    shard: PlannedShard
    tensors: dict[str, Tensor]
    record: dict[str, Any]


def _layers(
    plan: Plan, options: ConvertOptions, quantizer: Quantizer, calibration: CalibrationSet | None, dtype: torch.dtype
) -> Iterator[_LayerOutput]:
    """Read, calibrate and quantize layer by layer; the next layer is read meanwhile."""
    walk = _start_walk(plan, options, calibration, dtype) if calibration is not None else None
    shards = [shard for shard in plan.shards if shard.layer is not None]
    with ThreadPoolExecutor(1, "read") as reader:
        coming: Future[dict[str, Tensor]] | None = reader.submit(_read_layer, plan, shards[0], walk is not None)
        for at, shard in enumerate(shards):
            assert coming is not None and shard.layer is not None
            tensors = {name: tensor.to(options.device) for name, tensor in coming.result().items()}
            give_back_free_memory()
            follows = at + 1 < len(shards)
            coming = reader.submit(_read_layer, plan, shards[at + 1], walk is not None) if follows else None
            groups = groups_of_layer(plan.groups, plan.prefix, shard.layer)
            calibrated = [group for group in groups if plan.matrices[group.members[0]].scheme == "nvfp4"]
            inputs = walk.step(shard.layer, tensors, calibrated, quantizer.uses_mean_square) if walk is not None else {}
            output: dict[str, Tensor] = {}
            record: dict[str, Any] = {}
            for group in groups:
                done = quantize_group(plan, group, tensors, inputs.get(group.name), quantizer)
                output.update(done.tensors)
                record[group.name] = done.record
            yield _LayerOutput(shard, output, record)


def _start_walk(plan: Plan, options: ConvertOptions, calibration: CalibrationSet, dtype: torch.dtype) -> Walk:
    options.progress(0, len(plan.layers), "record")
    device = torch.device(options.device)
    skeleton = build_skeleton(plan.source, plan.prefix, device, dtype)
    if len(skeleton.layers) != len(plan.layers):
        raise InputError(
            f"{plan.model}: config.json describes {len(skeleton.layers)} decoder layers, but the shards hold "
            f"{len(plan.layers)}: download the model again."
        )
    hidden_size = int(text_config(plan.source.config)["hidden_size"])
    hidden_bytes = calibration.tokens * hidden_size * dtype.itemsize
    return Walk(
        skeleton,
        calibration.samples,
        options.batch_size,
        _hidden_device(device, hidden_bytes, options.gpu_budget_bytes),
    )


def _hidden_device(device: torch.device, hidden_bytes: int, budget_bytes: int | None) -> torch.device:
    """Where hidden states wait: on the GPU where they take at most half of the budget, else in host memory."""
    if device.type != "cuda":
        return torch.device("cpu")
    budget = budget_bytes if budget_bytes is not None else torch.cuda.mem_get_info(device)[0]
    return device if hidden_bytes <= HIDDEN_SHARE_OF_GPU * budget else torch.device("cpu")


def _read_layer(plan: Plan, shard: PlannedShard, whole: bool) -> dict[str, Tensor]:
    """A layer's tensors in their stored dtype: all of them for a walk, only the matrices to quantize without one."""
    names = dict.fromkeys(
        plan.origins[entry.name].source for entry in shard.entries if whole or plan.origins[entry.name].part
    )
    return {name: plan.source.read(name) for name in names}


def _write_all(
    plan: Plan, partial: Path, layers: Iterable[_LayerOutput], options: ConvertOptions
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Write the layers' shards in one thread, at most one waiting, and copy the rest in another.

    Returns sha256 by file and the records of the layers.
    """
    hashes: dict[str, str] = {}
    records: list[dict[str, Any]] = []
    total = len(plan.layers)
    rest = [shard for shard in plan.shards if shard.layer is None]
    with ThreadPoolExecutor(1, "write") as writer, ThreadPoolExecutor(1, "copy") as copier:
        copies = [copier.submit(_write_one, plan, partial, shard, {}, hashes) for shard in rest]
        waiting: Future[str] | None = None
        try:
            for output in layers:
                if waiting is not None:
                    waiting.result()
                waiting = writer.submit(_write_one, plan, partial, output.shard, output.tensors, hashes)
                records.append({"layer": output.shard.layer, "file": output.shard.file, "groups": output.record})
                options.progress(len(records), total, "layers")
            options.progress(total, total, "finishing the files")
            for future in [waiting, *copies]:
                if future is not None:
                    future.result()
        except BaseException:
            for copy in copies:  # nobody waits for gigabytes of copies after an error
                copy.cancel()
            raise
    weight_map = {entry.name: shard.file for shard in plan.shards for entry in shard.entries}
    write_json(
        partial / INDEX_NAME,
        {"metadata": {"total_size": plan.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))},
    )
    return dict(sorted(hashes.items())), records


def _write_one(
    plan: Plan, partial: Path, shard: PlannedShard, tensors: Mapping[str, Tensor], hashes: dict[str, str]
) -> str:
    def contents(entry: TensorEntry) -> Iterator[memoryview]:
        if entry.name in tensors:
            yield tensor_bytes(tensors[entry.name])
        else:
            yield from plan.source.pieces(plan.origins[entry.name].source)

    hashes[shard.file] = write_shard(partial / shard.file, shard.entries, contents)
    return hashes[shard.file]


def _write_side_files(plan: Plan, partial: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    for name in side_files(plan.source.folder):
        (partial / name).parent.mkdir(exist_ok=True)
        write_bytes(partial / name, (plan.source.folder / name).read_bytes())
    for name, config in configs.items():
        write_json(partial / name, config)


def assert_as_planned(plan: Plan, folder: Path) -> None:
    """Read back every header of the output and hold it against the plan.

    Raises:
        CheckFailed: a tensor is missing, unplanned, or of another dtype, shape or place.
    """
    try:
        written = open_checkpoint(folder)
    except NvquantError as error:
        raise CheckFailed(f"the output is not readable ({error})") from error
    for shard in plan.shards:
        found = [(info.name, info.dtype, info.shape) for info in written.shards[shard.file].tensors.values()]
        planned = [(entry.name, entry.dtype, entry.shape) for entry in shard.entries]
        if found != planned:
            raise CheckFailed(f"{shard.file} was not written as planned.")
