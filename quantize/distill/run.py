"""Distill a checkpoint: train, judge, and write a new checkpoint, or resume a run that ended early."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..calibrate.model_class import import_model_code
from ..calibrate.samples import CalibrationSet, load_calibration
from ..checkpoint.digest import file_sha256
from ..checkpoint.sidefiles import flat_side_files
from ..checkpoint.source import Checkpoint, read_json
from ..convert.identity import calibration_record, source_identity
from ..convert.journal import Journal
from ..convert.output import (
    check_output,
    finish_publishing,
    locked_partial,
    open_partial,
    publish,
    remove_partial,
)
from ..errors import InputError
from ..plan.quantized_source import as_computed
from ..stream.distillation import DistillationRecord
from ..stream.manifest import MANIFEST_NAME, Manifest, held_to
from ..stream.memory import peak_gpu_bytes, peak_host_bytes, telling_of_full_gpu
from ..verify.numerics.lanes import source_prefix
from ..verify.numerics.served import ServedModel
from ..verify.numerics.text import load_text
from ..verify.subject import Subject, open_subject
from .gate import Verdict, judge, measure
from .memory import check_memory
from .options import DistillOptions, DistillResult
from .output import OWN_FILES, changes_of, write_distilled
from .resident import Resident
from .student import Student
from .training import RECORD_NAME, Training

HELDOUT_SEED = 2  # verify measures on others


def distill(folder: Path, source: Checkpoint, options: DistillOptions) -> DistillResult:
    """Train the block scales and norms of a checkpoint to the logits of its source, and write a new checkpoint.

    The new checkpoint differs in nothing but these tensors and the manifest. If the gate refuses the training, no
    tensor differs, and the manifest contains the reason. A run that ended early is resumed from its last snapshot.

    Args:
        folder: of an NVFP4 checkpoint that nvquant wrote.
        source: the model that it was made from.
    Raises:
        InputError: no such checkpoint, another model for a source, or an output in the way.
        EnvironmentLack: too little memory, or a transformers that does not know the model.
        Stopped: a signal ended the run.
    """
    started = time.monotonic()
    source = as_computed(source, source.where)
    subject = open_subject(folder, options.progress)
    manifest = _own_manifest(subject)
    _refuse_other_source(subject, manifest, source)
    if not options.is_in_place and options.output.resolve() == folder.resolve():
        raise InputError(f"-o {options.output} is the checkpoint itself", where="-o", hint="choose another folder")
    finish_publishing(options.output)
    text = _training_text(subject, options)
    heldout = load_text(
        None if options.heldout is None else Path(options.heldout),
        *(folder, subject.config, options.heldout_samples, options.sequence_length),
        seed=HELDOUT_SEED,
    )
    finished = _finished(options, manifest, text, heldout)
    if finished is None:
        finished = _run(subject, source, options, text, heldout)
        started_anew = True
    else:
        started_anew = False
    return DistillResult(
        str(options.output),
        finished,
        round(time.monotonic() - started, 3),
        peak_host_bytes(),
        peak_gpu_bytes(),
        was_finished=not started_anew,
    )


def _own_manifest(subject: Subject) -> Manifest:
    """The manifest of a checkpoint that can be distilled.

    Raises:
        InputError: it cannot.
    """
    manifest = subject.manifest
    if not isinstance(manifest, Manifest):
        raise InputError(
            f"{subject.folder} has no usable {MANIFEST_NAME}, and nvquant distills only its own checkpoints",
            where=subject.folder,
            hint="convert the source with nvquant first",
        )
    casts = [group.record.cast for group in manifest.groups.values() if group.record.cast is not None]
    if any(cast.exponent is not None for cast in casts):
        raise InputError(
            f"{subject.folder} keeps the codes and scales of its MXFP4 source, which distillation would change",
            where=subject.folder,
            hint="use the checkpoint without distillation",
        )
    unsound = [fault for matrix in subject.matrices.values() for fault in matrix.faults]
    if unsound or not subject.matrices:
        raise InputError(
            unsound[0] if unsound else f"{subject.folder} has no quantized matrix",
            where=subject.folder,
            hint="convert the source again",
        )
    return manifest


def _refuse_other_source(subject: Subject, manifest: Manifest, source: Checkpoint) -> None:
    """Raise InputError for a source that the checkpoint was not made from, as far as the manifest can tell."""
    recorded, own = manifest.source, source_identity(source)
    is_other = recorded.config_sha256 is not None and recorded.config_sha256 != own.config_sha256
    for name, shard in recorded.shards.items():
        found = own.shards.get(name)
        if shard.header_sha256 is not None and own.hub is None:  # the Hub names other hashes
            is_other |= found is None or (found.bytes, found.header_sha256) != (shard.bytes, shard.header_sha256)
    if is_other:
        raise InputError(
            f"{subject.folder} was not made from {source.where}, as its manifest shows",
            where=source.where,
            hint="name the model that the checkpoint was made from with --against",
        )


def _training_text(subject: Subject, options: DistillOptions) -> CalibrationSet:
    try:
        return load_calibration(
            options.text,
            model_folder=subject.folder,
            config=subject.config,
            samples=options.samples,
            sequence_length=options.sequence_length,
            seed=options.seed,
        )
    except InputError as error:
        if (error.hint or "").startswith("use --samples"):
            error.hint = "use fewer tokens or a larger set"
        raise


def _finished(
    options: DistillOptions, manifest: Manifest, text: CalibrationSet, heldout: CalibrationSet
) -> DistillationRecord | None:
    """The record of an equal run that has already written the output. None for an output that is to be written.

    Raises:
        InputError: another run has written it, or the checkpoint is distilled already.
    """
    path = options.output / MANIFEST_NAME
    is_there = path.exists() and not options.restart
    written = held_to(Manifest, read_json(path, "nvquant writes one"), str(path)) if is_there else None
    record = None if written is None else written.distillation
    if written is not None and record is not None:
        is_same = (record.text, record.heldout_sha256) == (calibration_record(text), heldout.sha256)
        same_run = all(getattr(written, key) == getattr(manifest, key) for key in ("source", "recipe", "quantizer"))
        if is_same and same_run and (options.is_in_place or manifest.distillation is None):
            return record
    if manifest.distillation is not None and manifest.distillation.is_kept:
        raise InputError(
            "the checkpoint is distilled already",
            where=MANIFEST_NAME,
            hint="Distill the checkpoint of a conversion without distillation, or convert again with --restart",
        )
    if written is not None and not options.is_in_place:
        raise InputError(
            f"-o {options.output} contains the finished checkpoint of another run",
            where="-o",
            hint="choose another folder, or replace it with --restart",
        )
    return None


def _run(
    subject: Subject, source: Checkpoint, options: DistillOptions, text: CalibrationSet, heldout: CalibrationSet
) -> DistillationRecord:
    size = sum(path.stat().st_size for path in subject.folder.glob("*.safetensors"))
    check_output(options.output, size, source.folder if options.is_in_place else subject.folder)
    served, dtype = ServedModel(subject), options.dtype
    sizes = {m: (one.matrix.rows, one.matrix.cols, one.scheme.has_block_scales) for m, one in served.matrices.items()}
    check_memory(sizes, source, options, dtype)
    import_model_code(source)
    identity = _identity(subject, source, options, text, heldout, dtype)
    files = [*subject.checkpoint.shards, *flat_side_files(subject.folder), *OWN_FILES]
    with locked_partial(options.output) as partial:
        journal = open_partial(partial, identity, options.restart, files)
        try:
            with telling_of_full_gpu("distillation"):
                record, moved = _train(served, source, options, text, heldout, dtype, journal)
            write_distilled(subject, moved, record, partial)
        except BaseException:
            if not (journal.folder / RECORD_NAME).exists():
                remove_partial(partial)
            raise
        publish(partial, options.output)
    return record


def _identity(
    subject: Subject,
    source: Checkpoint,
    options: DistillOptions,
    text: CalibrationSet,
    heldout: CalibrationSet,
    dtype: torch.dtype,
) -> Mapping[str, Any]:
    """All facts that determine the output's bytes."""
    is_cpu = options.device == "cpu"
    return {
        "distill": {
            "nvquant": __version__,
            "checkpoint": file_sha256(subject.folder / MANIFEST_NAME),
            "text": text.sha256,
            "heldout": heldout.sha256,
            "rates": [options.scale_rate, options.norm_rate],
            "device": "cpu" if is_cpu else torch.cuda.get_device_name(options.device),
            "dtype": str(dtype),
            "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        },
        "source": source_identity(source).as_json(),
    }


def _train(
    served: ServedModel,
    source: Checkpoint,
    options: DistillOptions,
    text: CalibrationSet,
    heldout: CalibrationSet,
    dtype: torch.dtype,
    journal: Journal,
) -> tuple[DistillationRecord, dict[str, torch.Tensor]]:
    """Train and judge. Returns the record, and the tensors that the output stores in place of the old ones."""
    device, ids = torch.device(options.device), torch.cat([*text.samples, *heldout.samples])
    options.progress(0, 0, "loading both models")
    with ExitStack() as opened:
        teacher = Resident(source, source, source_prefix(source), ids, device, dtype)
        opened.callback(teacher.close)
        student = Student(served, ids, device, dtype)
        opened.callback(student.close)
        training = Training(teacher, student, text.samples, options, journal)
        training.run()
        before, after = measure(teacher, student, heldout, options.progress)
        verdict = judge(before, after, [len(ids) for ids in heldout.samples], heldout.kinds)
        if training.fault:
            verdict = replace(verdict, is_kept=False, reason=training.fault)
        moved = student.moved() if verdict.is_kept else {}
        scales, norms = changes_of(student, moved)
    record = _record(options, text, heldout, dtype, verdict)
    return record.model_copy(update={"scales": scales, "norms": norms}), moved


def _record(
    options: DistillOptions, text: CalibrationSet, heldout: CalibrationSet, dtype: torch.dtype, verdict: Verdict
) -> DistillationRecord:
    return DistillationRecord(
        tokens=text.tokens,
        steps=options.steps,
        seed=options.seed,
        text=calibration_record(text),
        device=options.device.partition(":")[0],
        dtype=str(dtype).removeprefix("torch."),
        heldout_sha256=heldout.sha256,
        heldout=verdict.heldout,
        total=verdict.total,
        is_kept=verdict.is_kept,
        reason=verdict.reason,
    )
