"""The matrices of a model that a recipe quantizes. Every misfit of the two is an error here, before any work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.headers import TensorInfo
from ..errors import InputError, ShapeError
from ..format.constants import BLOCK
from .decoder import decoder_prefix, unexpected_layer
from .groups import FusedGroup, Fusions
from .heads import OWN_NAME, HeadSource, head_source
from .patterns import matches
from .roles import QUANTIZABLE, Role, describe, gates_a_recurrence, module_of, roles_of, unused_tensors
from .schema import SELECTORS, Recipe, SchemeName

SOURCE_DTYPES = ("BF16", "F16", "F32")
_SELECTED_ROLE = {"mlp": Role.MLP, "attention": Role.ATTENTION, "linear": Role.LINEAR}


@dataclass(frozen=True)
class Selection:
    """The effect of a recipe on a model.

    Attributes:
        schemes: name of the scheme of each quantized module, in the model's order.
        groups: the fused groups of these modules.
        roles: role of every tensor.
        unused: tensors that no layer of the model reads (k and v of layers that share another layer's). They are
            copied.
        head: the quantized head, which is the last of the modules, or None.
    """

    schemes: Mapping[str, SchemeName]
    groups: tuple[FusedGroup, ...]
    roles: Mapping[str, Role]
    unused: frozenset[str]
    head: HeadSource | None = None


def select(recipe: Recipe, tensors: Mapping[str, TensorInfo], model: str, config: Mapping[str, Any]) -> Selection:
    """Match a recipe with the tensors of a checkpoint.

    Args:
        tensors: all tensors of the source, by name, in the model's order.
        model: its name in messages.
        config: the model's config.json.
    Raises:
        InputError: a pattern matches nothing, a matrix that must stay unquantized, or only some members of a fused
            group. Two entries overlap, or the recipe does not mention that the model is a mixture of experts, or
            quantizes a head that the model does not have.
        ShapeError: a matrix whose columns are not a multiple of 16.
    """
    shapes = {name: info.shape for name, info in tensors.items()}
    _check_layers(shapes, config, model)
    roles = roles_of(shapes, config)
    unused = unused_tensors(config, tensors)
    roles.update(dict.fromkeys(unused, Role.OTHER))
    _check_experts(recipe, roles, model)
    fusions = fusions_of(shapes, config)
    source = _Source(tensors, roles, unused, fusions, model)
    schemes: dict[str, SchemeName] = {}
    for entry in recipe.quantize:
        for pattern in entry.modules:
            for module in _matches(pattern, source, recipe):
                if module in schemes:
                    raise InputError(
                        f"'{pattern}' matches {module}, which an earlier entry already quantizes",
                        where=f"recipe {recipe.name}",
                        hint="change one of the two patterns",
                    )
                schemes[module] = entry.scheme
    if not schemes and recipe.head_scheme is None:
        raise _nothing_found([pattern for entry in recipe.quantize for pattern in entry.modules], source, recipe)
    ordered = {
        module_of(name): schemes[module_of(name)]
        for name in tensors
        if module_of(name) in schemes and name.endswith(".weight")
    }
    head = None if recipe.head_scheme is None else _head(recipe, shapes, model, config)
    stored = {module: f"{module}.weight" for module in ordered}
    if head is not None and recipe.head_scheme is not None:
        ordered[head.module], stored[head.module] = recipe.head_scheme, head.tensor
        roles[f"{head.module}.weight"] = Role.HEAD
    _check_matrices(stored, tensors)
    groups = fusions.groups(ordered)
    _check_groups(recipe, groups, ordered, roles, fusions)
    return Selection(ordered, groups, roles, unused, head)


def _head(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], model: str, config: Mapping[str, Any]) -> HeadSource:
    head = head_source(shapes, config)
    if head is None:
        raise InputError(
            f"{model} has no output head (it stores none, and config.json ties none to the embedding), as a classifier",
            where=f"recipe {recipe.name}",
            hint="remove the key `head`",
        )
    return head


def fusions_of(tensors: Iterable[str], config: Mapping[str, Any]) -> Fusions:
    """The matrices of an unquantized model that servers fuse, from the names of its tensors."""
    return Fusions((module_of(name) for name in tensors if name.endswith(".weight")), config)


def _check_layers(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], model: str) -> None:
    unexpected = unexpected_layer(shapes, config, decoder_prefix(shapes, config) or "")
    if unexpected is not None:
        raise InputError(
            f"{model} stores {unexpected}, but config.json describes fewer decoder layers",
            where=model,
            hint="use the config.json that belongs to these weights",
        )


@dataclass(frozen=True)
class _Source:
    """The tensors that patterns are matched with. See `select` and `Selection`."""

    tensors: Mapping[str, TensorInfo]
    roles: Mapping[str, Role]
    unused: frozenset[str]
    fusions: Fusions
    model: str

    @property
    def modules(self) -> dict[str, str]:
        """The tensor of each module that owns a weight or is an expert."""
        return {
            module_of(name): name
            for name in self.tensors
            if name.endswith(".weight") or self.roles[name] is Role.EXPERT
        }

    def selected(self, selector: str) -> list[str]:
        """Modules of a selector's role."""
        role = _SELECTED_ROLE[selector]
        found = [module for module, name in self.modules.items() if self.roles[name] is role]
        return self._without_gates(found) if role is Role.LINEAR else found

    def _without_gates(self, modules: list[str]) -> list[str]:
        """Those that gate no recurrence, are not fused with such a gate, and divide into blocks."""
        left_out = {module for module in modules if gates_a_recurrence(module) or not self._divides(module)}
        fused = {self.fusions.name(module) for module in left_out}
        return [module for module in modules if self.fusions.name(module) not in fused]

    def _divides(self, module: str) -> bool:
        return self.tensors[f"{module}.weight"].shape[1] % BLOCK == 0


def _matches(pattern: str, source: _Source, recipe: Recipe) -> list[str]:
    """The modules of a pattern. A selector may have none, because not every model has every role."""
    modules = source.modules
    if pattern in SELECTORS:
        found = source.selected(pattern)
    elif pattern.startswith("re:"):
        expression = pattern.removeprefix("re:")
        found = [
            module
            for module, name in modules.items()
            if len(source.tensors[name].shape) > 1 and matches(expression, module)
        ]
    else:
        found = [module for module in modules if module == pattern]
    found = [module for module in found if modules[module] not in source.unused]
    if not found and pattern not in SELECTORS:
        raise _nothing_found([pattern], source, recipe)
    protected = [module for module in found if source.roles[modules[module]] not in QUANTIZABLE]
    if protected:
        what = source.roles[modules[protected[0]]].value
        head = ", or quantize the head with the key `head`" if what == Role.HEAD.value else ""
        raise InputError(
            f"recipe {recipe.name}: pattern '{pattern}' matches {describe(protected)} ({what}), which vLLM "
            f"serves unquantized",
            where=f"recipe {recipe.name}",
            hint=f"limit the pattern to the text decoder's layers, or use the selectors mlp and attention{head}",
        )
    return found


def _nothing_found(patterns: list[str], source: _Source, recipe: Recipe) -> InputError:
    """The error of patterns that match nothing, with the reason that lies in the model if there is one."""
    model, roles = source.model, source.roles
    if Role.TRANSPOSED in roles.values():
        return InputError(
            f"{model} stores its matrices transposed, as GPT-2 does, which vLLM cannot serve in NVFP4",
            where=model,
            hint="choose a model of another architecture",
        )
    text = [module for module, name in source.modules.items() if roles[name] in QUANTIZABLE]
    names = describe(sorted({re.sub(r"\d+", "N", module) for module in text}), 4)
    quoted = " and ".join(f"'{pattern}'" for pattern in patterns)
    verb = "pattern {} matches" if len(patterns) == 1 else "patterns {} match"
    return InputError(
        f"recipe {recipe.name}: {verb.format(quoted)} no matrix of {model}, whose text matrices are {names or 'none'}",
        where=f"recipe {recipe.name}",
        hint=_way_out(patterns),
    )


def _way_out(patterns: list[str]) -> str:
    """The hint for patterns that match nothing."""
    if any(OWN_NAME in pattern for pattern in patterns):
        return "to quantize the head, use the key `head`"
    if all(pattern in SELECTORS for pattern in patterns):
        return "choose a recipe that quantizes other matrices, or another model"
    return "correct the pattern"


def _check_matrices(stored: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    for tensor in stored.values():
        info = tensors[tensor]
        if len(info.shape) != 2 or info.shape[1] % BLOCK:
            raise ShapeError(info.name, info.shape)
        if info.dtype not in SOURCE_DTYPES:
            raise InputError(
                f"{info.name} is stored as {info.dtype}, but nvquant reads BF16, F16 and F32",
                where=info.name,
                hint="convert the unquantized model",
            )


def _check_experts(recipe: Recipe, roles: Mapping[str, Role], model: str) -> None:
    experts = [name for name, role in roles.items() if role is Role.EXPERT]
    if experts and recipe.experts == "refuse":
        raise InputError(
            f"{model} is a mixture of experts ({describe(experts, 1)}), and nvquant does not quantize experts yet",
            where=model,
            hint="write a recipe with `experts: bf16` to leave them in BF16",
        )


def _check_groups(
    recipe: Recipe,
    groups: tuple[FusedGroup, ...],
    schemes: Mapping[str, SchemeName],
    roles: Mapping[str, Role],
    fusions: Fusions,
) -> None:
    siblings: dict[str, list[str]] = {}
    for name, role in roles.items():
        if role in QUANTIZABLE:
            siblings.setdefault(fusions.name(module_of(name)), []).append(module_of(name))
    for group in groups:
        missing = [module for module in siblings.get(group.name, ()) if module not in schemes]
        if missing:
            raise InputError(
                f"recipe {recipe.name} quantizes {describe(group.members)}, but not {describe(missing)}, which "
                "vLLM fuses with it",
                hint="quantize all of them or none",
            )
        if len({schemes[module] for module in group.members}) > 1:
            raise InputError(
                f"{describe(group.members)} have different schemes, but vLLM fuses them",
                where=f"recipe {recipe.name}",
                hint="give them the same scheme",
            )
