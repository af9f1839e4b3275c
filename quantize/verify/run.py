"""All stages of a verification, one after the other, and the report over them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.hub.repository import HubModel
from ..checkpoint.source import Checkpoint
from ..errors import EnvironmentLack, InputError
from ..plan.quantized_source import as_computed
from ..serving.server import ServeOptions
from ..stream.memory import give_back_gpu_memory
from .contents import describe_checkpoint
from .loadable import COMPLETE, loading_checks
from .numerics.document import Numerics, known
from .numerics.emulated import emulated_logprobs
from .numerics.stage import NumericsOptions, NumericsStage
from .numerics.text import reference_ids
from .remote import fetch_checkpoint, remote_subject, unread_bytes
from .report import Check, Finding, Report
from .serve import ServeStage
from .served_logprobs import Emulate, SourceFigures
from .structure import STAGE as STRUCTURE
from .structure import structure_checks
from .subject import Subject, open_subject
from .threads import Progress

Stage = Literal["structure", "numerics", "serve"]
STAGES: tuple[Stage, ...] = ("structure", "numerics", "serve")
# Without these the tensors cannot be read for what they are, and no number means anything.
READABLE = frozenset({"headers", "index", "layout", "matrices", COMPLETE})
# Without these a server ends, or answers with what nothing has filled.
LOADABLE = READABLE | {"architecture"}


@dataclass(frozen=True)
class VerifyOptions:
    """The options of a verification.

    Attributes:
        stages: of `STAGES`, run in that order.
        numerics: of the stage numerics. The emulation that the stage serve compares with runs on its device.
        serve: of the stage serve.
        log_folder: for the server's log. Without it, a temporary folder, which stays where a check failed.
        by_ranges: whether only headers and scales of a model on the Hub are read. Only for the stage structure.
    """

    stages: Sequence[Stage]
    numerics: NumericsOptions = field(default_factory=NumericsOptions)
    serve: ServeOptions = field(default_factory=ServeOptions)
    log_folder: Path | None = None
    by_ranges: bool = False


class Verification:
    """The verification of a checkpoint.

    Args:
        checkpoint: its folder, or a model on the Hub, which is read by ranges for the stage structure alone, and else
            downloaded completely.
        source: the model that it was made from. The stage numerics requires it.
        progress: called with (done, total, phase) by long steps.
    Raises:
        InputError: the stage numerics without a source.
    """

    def __init__(
        self, checkpoint: Path | HubModel, source: Checkpoint | None, options: VerifyOptions, progress: Progress
    ) -> None:
        if source is None and "numerics" in options.stages:
            raise InputError(
                "--stage numerics compares with the source", where="--stage", hint="name it with --against MODEL"
            )
        self._named, self._source, self._options, self._progress = checkpoint, source, options, progress
        self._checks: list[Check] = []
        self._numbers: Numerics | None = None
        self._served: dict[str, Any] | None = None
        self._subject: Subject | None = None
        self._unread_bytes = 0

    def run(self) -> Iterator[Check]:
        """Every check, each yielded when it is done.

        Raises:
            InputError: the folder contains no NVFP4 checkpoint, the source is quantized in a form that nvquant does not
                decode, or a stage raised it.
        """
        with self._open() as subject:
            self._subject = subject
            if self._source is not None:
                self._source = as_computed(self._source, self._source.where)
            for check in self._stages(subject):
                self._checks.append(check)
                yield check
            self._unread_bytes = unread_bytes(subject)

    def report(self) -> Report:
        """The results so far."""
        checkpoint = {} if self._subject is None else describe_checkpoint(self._subject, self._source)
        if self._unread_bytes:
            checkpoint["unread_bytes"] = self._unread_bytes
        numbers = None if self._numbers is None else self._numbers.as_json()
        return Report(tuple(self._checks), checkpoint, numbers, self._served)

    def _open(self) -> AbstractContextManager[Subject]:
        named = self._named
        if isinstance(named, Path):
            return nullcontext(open_subject(named, self._progress))
        if self._options.by_ranges:
            return remote_subject(named, self._progress)
        return nullcontext(open_subject(fetch_checkpoint(named, self._progress), self._progress, named))

    def _stages(self, subject: Subject) -> Iterator[Check]:
        stages = self._options.stages
        if STRUCTURE in stages:
            yield from structure_checks(subject, self._source)
        # After a fault of the structure its verdict stands, and the stages tell what they cannot do.
        if {"numerics", "serve"} & set(stages) and all(check.passed for check in self._checks):
            yield from loading_checks(subject, is_proved=STRUCTURE in stages)
        if "numerics" in stages:
            yield from self._numerics(subject)
        if "serve" in stages:
            yield from self._serve(subject)

    def _numerics(self, subject: Subject) -> Iterator[Check]:
        failed = self._failed(READABLE)
        if failed:
            yield Check("numerics", "predictions", Finding("not measured", failed))
            return
        assert self._source is not None
        stage = NumericsStage(subject, self._source, self._options.numerics, self._progress)
        try:
            yield from stage.run()
        except (InputError, EnvironmentLack) as refusal:
            # A checkpoint that failed already is the likelier cause than the request: its verdict is not to be lost.
            if all(check.passed for check in self._checks):
                raise
            yield Check("numerics", "predictions", Finding("not measured", [str(refusal)]))
        self._numbers = stage.numbers

    def _serve(self, subject: Subject) -> Iterator[Check]:
        failed = self._failed(LOADABLE)
        if failed:  # no server is started for minutes on what cannot be read
            yield Check("serve", "start", Finding("not started", failed))
            return
        folder = self._options.log_folder or Path(tempfile.mkdtemp(prefix="nvquant-serve-"))
        folder.mkdir(parents=True, exist_ok=True)
        give_back_gpu_memory()  # the stage numerics leaves gigabytes, and a server wants nine tenths of the GPU
        stage = ServeStage(
            subject,
            self._options.serve,
            self._emulate(subject),
            _reference_ids(subject),
            folder,
            lambda words: self._progress(0, 0, words),
            self._source_figures(),
        )
        has_failed = False
        for check in stage.run():
            has_failed |= not check.passed
            yield check
        self._served = stage.document
        if self._options.log_folder is None and not has_failed:
            shutil.rmtree(folder, ignore_errors=True)

    def _source_figures(self) -> SourceFigures | None:
        numbers = self._numbers
        if numbers is None:
            return None
        return SourceFigures(known(numbers.nll_source), known(numbers.arithmetics["floor"].nll_difference))

    def _emulate(self, subject: Subject) -> Emulate:
        device = self._options.numerics.device
        return lambda ids, arithmetic: emulated_logprobs(subject, ids, arithmetic, device)

    def _failed(self, needed: frozenset[str]) -> list[str]:
        failed = [check.name for check in self._checks if check.name in needed and not check.passed]
        return [f"the checks {', '.join(failed)} must pass first"] if failed else []


def _reference_ids(subject: Subject) -> list[int] | None:
    """A reference text in the checkpoint's own tokens. None where its tokenizer cannot make one, which a check of the
    stage reports."""
    try:
        return reference_ids(subject.folder, subject.config)
    except InputError:
        return None
