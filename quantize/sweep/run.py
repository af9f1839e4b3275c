"""A sweep: measure every fused group alone, then choose by budgets. It writes no part of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..calibrate.model_class import import_model_code
from ..calibrate.samples import CalibrationSet
from ..calibrate.walk import make_batches
from ..checkpoint.places import refuse_link
from ..checkpoint.writer import write_json
from ..convert.checks import check_conversion
from ..convert.identity import difference, run_identity
from ..convert.options import ConvertOptions
from ..convert.pipeline import circumstances
from ..convert.survey import Survey, in_order
from ..convert.watch import Watch
from ..errors import InputError
from ..plan.plan import Plan, compute_plan
from ..quantizers import get_quantizer
from ..recipe.schema import Recipe
from ..verify.threads import Progress
from .candidates import candidates_of
from .choice import Point, curve, schemes_at
from .document import (
    NAME,
    PointRecord,
    RecipeRecord,
    SweepDocument,
    measurement,
    parsed,
    read_document,
)
from .recipes import recipe_for
from .targets import Target, chosen
from .walking import Subject, Window

MEASURING = ("rtn", "mse")
DEFAULT_QUANTIZER = "mse"


@dataclass(frozen=True)
class Chosen:
    """The recipe for a budget, and its entry in the document."""

    recipe: Recipe
    record: RecipeRecord


class Sweep:
    """A sweep of a plan in its folder.

    Args:
        plan: of the recipe. Its quantizer is that of the conversion, and measures if it is one of `MEASURING`.
        options: the device, the memory budget, `restart` and `fold`. `output` is the folder.
        calibration: the sequences to measure on.
        progress: called with (done, total, words).
    Raises:
        InputError: the folder contains another sweep or foreign files, or the recipe quantizes no decoder layer.
    """

    def __init__(self, plan: Plan, options: ConvertOptions, calibration: CalibrationSet, progress: Progress) -> None:
        self._plan, self._options, self._calibration, self._progress = plan, options, calibration, progress
        self._dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        name = plan.quantizer if plan.quantizer in MEASURING else DEFAULT_QUANTIZER
        self._quantizer = get_quantizer(name)
        self._candidates = candidates_of(plan)
        if not self._candidates:
            raise InputError(
                f"recipe {plan.recipe.name} quantizes no matrix of a decoder layer", hint="sweep another recipe"
            )
        run = circumstances(options, self._dtype, calibration)
        self._identity = run_identity(plan, name, calibration, run, options.fold).as_json()

    def measure(self) -> SweepDocument:
        """Measure the groups that no earlier run of this sweep has measured. Each walk's results are kept.

        Raises:
            NvquantError: see `Window.run`.
        """
        document = self._begun()
        todo = [layer for layer in dict.fromkeys(c.layer for c in self._candidates) if layer not in document.layers]
        if not todo:
            return document
        import_model_code(self._plan.source)
        try:
            return self._measured(self._with_order(document), todo)
        finally:
            self._plan.source.content.end()

    def _measured(self, document: SweepDocument, todo: list[int]) -> SweepDocument:
        """The document with the measurements of more layers."""
        subject = self._subject(document)
        while todo:
            has_ends = not document.ends
            window = subject.window(todo, has_ends)
            measured = Window(subject, window, has_ends, self._progress).run()
            groups = [
                measurement(one, [measured.alone[one.group.name, scheme] for scheme in one.schemes])
                for layer in window
                for one in subject.in_layer(layer)
            ]
            ends = tuple(measured.ends) if has_ends else document.ends
            every = tuple(sorted([*document.groups, *groups], key=lambda group: group.layer))
            document = self._kept(document.with_(groups=every, ends=ends))
            todo = [layer for layer in todo if layer not in window]
        return document

    def choose(self, document: SweepDocument, targets: Sequence[Target]) -> tuple[SweepDocument, list[Chosen]]:
        """The curve, and a recipe for each budget.

        Raises:
            InputError: a budget is impossible.
            CheckFailed: vLLM would read a recipe's config in another way.
        """
        points = self._curve(document)
        found = [self._chosen(document, points, target) for target in targets]
        drawn = tuple(PointRecord(**{key: getattr(p, key) for key in PointRecord.model_fields}) for p in points)
        return self._kept(document.with_(curve=drawn, recipes=tuple(one.record for one in found))), found

    def _curve(self, document: SweepDocument) -> list[Point]:
        first, last = document.ends[0], document.ends[-1]
        return curve(document.ladders, first, last, self._plan.tensor_bytes)

    def _chosen(self, document: SweepDocument, points: Sequence[Point], target: Target) -> Chosen:
        name = recipe_name(self._plan.recipe, target)
        plans: dict[Point, Plan] = {}

        def planned(point: Point) -> Plan:
            if point not in plans:
                schemes = schemes_at(document.ladders, point)
                words = f"{self._plan.recipe.name} with mixed precision by nvquant sweep {target.words}"
                recipe = recipe_for(self._plan, self._candidates, schemes, name, words)
                recipe = recipe.model_copy(update={"fold": self._fold})
                plan = self._plan
                plans[point] = compute_plan(plan.source, recipe, plan.layout, plan.model, plan.quantizer)
            return plans[point]

        point = chosen(points, target, lambda point: planned(point).file_bytes)
        plan = planned(point)
        check_conversion(plan)
        counts: dict[str, int] = {}
        for scheme in schemes_at(document.ladders, point).values():
            counts[scheme] = counts.get(scheme, 0) + 1
        record = RecipeRecord(
            target=target.words,
            name=name,
            file=f"{name}.yaml",
            bits=point.bits,
            file_bytes=plan.file_bytes,
            kl=point.kl,
            groups=counts,
        )
        return Chosen(plan.recipe, record)

    @property
    def _fold(self) -> str | None:
        """The recipes' choice of folds: that of this sweep, unless recipe and quantizer choose it anyway."""
        recipe, folds = self._plan.recipe, self._options.fold
        by_default = get_quantizer(self._plan.quantizer).folds if recipe.fold is None else recipe.fold == "auto"
        return recipe.fold if by_default == folds else "auto" if folds else "off"

    def _begun(self) -> SweepDocument:
        """The document of an earlier run of this sweep, or a new one."""
        folder = self._options.output
        refuse_foreign_folder(folder)
        found = None if self._options.restart else read_document(folder)
        if found is None:
            return parsed({**self._identity}, folder)
        differs = difference(found, self._identity)
        if differs is not None:
            raise InputError(
                f"{folder} contains another sweep ({differs})",
                where=folder,
                hint="use the same files and options to resume it, choose another folder with -o, or use --restart",
            )
        return parsed(found, folder)

    def _kept(self, document: SweepDocument) -> SweepDocument:
        folder = self._options.output
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / NAME, document.as_json())
        return document

    def _with_order(self, document: SweepDocument) -> SweepDocument:
        """With the order of the residual stream's channels that a conversion with folds chooses."""
        if not self._options.fold or document.residual is not None:
            return document
        self._options.output.mkdir(parents=True, exist_ok=True)
        watch = Watch(self._options)
        survey = Survey(self._plan, self._calibration, self._options, self._dtype, self._options.output, watch)
        return self._kept(document.with_(residual=survey.record()))

    def _subject(self, document: SweepDocument) -> Subject:
        plan = self._plan
        if document.residual is not None:
            plan = replace(plan, source=in_order(plan.source, document.residual))
        batches = make_batches(self._calibration.samples, 1)
        folder = self._options.output
        folder.mkdir(parents=True, exist_ok=True)
        return Subject(plan, self._candidates, self._quantizer, batches, self._dtype, self._options, folder)


def recipe_name(recipe: Recipe, target: Target) -> str:
    """The name of the recipe for a budget."""
    return f"{recipe.name}-{target.suffix}"


def refuse_foreign_folder(folder: Path) -> None:
    """Refuse a folder for a sweep that contains files and no sweep.

    Raises:
        InputError: it does, or it is no folder.
    """
    refuse_link(folder)
    refuse_link(folder / NAME)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / NAME).is_file())):
        raise InputError(
            f"-o {folder} exists, but nvquant sweep did not write it", where="-o", hint="choose another folder"
        )
