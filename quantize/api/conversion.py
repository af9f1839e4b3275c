"""A conversion from plain values to its result, for `nvquant.convert` and the command `convert`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from .. import __version__
from ..errors import InputError, unknown_name
from ..plan.calibration import calibration_size
from ..recipe.schema import Recipe
from .distillation import DistillRequest, check_distillation, distill_converted, refuse_distilled
from .inputs import AnyPath, Say, as_recipe, load_samples, make_plan, makes_folds, named, resolve_device

if TYPE_CHECKING:
    from ..calibrate.samples import CalibrationSet
    from ..checkpoint.hub.repository import HubModel
    from ..convert.options import ConvertOptions, ConvertResult
    from ..convert.progress import ProgressSink
    from ..convert.ranks import Ranks
    from ..convert.stop import StopRequest
    from ..stream.trace import Trace

    Display: TypeAlias = Callable[[], AbstractContextManager[ProgressSink]]
    Stages: TypeAlias = Callable[[int, int, str], None]

ENGINES = ("nvquant", "llmcompressor")


def _ignore_stage(_done: int, _total: int, _phase: str) -> None:
    pass


@dataclass(frozen=True)
class ConvertRequest:
    """A request to convert a model, in plain values. None stands for the recipe's value, or for the default.

    Attributes:
        model: a folder, or a model on the Hub.
        output: None for MODEL-RECIPE in the current folder.
        fold: `auto` for exact folds before quantizing, `off` for none. None for the recipe's, or else the quantizer's.
        calibration_fallback: a set to calibrate with if the Hub data set is not available.
        memory_budget: bytes, on the GPU and on the host each. None for the free memory.
        restart: begin anew instead of resuming an unfinished run.
        profile: a folder for a phase table and a trace.
        engine: one of `ENGINES`.
        low_disk: fetch the weights of a model on the Hub by ranges, and keep none.
        target_bits, target_size, max_kl: a budget, from which `sweeping.within_budget` makes the recipe. At most one.
        distill: tokens of a distillation after the conversion. None for none.
    """

    model: AnyPath
    recipe: AnyPath | Recipe = "nvfp4"
    output: AnyPath | None = None
    format: str = "compressed-tensors"
    quantizer: str | None = None
    fold: str | None = None
    calibration: AnyPath | None = None
    calibration_fallback: AnyPath | None = None
    samples: int | None = None
    sequence_length: int | None = None
    batch_size: int = 1
    seed: int = 0
    device: str = "auto"
    memory_budget: int | None = None
    restart: bool = False
    profile: AnyPath | None = None
    engine: str = "nvquant"
    revision: str | None = None
    low_disk: bool = False
    target_bits: float | None = None
    target_size: int | None = None
    max_kl: float | None = None
    distill: int | None = None


class Conversion:
    """A conversion: the constructor opens the model and computes its plan, `run` executes it.

    Attributes:
        plan: the files and tensors of the output.
        target: the folder of the output.
        is_first: whether this process speaks for all ranks of the run. Known after `run` has begun.
    Args:
        say: called with messages about the run, each a sentence or a line of facts.
    Raises:
        InputError: wrong options, or see `make_plan`.
    """

    def __init__(self, request: ConvertRequest, say: Say) -> None:
        if request.engine not in ENGINES:
            raise unknown_name("engine", request.engine, ENGINES)
        if request.distill is not None and (request.low_disk or request.engine != "nvquant"):
            other = "--low-disk" if request.low_disk else f"--engine {request.engine}"
            raise InputError(
                f"{other} and a distillation exclude each other", where="--distill", hint="Drop one of the two options"
            )
        if request.low_disk and request.engine != "nvquant":
            raise InputError(
                f"--engine {request.engine} reads the whole model from the disk",
                where="--low-disk",
                hint="Drop one of the two options",
            )
        self._request, self._say = request, say
        recipe = as_recipe(request.recipe)
        pin = partial(_where_it_began, request, recipe.name, say)
        self.plan = make_plan(
            str(request.model),
            recipe,
            request.format,
            request.revision,
            request.low_disk,
            pin,
            request.quantizer,
            say=say,
        )
        from ..stream.trace import prepare_folder

        if request.distill is not None and "MXFP4" in self.plan.casts.values():
            raise InputError(
                f"{self.plan.model} keeps its MXFP4 codes and scales, and a distillation would change them",
                where="--distill",
                hint="Drop the option",
            )
        self._fold = makes_folds(self.plan, request.fold, request.engine)
        self.target = output_of(request, self.plan.source.name, recipe.name)
        self.is_first = True
        if request.profile is not None:
            prepare_folder(Path(request.profile))

    def run(self, stop: StopRequest, display: Display, stages: Stages = _ignore_stage) -> ConvertResult:
        """Convert, and distill where it is requested.

        Args:
            stop: checked between batches for a request to end the run.
            display: opens a display of the progress and returns its sink. Only the first rank opens one.
            stages: called with (done, total, phase) by a distillation.
        Raises:
            EnvironmentLack: no such device.
            NvquantError: see `convert.pipeline.convert` and `load_calibration`.
        """
        from ..stream.trace import Trace

        request, plan = self._request, self.plan
        trace = Trace(keep_events=request.profile is not None)
        with trace.span("import"):
            from ..convert.options import ConvertOptions

            device, ranks = self._places()
        self.is_first = ranks.rank == 0
        if self.is_first:
            self._announce(device, ranks)
        else:
            logging.getLogger("nvquant").setLevel(logging.ERROR)
            stop.is_quiet = True
        loaded = self._load(trace) if plan.needs_calibration else None
        sizes = (request.batch_size, request.memory_budget)
        options = ConvertOptions(
            self.target,
            plan.quantizer,
            device,
            *sizes,
            restart=request.restart,
            stop=stop,
            ranks=ranks,
            trace=trace,
            fold=self._fold,
        )
        result = self._execute(options, loaded, display)
        result = self._distill(result, device, stop, stages)
        if request.profile is not None and self.is_first:
            trace.write(Path(request.profile))
        return result

    def _distill(self, result: ConvertResult, device: str, stop: StopRequest, stages: Stages) -> ConvertResult:
        """Distill the output, if it is requested.

        Raises:
            InputError: no distillation is requested, but the output is distilled.
        """
        request = self._request
        if request.distill is None:
            if result.was_finished:
                refuse_distilled(self.target)
            return result
        distilled = distill_converted(
            self.plan,
            self.target,
            DistillRequest(
                self.target,
                request.model,
                self.target,
                request.distill,
                device=device.partition(":")[0],
                memory_budget=request.memory_budget,
                restart=request.restart,
            ),
            stop,
            stages,
        )
        return replace(result, distillation=distilled.as_json())

    def _places(self) -> tuple[str, Ranks]:
        """The device and the ranks of this run, after a check that its output and its downloads fit on the disk."""
        from ..convert.output import check_cache, check_output
        from ..convert.ranks import join_ranks

        plan = self.plan
        check_output(self.target, plan.file_bytes, plan.source.folder)
        check_cache(plan.source, self.target, plan.file_bytes)
        found, ranks = join_ranks(resolve_device(self._request.device))
        if self._request.low_disk and ranks.size > 1:
            raise InputError(
                "every rank would fetch the whole model", where="--low-disk", hint="Drop the option, or use one rank"
            )
        if self._request.distill is not None:
            if ranks.size > 1:
                raise InputError(
                    "several ranks cannot distill together", where="--distill", hint="Drop the option, or use one rank"
                )
            check_distillation(plan, self._request.distill, found, self._request.memory_budget)
        return found, ranks

    def _announce(self, device: str, ranks: Ranks) -> None:
        from ..format.native import TARGETS

        where = f"{device}, {ranks.size} ranks" if ranks.size > 1 else device
        quantizer = f"folds and {self.plan.quantizer}" if self._fold else self.plan.quantizer
        how = f"recipe {self.plan.recipe.name}, {quantizer}, {self.plan.layout.name}"
        self._say(f"nvquant {__version__}: {named(self.plan)} -> {self.target}, {how}, {where}")
        if device == "cpu" and not TARGETS:
            self._say("The compiled CPU kernels are not installed. PyTorch computes the same bytes more slowly.")

    def _load(self, trace: Trace) -> CalibrationSet:
        """The calibration samples of the request, or else of the recipe."""
        request = self._request
        size = calibration_size(self.plan, request.samples, request.sequence_length)
        sizes = (size.samples, size.sequence_length, request.seed)
        with trace.span("samples"):
            say = self._say if self.is_first else lambda _text: None
            return load_samples(self.plan, request.calibration, request.calibration_fallback, *sizes, say=say)

    def _execute(self, options: ConvertOptions, loaded: CalibrationSet | None, display: Display) -> ConvertResult:
        """Convert with the engine, and show its progress."""
        if self._request.engine == "llmcompressor":
            from ..convert.second_opinion import convert_with_llmcompressor as run
        else:
            from ..convert.pipeline import convert as run
        if not self.is_first:
            return run(self.plan, options, loaded)
        with display() as sink:
            return run(self.plan, replace(options, progress=sink), loaded)


def output_of(request: ConvertRequest, source: str, recipe: str) -> Path:
    """The folder of the output, MODEL-RECIPE by default."""
    return Path(request.output or f"{source.rpartition('/')[2]}-{recipe}")


def _where_it_began(request: ConvertRequest, recipe: str, say: Say, remote: HubModel) -> HubModel:
    """The model at the commit of an unfinished run, although its branch may have moved."""
    if request.restart or remote.revision == remote.commit:
        return remote
    from ..checkpoint.hub.repository import find_model
    from ..convert.journal import Journal
    from ..convert.output import partial_folder

    identity = Journal(partial_folder(output_of(request, remote.repo, recipe))).identity() or {}
    began = identity.get("source", {}).get("hub") or {}
    if began.get("id") != remote.repo or began.get("commit") in (None, remote.commit):
        return remote
    say(f"{remote.repo} has moved to {remote.commit[:12]}. The run resumes at its first commit {began['commit'][:12]}.")
    return find_model(remote.repo, began["commit"], endpoint=remote.endpoint, cache=remote.cache)
