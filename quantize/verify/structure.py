"""The stage `structure`: checks of a checkpoint's bytes, alone and against its source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ..checkpoint.source import Checkpoint, open_checkpoint
from ..plan.quantized_source import as_computed
from . import (
    against,
    architecture,
    configs,
    distilled,
    files,
    folds,
    kv_cache,
    moved,
    recorded,
    scales,
    tokenizer,
    weights,
)
from .report import Check, Finding, Report, not_read
from .subject import Subject, open_subject

STAGE = "structure"
FP8_CHECK = "fp8"  # only where a matrix is in FP8
FOLDS_CHECK = "folds"  # only where the manifest has some
DISTILLED_CHECK = "distilled"  # likewise
# In the order in which they are worth reading: what stands first explains what fails further down.
ALONE: dict[str, Callable[[Subject], Finding]] = {
    "index": files.check_index,
    "layout": configs.check_layout,
    "matrices": configs.check_matrices,
    "config": configs.check_config,
    "architecture": architecture.check_architecture,
    "protected": scales.check_protected,
    "kv_cache": kv_cache.check_kv_cache,
    "tokenizer": tokenizer.check_tokenizer,
    "unquantized": architecture.check_unquantized,
    "block_scales": scales.check_block_scales,
    FP8_CHECK: scales.check_fp8,
    "global_scales": scales.check_global_scales,
    "fused_groups": scales.check_fused_groups,
    "marlin": scales.check_marlin,
    "manifest": recorded.check_manifest,
    "hashes": files.check_hashes,
    "input_scales": recorded.check_input_scales,
    "weight_scales": recorded.check_weight_scales,
}
AGAINST: dict[str, Callable[[Subject, Checkpoint], Finding]] = {
    "names": against.check_names,
    FOLDS_CHECK: folds.check_folds,
    DISTILLED_CHECK: distilled.check_distilled,
    "untouched": against.check_untouched,
    "config_source": against.check_config_source,
    "side_files": against.check_side_files,
    "weights": weights.check_weights,
}
# Of these, the checks that read whole weights of both.
WHOLE = frozenset({FOLDS_CHECK, DISTILLED_CHECK, "untouched", "weights"})


def verify_structure(folder: Path, against: Path | None = None) -> Report:
    """Verify a checkpoint, alone or against the folder of its source. See `structure_checks`."""
    source = None if against is None else open_checkpoint(against)
    return Report(tuple(structure_checks(open_subject(folder), source)))


def structure_checks(subject: Subject, source: Checkpoint | None) -> Iterator[Check]:
    """Verify a checkpoint, one check after the other, each yielded when it is done.

    Args:
        source: the model that it was made from. Without it, the checkpoint is only checked against itself.
    Raises:
        InputError: the source is quantized itself.
    """
    if source is not None:
        source = folds.in_recorded_order(subject, as_computed(source, source.where))
    headers = Check(STAGE, "headers", files.check_headers(subject))
    yield headers
    if not headers.passed:
        return
    for name, check in ALONE.items():
        if name == FP8_CHECK and all(matrix.scheme.has_block_scales for matrix in subject.matrices.values()):
            continue
        yield Check(STAGE, name, check(subject))
    if source is not None:
        for name, compare in AGAINST.items():
            if name == FOLDS_CHECK and not folds.has_folds(subject):
                continue
            if name == DISTILLED_CHECK and moved.distillation_of(subject) is None:
                continue
            is_read = not (subject.is_remote and name in WHOLE)
            yield Check(STAGE, name, compare(subject, source) if is_read else not_read("the weights"))
