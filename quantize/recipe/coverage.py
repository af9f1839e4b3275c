"""Patterns that name what is quantized and what is not, as a config needs them: whole blocks, fused names included, no
list of modules.

A list of modules goes wrong where vLLM fuses: Gemma 4's full-attention layers have no v_proj, and naming only q_proj
and k_proj there is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .groups import FUSED_MEMBERS
from .match import Selection
from .roles import PROJECTOR, QUANTIZABLE, TOWER, Role, decoder_prefix, layer_index, module_of
from .schema import Scheme


@dataclass(frozen=True)
class Pattern:
    """Some modules of the decoder's layers.

    Attributes:
        container: the last part of the decoder's prefix, as `layers`.
        layers: numbers of the layers; None for all.
        path: what stands between the layer's number and the module's last part, as `self_attn`; empty for nothing.
        leaves: last parts; None for the whole block.
    """

    container: str
    layers: tuple[int, ...] | None
    path: str
    leaves: tuple[str, ...] | None

    def regex(self) -> str:
        """As compressed-tensors reads it: from the start of the name, so it begins with `.*`; ends with `$`
        unless it is a block."""
        number = r"\d+" if self.layers is None else f"({'|'.join(map(str, self.layers))})"
        start = rf"re:.*\.{self.container}\.{number}\."
        block = re.escape(self.path) + r"\." if self.path else ""
        return start + block + (".*" if self.leaves is None else _alternatives(self.leaves) + "$")

    def globs(self) -> list[str]:
        """As modelopt's readers take them."""
        numbers = ["*"] if self.layers is None else [str(number) for number in self.layers]
        # A block itself too: vLLM asks for `experts`, not for what is in it.
        ends = [self.path, f"{self.path}.*"] if self.leaves is None else self.leaves
        block = f"{self.path}." if self.path and self.leaves is not None else ""
        return [f"*.{self.container}.{number}.{block}{end}" for number in numbers for end in ends]


@dataclass(frozen=True)
class Coverage:
    """What a config says of a model.

    Attributes:
        targets: patterns of the quantized modules of each scheme.
        ignore: patterns of the text decoder's unquantized modules.
        ignore_parts: parts of a name that mark a whole branch as unquantized, as `vision_tower`.
    """

    targets: Mapping[Scheme, tuple[Pattern, ...]]
    ignore: tuple[Pattern, ...]
    ignore_parts: tuple[str, ...]

    def ignore_regexes(self) -> list[str]:
        """The ignore list of a compressed-tensors config."""
        return [pattern.regex() for pattern in self.ignore] + [f"re:.*{part}.*" for part in self.ignore_parts]

    def ignore_globs(self) -> list[str]:
        """The ignore list of a modelopt config."""
        return [glob for pattern in self.ignore for glob in pattern.globs()] + [
            f"*{part}*" for part in self.ignore_parts
        ]


def coverage_of(selection: Selection, shapes: Mapping[str, tuple[int, ...]]) -> Coverage:
    """Patterns that fit a selection, from what the model has.

    Args:
        selection: what is quantized.
        shapes: all tensors of the source.
    """
    prefix = decoder_prefix(shapes) or "model.layers"
    quantized: dict[Scheme, list[str]] = {}
    for module, scheme in selection.schemes.items():
        quantized.setdefault(scheme, []).append(module)
    inside = [name for name in shapes if layer_index(name, prefix) is not None and len(shapes[name]) > 1]
    unquantized = [
        _all_experts(name) if selection.roles[name] is Role.EXPERT else module_of(name)
        for name in inside
        if module_of(name) not in selection.schemes
        and name not in selection.unused
        and (name.endswith(".weight") or selection.roles[name] is Role.EXPERT)
    ]
    everything = [*selection.schemes, *unquantized]
    targets = {
        scheme: _patterns(modules, everything, prefix, whole_blocks=False) for scheme, modules in quantized.items()
    }
    return Coverage(
        targets, _patterns(unquantized, everything, prefix, whole_blocks=True), _outer_parts(shapes, selection.roles)
    )


def _patterns(
    modules: Iterable[str], everything: Iterable[str], prefix: str, whole_blocks: bool
) -> tuple[Pattern, ...]:
    """Patterns for `modules`, not matching the others of `everything`; grouped by layers, block and leaf."""
    container = prefix.rpartition(".")[2]
    wanted, present = _by_leaf(modules, prefix), _by_leaf(everything, prefix)
    rows: dict[tuple[str, tuple[int, ...] | None], list[str]] = {}
    for (path, leaf), layers in wanted.items():
        all_layers = layers == present[path, leaf]
        rows.setdefault((path, None if all_layers else tuple(sorted(layers))), []).append(leaf)
    patterns = []
    for (path, numbers), leaves in rows.items():
        below = {place for place in present if f"{place[0]}.".startswith(f"{path}.")}
        whole = whole_blocks and bool(path) and all(wanted.get(place) == present[place] for place in below)
        patterns.append(Pattern(container, numbers, path, None if whole else _with_fused(leaves)))
    return tuple(patterns)


def _all_experts(tensor: str) -> str:
    """One name for all the experts of a layer, whether they are stored one by one or together."""
    return tensor.partition(".experts.")[0] + ".experts.all"


def _by_leaf(modules: Iterable[str], prefix: str) -> dict[tuple[str, str], set[int]]:
    table: dict[tuple[str, str], set[int]] = {}
    for module in modules:
        number, _, rest = module[len(prefix) + 1 :].partition(".")
        path, _, leaf = rest.rpartition(".")
        table.setdefault((path, leaf), set()).add(int(number))
    return table


def _with_fused(leaves: Iterable[str]) -> tuple[str, ...]:
    """The leaves, preceded by the fused names that they make up; absent members (v_proj where K is V) are named too."""
    leaves = list(leaves)
    names: list[str] = []
    for fused, members in FUSED_MEMBERS.items():
        if any(member in leaves for member in members):
            names += [fused, *members]
    return tuple(dict.fromkeys([*names, *leaves]))


def _alternatives(leaves: tuple[str, ...]) -> str:
    if len(leaves) > 1 and all(leaf.endswith("_proj") for leaf in leaves):
        return f"({'|'.join(re.escape(leaf.removesuffix('_proj')) for leaf in leaves)})_proj"
    return f"({'|'.join(map(re.escape, leaves))})" if len(leaves) > 1 else re.escape(leaves[0])


def _outer_parts(shapes: Mapping[str, tuple[int, ...]], roles: Mapping[str, Role]) -> tuple[str, ...]:
    """Parts of names that mark branches outside of the decoder's layers; a head is always listed, since vLLM
    builds one."""
    parts = ["lm_head"]
    for name, shape in shapes.items():
        role = roles[name]
        if len(shape) < 2 or role in QUANTIZABLE:
            continue
        if role is Role.TOWER:
            parts.append(next(part for part in name.split(".") if TOWER.search(part)))
        elif role is Role.PROJECTOR:
            parts.append(next(part for part in name.split(".") if PROJECTOR.search(part)))
        elif role is Role.PER_LAYER_INPUT:
            # The whole last part: vLLM reads modelopt's `*per_layer*` as `*per_layer` and `*per_layer.*`.
            parts.append(module_of(name).rpartition(".")[2])
    return tuple(dict.fromkeys(parts))
