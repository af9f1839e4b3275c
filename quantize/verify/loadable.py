"""Checks that a server's loader finds all tensors, made on the headers before any stage that takes minutes.

vLLM does not check a quantized checkpoint for missing tensors. It starts, and answers with the contents of
uninitialized memory for a scale or a norm that nothing filled (0.32, `track_weights_loading`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..calibrate.skeleton import wanted_shapes
from ..errors import EnvironmentLack, InputError
from ..recipe.roles import Role, layer_index, role_of
from ..weights.stored import KV_SCALES, input_leaf, split_name
from .files import check_headers
from .numerics.served import ServedModel
from .report import Check, Finding, counted
from .served import served_layers
from .structure import ALONE, STAGE
from .subject import Subject

# Of the structure's checks, those that read no weight and say whether a loader finds what it needs.
COUNTED = ("index", "layout", "matrices", "config", "architecture")
COMPLETE = "complete"


def loading_checks(subject: Subject, is_proved: bool) -> Iterator[Check]:
    """The checks of headers and configs that fail, for stages that run without the stage structure.

    Args:
        is_proved: whether the structure was verified before. Only checks outside of it run then.
    """
    headers = Check(STAGE, "headers", check_headers(subject))
    if not headers.passed:
        if not is_proved:
            yield headers
        return
    counted_checks = () if is_proved else (Check(STAGE, name, ALONE[name](subject)) for name in COUNTED)
    for check in (*counted_checks, Check(STAGE, COMPLETE, check_complete(subject))):
        if not check.passed:
            yield check


def check_complete(subject: Subject) -> Finding:
    """Check that every tensor of the model's class is stored, in the shape that config.json describes, and that every
    matrix whose scheme requires an input scale has one.

    Where transformers does not know the class, or the checkpoint uses other names, only input scales are checked.
    """
    scales = [
        f"{module} lacks {input_leaf(subject.layout, form)}, which its scheme {form.words} requires"
        for layer in served_layers(subject)
        if (form := subject.layout.schemes.get(layer.verdict)) is not None and form.inputs == "calibrated"
        for module in layer.quantized
        if not subject.matrices[module].has_input_scale
    ]
    wanted, prefix = _wanted(subject)
    stored = {name: info.shape for name, info in subject.infos.items() if name in subject.roles}
    stored |= {f"{module}.weight": (matrix.rows, matrix.cols) for module, matrix in subject.sound.items()}
    damaged = {f"{module}.weight" for module in subject.matrices if module not in subject.sound}  # `matrices` tells
    missing = [name for name in _missing(subject, wanted, stored, prefix) if name not in damaged]
    faults = [f"{name} is not stored" for name in missing]
    faults += [
        f"{name} has shape {list(stored[name])}, but config.json describes {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape and role_of(name, shape) is not Role.EMBEDDING
    ]
    return Finding(f"{counted(len(wanted), 'tensor')} of the model's decoder", [*faults, *scales])


def _wanted(subject: Subject) -> tuple[Mapping[str, tuple[int, ...]], str]:
    """The tensors of the model's decoder, and the prefix of a layer's number. Empty where they are unknown."""
    try:
        model = ServedModel(subject)
        return wanted_shapes(model, model.prefix), model.prefix
    except (InputError, EnvironmentLack):
        return {}, ""


def _missing(
    subject: Subject, wanted: Mapping[str, object], stored: Mapping[str, object], prefix: str
) -> Iterator[str]:
    """Tensors of the decoder that are nowhere.

    Some checkpoints store what the class has under other names, as experts one by one. So a tensor that no layer stores
    is missed only where no layer stores anything else instead.
    """
    layers = {layer_index(name, prefix) for name in wanted} - {None}
    inside = {name for name in stored if layer_index(name, prefix) in layers}
    places = {_place(name, prefix) for name in inside}
    others = [
        name for name in inside
        if name not in wanted and name not in subject.unused and split_name(name)[1] not in KV_SCALES
    ]  # fmt: skip
    for name in wanted:
        if name not in stored:
            is_inside = layer_index(name, prefix) is not None
            if not others or (is_inside and _place(name, prefix) in places):
                yield name


def _place(name: str, prefix: str) -> str:
    """A tensor's name inside of its layer."""
    return name[len(prefix) + 1 :].partition(".")[2]
