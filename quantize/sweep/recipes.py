"""The recipe of a choice: the base recipe with an entry for each scheme."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import yaml

from ..plan.plan import Plan
from ..recipe.schema import Recipe
from .candidates import UNQUANTIZED, Candidate

WIDTH = 120


def recipe_for(
    plan: Plan, candidates: Sequence[Candidate], schemes: Mapping[str, str], name: str, description: str
) -> Recipe:
    """A recipe that gives each group its scheme, and is else the plan's.

    Args:
        schemes: by the names of groups.
        name, description: of the recipe.
    """
    modules: dict[str, list[str]] = {}
    for candidate in candidates:
        modules.setdefault(schemes[candidate.group.name], []).extend(candidate.group.members)
    every = [module for some in modules.values() for module in some]
    modules.pop(UNQUANTIZED, None)
    entries = [
        {"modules": patterns_of(modules[scheme], every, plan.prefix), "scheme": scheme} for scheme in sorted(modules)
    ]
    dumped = plan.recipe.model_dump(mode="json") | {"name": name, "description": description, "quantize": entries}
    return Recipe.model_validate(dumped | {"quantizer": plan.quantizer})


def patterns_of(modules: Iterable[str], every: Iterable[str], prefix: str) -> list[str]:
    """Regular expressions that match some modules of the decoder's layers, and none of the others.

    Last parts of names that stand in the same layers share an expression.

    Args:
        every: all modules that a recipe may match.
        prefix: precedes a layer's number.
    """
    wanted, present = _layers(modules, prefix), _layers(every, prefix)
    rows: dict[tuple[str, tuple[int, ...] | None], list[str]] = {}
    for (path, leaf), layers in wanted.items():
        numbers = None if layers == present[path, leaf] else tuple(sorted(layers))
        rows.setdefault((path, numbers), []).append(leaf)
    return [_pattern(prefix, path, numbers, leaves) for (path, numbers), leaves in rows.items()]


def _pattern(prefix: str, path: str, numbers: tuple[int, ...] | None, leaves: Sequence[str]) -> str:
    number = r"\d+" if numbers is None else _any_of([str(number) for number in numbers])
    parent = re.escape(path) + r"\." if path else ""
    if len(leaves) > 1 and all(leaf.endswith("_proj") for leaf in leaves):
        last = _any_of([leaf.removesuffix("_proj") for leaf in leaves]) + "_proj"
    else:
        last = _any_of(leaves)
    return rf"re:{re.escape(prefix)}\.{number}\.{parent}{last}$"


def _any_of(words: Sequence[str]) -> str:
    return re.escape(words[0]) if len(words) == 1 else f"({'|'.join(map(re.escape, words))})"


def _layers(modules: Iterable[str], prefix: str) -> dict[tuple[str, str], set[int]]:
    """The numbers of the layers of each path and last part."""
    found: dict[tuple[str, str], set[int]] = {}
    for module in modules:
        number, _, rest = module[len(prefix) + 1 :].partition(".")
        path, _, leaf = rest.rpartition(".")
        found.setdefault((path, leaf), set()).add(int(number))
    return found


def as_yaml(recipe: Recipe) -> str:
    """The text of a recipe's file."""
    first = {key: getattr(recipe, key) for key in ("name", "description")}
    dumped = first | recipe.model_dump(mode="json", exclude_defaults=True) | {"quantizer": recipe.quantizer}
    text: str = yaml.safe_dump(dumped, sort_keys=False, width=WIDTH, allow_unicode=True)
    return text
