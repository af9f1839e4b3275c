"""Models, recipes, layouts and devices by their names, for the library's functions and the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, get_args

from ..checkpoint.diagnosis import adapter_beside, names_in
from ..checkpoint.source import Checkpoint, open_checkpoint
from ..errors import EnvironmentLack, InputError, unknown_name
from ..format.layouts import FORMAT_NAMES, LAYOUTS, Layout
from ..plan.plan import Plan, compute_plan
from ..recipe.load import load_recipe
from ..recipe.schema import FoldName, Recipe
from ..weights.decoding import form_notes

if TYPE_CHECKING:
    from ..calibrate.samples import CalibrationSet
    from ..checkpoint.hub.repository import HubModel

Pin: TypeAlias = "Callable[[HubModel], HubModel]"
Say: TypeAlias = Callable[[str], None]
AnyPath: TypeAlias = str | Path
DEVICES = ("auto", "cuda", "cpu")
FOLDS = get_args(FoldName)


def as_recipe(recipe: AnyPath | Recipe) -> Recipe:
    """A recipe, or the recipe with this shipped name or path.

    Raises:
        InputError: see `load_recipe`.
    """
    return recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))


def as_layout(name: str) -> Layout:
    """The layout with this name.

    Raises:
        InputError: no layout has that name.
    """
    if name not in LAYOUTS:
        raise unknown_name("layout", name, FORMAT_NAMES)
    return LAYOUTS[name]


def as_quantizer(name: str | None, recipe: Recipe) -> str:
    """The name of a quantizer that exists: the given one, or the recipe's.

    Raises:
        InputError: no quantizer has that name.
    """
    from ..quantizers import get_quantizer

    return get_quantizer(name or recipe.quantizer).name


def resolve_device(device: str) -> str:
    """The device of this name for torch. `auto` is a GPU if there is one.

    Raises:
        EnvironmentLack: `cuda` is requested, and torch sees no GPU.
        InputError: no device has that name.
    """
    if device not in DEVICES:
        raise unknown_name("device", device, DEVICES)
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentLack(
            f"--device cuda: torch {torch.__version__} sees no CUDA device",
            where="--device",
            hint="Use --device cpu, or install a CUDA build of torch",
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def open_model(
    model: str, revision: str | None = None, low_disk: bool = False, pin: Pin = lambda remote: remote
) -> Checkpoint:
    """The source checkpoint that MODEL names: a folder, or a model on the Hub as `org/name` or `org/name@revision`.

    Args:
        low_disk: read the weights of a model on the Hub by ranges, and keep none.
        pin: may choose another commit of a model on the Hub.
    Raises:
        InputError: neither exists, it is not a safetensors model, or an option fits only the other kind.
    """
    remote = find_remote(model, revision)
    if remote is None:
        if low_disk:
            raise InputError(
                f"--low-disk works only for models on the Hub, and {model} is a folder",
                where="--low-disk",
                hint="Drop the option",
            )
        return open_checkpoint(Path(model))
    from ..checkpoint.hub.source import open_hub_checkpoint

    return open_hub_checkpoint(pin(remote), low_disk)


def find_remote(model: str, revision: str | None = None) -> HubModel | None:
    """The model on the Hub that a name means, or None for a folder and for a name that only a folder can have.

    Raises:
        InputError: the Hub has no such model or revision, or cannot be reached. Two revisions are given, or one of a
            folder.
    """
    from ..checkpoint.hub.errors import HubError
    from ..checkpoint.hub.repository import find_model, hub_name

    named = None if _exists(Path(model)) else hub_name(model)
    if named is None:
        if revision is not None:
            raise InputError(f"--revision {revision}: only a model on the Hub has revisions, and {model} is a folder.")
        return None
    repo, of_name = named
    if of_name is not None and revision not in (None, of_name):
        raise InputError(
            f"{model} names the revision {of_name}, and --revision names {revision}",
            where=model,
            hint="Give one of them",
        )
    try:
        return find_model(repo, of_name or revision)
    except HubError as refusal:  # whoever meant a folder would not look for it on the Hub
        raise HubError(f"There is no folder {model} here, so nvquant looked for it on the Hub. {refusal}") from refusal


def make_plan(
    model: str,
    recipe: AnyPath | Recipe,
    format_name: str,
    revision: str | None = None,
    low_disk: bool = False,
    pin: Pin = lambda remote: remote,
    quantizer: str | None = None,
    *,
    say: Say,
) -> Plan:
    """Open MODEL (see `open_model`), load the recipe, compute the plan.

    Args:
        quantizer: its name. None for the recipe's.
        say: called with sentences about an adapter beside the model, and about a quantized source.
    Raises:
        InputError: see `open_model`, `load_recipe` and `compute_plan`.
    """
    found, layout = as_recipe(recipe), as_layout(format_name)
    source, name = open_source(model, revision, low_disk, pin, say=say)
    plan = compute_plan(source, found, layout, name, as_quantizer(quantizer, found))
    for note in form_notes(plan.source):
        say(note)
    return plan


def open_source(
    model: str,
    revision: str | None = None,
    low_disk: bool = False,
    pin: Pin = lambda remote: remote,
    *,
    say: Say,
) -> tuple[Checkpoint, str]:
    """Open MODEL (see `open_model`). Returns it with its name in messages.

    Args:
        say: called with a sentence about an adapter beside the model.
    Raises:
        InputError: see `open_model`.
    """
    source = open_model(model, revision, low_disk, pin)
    name = model.rstrip("/") if source.hub is None else source.hub.repo
    adapter = adapter_beside(names_in(source.folder) if source.hub is None else source.hub.files)
    if adapter is not None:
        say(f"{name} also contains a LoRA adapter ({adapter}), which nvquant neither merges nor converts.")
    return source, name


def checked_plan(model: AnyPath, recipe: AnyPath | Recipe, format_name: str, revision: str | None, *, say: Say) -> Plan:
    """A plan that `convert` would execute. See `make_plan`.

    Raises:
        CheckFailed, EnvironmentLack, InputError: see `make_plan` and `convert.checks.check_conversion`.
    """
    plan = make_plan(str(model), recipe, format_name, revision, say=say)
    from ..convert.checks import check_conversion

    check_conversion(plan)
    return plan


def makes_folds(plan: Plan, fold: str | None, engine: str = "nvquant") -> bool:
    """Whether a run makes exact folds.

    Args:
        fold: one of `FOLDS`. None for the recipe's choice, or else the quantizer's. Folds would change the codes of an
            MXFP4 source, which then is requantized, so they require a choice.
    Raises:
        InputError: an unknown choice, or one that the run cannot make.
    """
    from ..quantizers import get_quantizer

    chosen = fold or plan.recipe.fold
    if chosen is not None and chosen not in FOLDS:
        raise unknown_name("choice of folds", chosen, FOLDS)
    if chosen == "auto" and engine != "nvquant":
        raise InputError(f"--engine {engine} makes no folds", where="--fold", hint="Drop one of the two options")
    if chosen == "auto" and not plan.needs_calibration:
        raise InputError(
            f"recipe {plan.recipe.name} calibrates nothing, and folds require inputs",
            where="--fold",
            hint="Use --fold off, or a recipe with quantized inputs",
        )
    keeps_codes = "MXFP4" in plan.casts.values()
    is_wanted = (get_quantizer(plan.quantizer).folds and not keeps_codes) if chosen is None else chosen == "auto"
    return is_wanted and plan.needs_calibration and engine == "nvquant"


def load_samples(
    plan: Plan,
    calibration: AnyPath | None,
    fallback: AnyPath | None,
    samples: int,
    sequence_length: int,
    seed: int,
    *,
    in_equal_kinds: bool = False,
    say: Say,
) -> CalibrationSet:
    """The calibration samples of a set, or else of the recipe's.

    Args:
        fallback: the set to use if the Hub data set is not available. None to raise.
        in_equal_kinds: whether each kind of text gets as many samples.
        say: called with a sentence about the samples.
    Raises:
        NvquantError: see `load_calibration`.
    """
    from ..calibrate.samples import load_calibration
    from ..checkpoint.hub.errors import HubError

    def load(name: AnyPath) -> CalibrationSet:
        return load_calibration(
            str(name),
            model_folder=plan.source.folder,
            config=plan.source.config,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            in_equal_kinds=in_equal_kinds,
        )

    try:
        loaded = load(calibration or plan.recipe.calibration.set)
    except HubError as refusal:
        if fallback is None:
            raise
        say(f"{refusal} Calibrating with the --calibration-fallback {fallback}.")
        loaded = load(fallback)
    say(f"calibration {loaded.name}: {len(loaded.samples)} samples, {loaded.tokens:,} tokens, {loaded.framing}")
    return loaded


def named(plan: Plan) -> str:
    """The model of a plan by its name, with the commit of a model on the Hub."""
    hub = plan.source.hub
    return plan.model if hub is None else f"{hub.repo} at {hub.commit[:12]}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for the system, or a folder that may not be searched
        return False
