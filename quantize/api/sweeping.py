"""A sweep from plain values, for `nvquant.sweep`, the command `sweep` and conversions with a budget."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..recipe.schema import Recipe
from .conversion import ConvertRequest, output_of
from .inputs import AnyPath, Say, as_recipe, load_samples, make_plan, makes_folds, named, resolve_device

if TYPE_CHECKING:
    from ..plan.plan import Plan
    from ..sweep.document import SweepDocument
    from ..sweep.targets import Target
    from ..verify.threads import Progress

SUFFIX = ".sweep"
SAMPLES, SEQUENCE_LENGTH = 8, 512


@dataclass(frozen=True)
class SweepRequest:
    """A request to sweep a model, in plain values. None stands for the recipe's value, or for the default.

    Attributes:
        model: a folder, or a model on the Hub.
        output: None for MODEL-RECIPE.sweep in the current folder.
        target_bits, target_size, max_kl: budgets, for each of which a recipe is made.
        samples, sequence_length: the size of the measured text in sequences and tokens.
        memory_budget: bytes, on the GPU and on the host each. None for the free memory.
        restart: begin anew instead of resuming an earlier sweep.
    """

    model: AnyPath
    recipe: AnyPath | Recipe = "nvfp4"
    output: AnyPath | None = None
    format: str = "compressed-tensors"
    quantizer: str | None = None
    fold: str | None = None
    target_bits: Sequence[float] = ()
    target_size: Sequence[int] = ()
    max_kl: Sequence[float] = ()
    calibration: AnyPath | None = None
    calibration_fallback: AnyPath | None = None
    samples: int = SAMPLES
    sequence_length: int = SEQUENCE_LENGTH
    seed: int = 0
    device: str = "auto"
    memory_budget: int | None = None
    restart: bool = False
    revision: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        output: the folder with the files of the sweep.
        document: its measurements, its curve and an entry for each recipe.
        recipes: by their names, in the order of the budgets.
    """

    output: str
    document: SweepDocument = field(repr=False)
    recipes: dict[str, Recipe] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """The document of `sweep --json`."""
        return {"output": self.output, **self.document.as_json()}


def run_sweep(request: SweepRequest, progress: Progress, say: Say) -> SweepResult:
    """Sweep a model, and write the files of the sweep.

    Args:
        progress: called with (done, total, phase).
        say: called with messages about the run.
    Raises:
        NvquantError: see `make_plan`, `load_samples` and `nvquant.sweep.run.Sweep`.
    """
    from ..sweep.targets import targets_of

    _refuse_ranks("nvquant sweep")
    targets = targets_of(request.target_bits, request.target_size, request.max_kl)
    recipe = as_recipe(request.recipe)
    plan = make_plan(str(request.model), recipe, request.format, request.revision, quantizer=request.quantizer, say=say)
    default = f"{plan.source.name.rpartition('/')[2]}-{recipe.name}{SUFFIX}"
    return _swept(plan, replace(request, output=request.output or default), targets, progress, say)


def _swept(plan: Plan, request: SweepRequest, targets: Sequence[Target], progress: Progress, say: Say) -> SweepResult:
    """Measure and choose, in the folder that the request names."""
    fold = makes_folds(plan, request.fold)
    folder = Path(request.output or "")
    from ..convert.options import ConvertOptions
    from ..convert.output import check_cache
    from ..sweep.output import write_results
    from ..sweep.run import Sweep, refuse_foreign_folder

    refuse_foreign_folder(folder)
    check_cache(plan.source, folder, 0)
    device = resolve_device(request.device)
    say(f"sweep of {named(plan)} -> {folder}, recipe {plan.recipe.name}, {plan.layout.name}, {device}")
    sizes = (request.samples, request.sequence_length, request.seed)
    calibration = load_samples(
        plan, request.calibration, request.calibration_fallback, *sizes, in_equal_kinds=True, say=say
    )
    options = ConvertOptions(
        folder,
        plan.quantizer,
        device,
        memory_budget_bytes=request.memory_budget,
        restart=request.restart,
        fold=fold,
    )
    sweep = Sweep(plan, options, calibration, progress)
    document, found = sweep.choose(sweep.measure(), targets)
    write_results(folder, document, found)
    return SweepResult(str(folder), document, {one.record.name: one.recipe for one in found})


def within_budget(request: ConvertRequest, progress: Progress, say: Say) -> ConvertRequest:
    """The request with the recipe that fits its budget. Without a budget, it stays as it is.

    The files of the sweep stay in the folder OUTPUT.sweep. An equal call resumes or reuses them.

    Raises:
        InputError: several budgets, an impossible one, or an option that contradicts it.
        NvquantError: see `run_sweep`.
    """
    if (request.target_bits, request.target_size, request.max_kl) == (None, None, None):
        return request
    from ..convert.output import check_output
    from ..sweep.run import recipe_name
    from ..sweep.targets import only_target

    target = only_target(request.target_bits, request.target_size, request.max_kl)
    assert target is not None
    _refuse_ranks(target.option)
    if request.low_disk:
        raise InputError(
            f"{target.option} reads the model several times, and --low-disk reads it once",
            where=target.option,
            hint="Drop one of the two options",
        )
    recipe = as_recipe(request.recipe)
    plan = make_plan(str(request.model), recipe, request.format, request.revision, quantizer=request.quantizer, say=say)
    output = output_of(request, plan.source.name, recipe_name(recipe, target))
    check_output(output, plan.file_bytes, plan.source.folder)
    sweep = SweepRequest(
        request.model,
        recipe,
        output.with_name(output.name + SUFFIX),
        request.format,
        request.quantizer,
        request.fold,
        calibration=request.calibration,
        calibration_fallback=request.calibration_fallback,
        seed=request.seed,
        device=request.device,
        memory_budget=request.memory_budget,
        restart=request.restart,
        revision=request.revision,
    )
    result = _swept(plan, sweep, [target], progress, say)
    (record,) = result.document.recipes
    counts = ", ".join(f"{count} groups in {scheme}" for scheme, count in record.groups.items())
    say(f"{record.target}: {record.bits:.2f} bits a weight, {counts}, forecast of the KL divergence {record.kl:.4f}")
    chosen = result.recipes[record.name]
    return replace(request, recipe=chosen, output=output, target_bits=None, target_size=None, max_kl=None)


def _refuse_ranks(option: str) -> None:
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise InputError(
            f"{option} measures in one process, and this run has several ranks",
            where=option,
            hint="run `nvquant sweep` in one process first, then convert with the recipe that it writes",
        )
