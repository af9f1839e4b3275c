"""Convert: execute a plan, or resume a run that ended early. The output appears when it is complete and as planned."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..calibrate.model_class import ATTENTION, import_model_code
from ..calibrate.samples import CalibrationSet
from ..checkpoint.sidefiles import flat_side_files
from ..checkpoint.source import INDEX_NAME, open_checkpoint, read_json
from ..checkpoint.writer import write_json
from ..errors import CheckFailed, InputError, NvquantError
from ..plan.plan import Plan
from ..quantizers import get_quantizer
from ..quantizers.gptq import GPTQ
from ..stream.manifest import MANIFEST_NAME, Manifest, ResidualRecord, Run, ShardRecord, held_to
from ..stream.memory import peak_gpu_bytes, peak_host_bytes
from ..weights.decoding import check_scales
from .config import output_configs
from .device import DeviceStart
from .engine import Engine
from .head import check_head
from .identity import difference, run_identity
from .journal import Journal
from .options import ConvertOptions, ConvertResult
from .output import (
    check_finished,
    check_output,
    finish_publishing,
    locked_partial,
    open_partial,
    partial_folder,
    publish,
    remove_partial,
    write_side_files,
)
from .stop import STOPPED, Stopped
from .survey import with_order
from .watch import Watch


def convert(plan: Plan, options: ConvertOptions, calibration: CalibrationSet | None) -> ConvertResult:
    """Execute a plan. The output appears under its final name only when it is complete and as planned.

    A run that ended early is resumed from its last complete shard, and gives the same bytes.

    Args:
        calibration: None for a plan that needs none.
    Raises:
        InputError: the plan needs a calibration, and gets none. A scale of a quantized source is no finite number.
        NvquantError: see each stage. Complete shards stay in the partial folder for the next run.
    """
    quantizer = get_quantizer(options.quantizer)
    plan = replace(plan, quantizer=quantizer.name)
    _refuse_without_samples(plan, calibration)
    schemes = {matrix.scheme for matrix in plan.matrices.values()}
    with (
        options.trace.span("import"),
        DeviceStart(options.device, quantizer, schemes, calibration is not None),
    ):
        if calibration is not None:
            import_model_code(plan.source)
    started = time.monotonic()
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    configs = output_configs(plan)
    _check_weights(plan, options)
    run = circumstances(options, dtype, calibration)
    identity = run_identity(plan, options.quantizer, calibration, run, options.fold).as_json()
    with ExitStack() as held:
        begun = _begin(plan, options, identity, held)
        if not begun.is_finished:
            watch = Watch(options)
            try:
                residual = None
                if options.fold and calibration is not None:
                    plan, residual = with_order(plan, calibration, options, dtype, begun.journal, watch)
                Engine(plan, options, quantizer, dtype, begun.journal, begun.done, watch).run(calibration)
                watch.phase("finish")
                with options.trace.span("finish"), options.ranks.step():
                    if options.ranks.rank == 0:
                        _finish(plan, options.output, begun.journal, identity, configs, residual)
            except BaseException as error:
                _leave(plan, options, begun.journal, error)
                raise
    made = held_to(Manifest, read_json(options.output / MANIFEST_NAME, ""), str(options.output / MANIFEST_NAME))
    return ConvertResult(
        output=str(options.output),
        tensors=plan.tensors,
        tensor_bytes=plan.tensor_bytes,
        quantized=len(plan.matrices),
        seconds=round(time.monotonic() - started, 3),
        peak_host_bytes=peak_host_bytes(),
        peak_gpu_bytes=peak_gpu_bytes(),
        calibration=calibration.as_json() if calibration else None,
        marlin_flushed_blocks=sum(group.record.marlin_flushed_blocks for group in made.groups.values()),
        layers_resumed=len(plan.layers) if begun.is_finished else _layers_in(begun.done),
        was_finished=begun.is_finished,
        error_feedback=_error_feedback(made),
        casts=_casts(made),
        phases={phase: round(seconds, 3) for phase, seconds in options.trace.phases().items()},
    )


def _error_feedback(manifest: Manifest) -> dict[str, int] | None:
    """See `ConvertResult.error_feedback`."""
    quantizer = get_quantizer(manifest.quantizer)
    if not isinstance(quantizer, GPTQ):
        return None
    records = [group.record.feedback for group in manifest.groups.values() if group.record.feedback is not None]
    return {
        "groups": len(records),
        "more_damping": sum(map(quantizer.has_more_damping, records)),
        "outgrown": sum(record.outgrown_blocks > 0 for record in records),
        "outgrown_blocks": sum(record.outgrown_blocks for record in records),
    }


def _casts(manifest: Manifest) -> dict[str, int] | None:
    """See `ConvertResult.casts`."""
    casts = [(len(g.record.members), g.record.cast) for g in manifest.groups.values() if g.record.cast is not None]
    if not casts:
        return None
    counts = {key: sum(getattr(cast, key) for _, cast in casts) for key in ("blocks", "shifted", "rounded")}
    return {"matrices": sum(number for number, _ in casts), **counts}


@dataclass(frozen=True)
class _Begun:
    """The start of a run.

    Attributes:
        done: records of the complete shards, by file.
        is_finished: whether the output exists already.
    """

    journal: Journal
    done: Mapping[str, ShardRecord]
    is_finished: bool = False


def _check_weights(plan: Plan, options: ConvertOptions) -> None:
    """Refuse a head, or scales of a quantized source, that would end the run later."""
    check_head(plan)
    with options.ranks.step():
        if options.ranks.rank == 0:
            check_scales(plan.source)


def _refuse_without_samples(plan: Plan, calibration: CalibrationSet | None) -> None:
    if plan.needs_calibration and calibration is None:
        raise InputError(
            f"recipe {plan.recipe.name} with quantizer {plan.quantizer} requires calibration samples",
            where=f"recipe {plan.recipe.name}",
            hint="give a calibration set, or use recipe nvfp4-a16 with quantizer mse",
        )


def circumstances(options: ConvertOptions, dtype: torch.dtype, calibration: CalibrationSet | None) -> Run:
    """The circumstances of this run, beside its files and versions, on which the output's bytes may depend."""
    run = Run(
        device=options.device.split(":")[0],
        dtype=str(dtype).removeprefix("torch."),
        attention=ATTENTION,
        batch_size=options.batch_size,
    )
    if calibration is None:
        return run
    # Matrix products may differ in their last bits between processors.
    is_cpu = options.device == "cpu"
    capability = torch.backends.cpu.get_cpu_capability() if is_cpu else torch.cuda.get_device_name(options.device)
    return Run(**run.as_json(), processor=capability)


def _begin(plan: Plan, options: ConvertOptions, identity: Mapping[str, Any], held: ExitStack) -> _Begun:
    """Lock the partial folder for this run on rank 0, which informs the others of its content.

    Args:
        held: keeps the folder's lock.
    """
    ranks = options.ranks
    journal = Journal(partial_folder(options.output))
    begun = None
    with ranks.step():
        if ranks.rank == 0:
            check_output(options.output, plan.file_bytes, plan.source.folder)
            finish_publishing(options.output)
            if check_finished(options.output, identity, options.restart):
                begun = _Begun(journal, {}, is_finished=True)
            else:
                partial = held.enter_context(locked_partial(options.output))
                files = [*(shard.file for shard in plan.shards), *flat_side_files(plan.source.folder)]
                journal = open_partial(partial, identity, options.restart, files)
                begun = _Begun(journal, journal.done(plan.shards))
    with ranks.step():
        first, found = ranks.exchange((begun, identity))[0]
        differs = difference(found, identity)
        if differs is not None:
            raise InputError(f"the ranks differ ({differs})", hint="give all ranks the same files, versions and GPUs")
        if not journal.partial.is_dir() and not first.is_finished:
            raise InputError(
                f"rank {ranks.rank} cannot see {journal.partial}", hint="name a folder that all ranks share"
            )
    assert isinstance(first, _Begun)
    return first


def _finish(
    plan: Plan,
    output: Path,
    journal: Journal,
    identity: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    residual: ResidualRecord | None,
) -> None:
    """Write the files that describe the shards, read every header back, and give the folder its name."""
    partial = journal.partial
    records = journal.records(plan.shards)
    missing = [shard.file for shard in plan.shards if shard.file not in records]
    if missing:
        raise CheckFailed(f"{partial} lacks {missing[0]}", where=partial, hint="run the same command again")
    weight_map = {entry.name: shard.file for shard in plan.shards for entry in shard.entries}
    index = {"metadata": {"total_size": plan.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(partial / INDEX_NAME, index)
    write_side_files(plan.source.folder, partial, configs)
    layers = [records[shard.file].layer for shard in plan.shards if shard.layer is not None]
    files = {file: records[file].sha256 for file in sorted(records)}
    manifest = Manifest(**identity, layers=tuple(layer for layer in layers if layer is not None), files=files)
    if residual is not None:
        manifest = manifest.model_copy(update={"residual": residual})
    for shard in plan.shards:
        if shard.is_head:
            manifest = manifest.model_copy(update={"head": records[shard.file].head})
    write_json(partial / MANIFEST_NAME, manifest.as_json())
    assert_as_planned(plan, partial)
    publish(partial, output)


def assert_as_planned(plan: Plan, folder: Path) -> None:
    """Read back every header of the output and compare it with the plan.

    Raises:
        CheckFailed: a tensor is missing, unplanned, or has another dtype, shape or place.
    """
    try:
        written = open_checkpoint(folder)
    except NvquantError as error:
        raise CheckFailed(
            f"the output is not readable ({str(error).rstrip('.')})", hint="run the same command with --restart"
        ) from error
    for shard in plan.shards:
        found = [(info.name, info.dtype, info.shape) for info in written.shards[shard.file].tensors.values()]
        planned = [(entry.name, entry.dtype, entry.shape) for entry in shard.entries]
        if found != planned:
            raise CheckFailed(
                f"the tensors of {shard.file} differ from the plan", hint="run the same command with --restart"
            )


def _leave(plan: Plan, options: ConvertOptions, journal: Journal, error: BaseException) -> None:
    """Keep the complete layers for the next run, and report them. Without such layers, leave nothing."""
    if options.ranks.rank != 0 or not journal.folder.exists():
        return
    try:
        records = journal.records(plan.shards)
    except CheckFailed:  # says itself what to do
        return
    if isinstance(error, Stopped) and options.ranks.size == 1:  # several all say what one of them counted
        error.count(_layers_in(records), len(plan.layers))
    if not _layers_in(records):
        if options.ranks.size == 1:  # others may still be writing
            remove_partial(journal.partial)
    elif isinstance(error, NvquantError) and error.exit_code < STOPPED:  # one that was stopped says so itself
        error.add(
            f"{_layers_in(records)} of {len(plan.layers)} layers are complete and kept: the same command resumes the "
            f"run."
        )


def _layers_in(records: Mapping[str, ShardRecord]) -> int:
    return sum(record.layer is not None for record in records.values())
