"""Patterns that name what is quantized and what is not, as a config needs them: complete blocks, fused names included,
and no list of modules.

A list of modules fails where vLLM fuses: Gemma 4's full-attention layers have no v_proj, and vLLM refuses a config that
names only q_proj and k_proj there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .decoder import DRAFT, PROJECTOR, TOWER, decoder_prefix, layer_index
from .drafts import drafts_behind
from .groups import FUSIONS, Fusion, Fusions
from .match import Selection, fusions_of
from .roles import QUANTIZABLE, Role, module_of
from .schema import SchemeName


@dataclass(frozen=True)
class Pattern:
    """Some modules of the decoder's layers.

    Attributes:
        container: the last part of the decoder's prefix, such as `layers`.
        layers: numbers of the layers, or None for all.
        path: the names between the layer's number and the module's last part, such as `self_attn`. It may be empty.
        leaves: last parts, or None for the complete block.
        is_at_top: whether nothing precedes the container in the checkpoint.
    """

    container: str
    layers: tuple[int, ...] | None
    path: str
    leaves: tuple[str, ...] | None
    is_at_top: bool = False

    def regex(self) -> str:
        """The form of compressed-tensors. It matches from the start of the name, so it begins with `.*`. It ends with
        `$` unless it is a block."""
        number = r"\d+" if self.layers is None else f"({'|'.join(map(str, self.layers))})"
        before = r"(.*\.)?" if self.is_at_top else r".*\."
        start = rf"re:{before}{self.container}\.{number}\."
        block = re.escape(self.path) + r"\." if self.path else ""
        return start + block + (".*" if self.leaves is None else _alternatives(self.leaves) + "$")

    def globs(self) -> list[str]:
        """The form of modelopt's readers."""
        numbers = ["*"] if self.layers is None else [str(number) for number in self.layers]
        # A block itself too: vLLM asks for `experts`, not for what is in it.
        whole = [self.path, f"{self.path}.*"] if self.path else ["*"]
        ends = whole if self.leaves is None else self.leaves
        block = f"{self.path}." if self.path and self.leaves is not None else ""
        before = "*" if self.is_at_top else "*."
        return [f"{before}{self.container}.{number}.{block}{end}" for number in numbers for end in ends]


@dataclass(frozen=True)
class HeadPattern:
    """The quantized head, under every name that a server may build it with.

    Attributes:
        leaf: the last part of its name.
    """

    leaf: str

    def regex(self) -> str:
        """See `Pattern.regex`."""
        return rf"re:.*{re.escape(self.leaf)}$"


@dataclass(frozen=True)
class Coverage:
    """The patterns of a config for a model.

    Attributes:
        targets: patterns of the quantized modules of each scheme.
        ignore: patterns of the text decoder's unquantized modules.
        ignore_parts: parts of a name that mark a complete branch as unquantized, such as `vision_tower`.
    """

    targets: Mapping[SchemeName, tuple[Pattern | HeadPattern, ...]]
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


def coverage_of(
    selection: Selection, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None = None
) -> Coverage:
    """Patterns that fit a selection, from the tensors of the model.

    Args:
        selection: the quantized modules.
        shapes: all tensors of the source.
        config: its config.json.
    """
    config = config or {}
    prefix, fusions = decoder_prefix(shapes, config) or "model.layers", fusions_of(shapes, config)
    quantized: dict[SchemeName, list[str]] = {}
    head = None if selection.head is None else selection.head.module
    layered = [module for module in selection.schemes if module != head]
    for module in layered:
        quantized.setdefault(selection.schemes[module], []).append(module)
    inside = [name for name in shapes if layer_index(name, prefix) is not None and len(shapes[name]) > 1]
    unquantized = [
        _all_experts(name) if selection.roles[name] is Role.EXPERT else module_of(name)
        for name in inside
        if module_of(name) not in selection.schemes
        and name not in selection.unused
        and selection.roles[name] is not Role.DRAFT
        and (name.endswith(".weight") or selection.roles[name] is Role.EXPERT)
    ]
    everything = [*layered, *unquantized]
    targets: dict[SchemeName, tuple[Pattern | HeadPattern, ...]] = {
        scheme: _patterns(modules, everything, prefix, fusions, whole_blocks=False)
        for scheme, modules in quantized.items()
    }
    if head is not None:
        scheme = selection.schemes[head]
        targets[scheme] = (*targets.get(scheme, ()), HeadPattern(head.rpartition(".")[2]))
    ignore = _patterns(unquantized, everything, prefix, fusions, whole_blocks=True)
    drafts = _draft_layers(shapes, selection.roles, config, prefix)
    if drafts:
        container = prefix.rpartition(".")[2]
        ignore += (Pattern(container, drafts, "", None, is_at_top=prefix == container),)
    return Coverage(targets, ignore, _outer_parts(shapes, selection, prefix))


def _draft_layers(
    shapes: Mapping[str, tuple[int, ...]], roles: Mapping[str, Role], config: Mapping[str, Any], prefix: str
) -> tuple[int, ...]:
    """Numbers, behind the decoder's layers, under which draft layers are stored or built."""
    drafts = [name for name in shapes if roles[name] is Role.DRAFT]
    numbers = {layer for name in drafts if (layer := layer_index(name, prefix)) is not None}
    if any(name.startswith("model.mtp") for name in drafts):
        numbers.update(drafts_behind(config))
    return tuple(sorted(numbers))


def _patterns(
    modules: Iterable[str], everything: Iterable[str], prefix: str, fusions: Fusions, whole_blocks: bool
) -> tuple[Pattern, ...]:
    """Patterns for `modules`, which match no others of `everything`, grouped by layers, block and leaf."""
    container, modules = prefix.rpartition(".")[2], list(modules)
    wanted, present = _by_leaf(modules, prefix), _by_leaf(everything, prefix)
    fused = {(place[0], fusions.fusion(module)) for place, module in _places(modules, prefix)}
    together, of_all = _by_layer_of_server(modules, prefix, fusions), _by_layer_of_server(everything, prefix, fusions)
    rows: dict[tuple[str, tuple[int, ...] | None], list[str]] = {}
    for (path, leaf, _), module in _places(modules, prefix):
        layers = together[path, fusions.fusion(module) or leaf]
        all_layers = layers == of_all[path, fusions.fusion(module) or leaf]
        leaves = rows.setdefault((path, None if all_layers else tuple(sorted(layers))), [])
        if leaf not in leaves:
            leaves.append(leaf)
    patterns = []
    for (path, numbers), leaves in rows.items():
        below = {place for place in present if f"{place[0]}.".startswith(f"{path}.")}
        whole = whole_blocks and bool(path) and all(wanted.get(place) == present[place] for place in below)
        shown = None if whole else _with_fused(path, leaves, fused)
        patterns.append(Pattern(container, numbers, path, shown, is_at_top=prefix == container))
    return tuple(patterns)


def _all_experts(tensor: str) -> str:
    """One name for all the experts of a layer, whether they are stored one by one or together. Servers call the layer
    of a stack without such a name (`block_sparse_moe.input_linear`) `experts` too."""
    parent, has_name, _ = tensor.partition(".experts.")
    return (parent if has_name else module_of(tensor).rpartition(".")[0]) + ".experts.all"


def _places(modules: Iterable[str], prefix: str) -> Iterator[tuple[tuple[str, str, int], str]]:
    """Path, leaf and layer of modules of the decoder."""
    for module in modules:
        number, _, rest = module[len(prefix) + 1 :].partition(".")
        path, _, leaf = rest.rpartition(".")
        yield (path, leaf, int(number)), module


def _by_leaf(modules: Iterable[str], prefix: str) -> dict[tuple[str, str], set[int]]:
    table: dict[tuple[str, str], set[int]] = {}
    for (path, leaf, number), _ in _places(modules, prefix):
        table.setdefault((path, leaf), set()).add(number)
    return table


def _by_layer_of_server(
    modules: Iterable[str], prefix: str, fusions: Fusions
) -> dict[tuple[str, Fusion | str], set[int]]:
    """The layers of each path and fused layer, or last part where a module stands alone. A member that some layers lack
    (v_proj where K is V) has those of its fused layer."""
    table: dict[tuple[str, Fusion | str], set[int]] = {}
    for (path, leaf, number), module in _places(modules, prefix):
        table.setdefault((path, fusions.fusion(module) or leaf), set()).add(number)
    return table


def _with_fused(path: str, leaves: Iterable[str], fused: Collection[tuple[str, Fusion | None]]) -> tuple[str, ...]:
    """The leaves, preceded by their fused names. Absent members (v_proj where K is V) are named too."""
    leaves = list(leaves)
    names: list[str] = []
    for fusion in FUSIONS:
        if (path, fusion) in fused and any(member in leaves for member in fusion.members):
            names += [fusion.name, *fusion.members]
    return tuple(dict.fromkeys([*names, *leaves]))


def _alternatives(leaves: tuple[str, ...]) -> str:
    if len(leaves) > 1 and all(leaf.endswith("_proj") for leaf in leaves):
        return f"({'|'.join(re.escape(leaf.removesuffix('_proj')) for leaf in leaves)})_proj"
    return f"({'|'.join(map(re.escape, leaves))})" if len(leaves) > 1 else re.escape(leaves[0])


def _outer_parts(shapes: Mapping[str, tuple[int, ...]], selection: Selection, prefix: str) -> tuple[str, ...]:
    """Parts of names that mark branches outside of the decoder's layers. A head is always listed unless it is
    quantized, because vLLM builds one."""
    parts = ["lm_head"] if selection.head is None else []
    quantized = {part for module in selection.schemes for part in module.split(".")}
    for name, shape in shapes.items():
        role = selection.roles[name]
        if len(shape) < 2 or role in QUANTIZABLE:
            continue
        branch = module_of(name).split(".")
        if role is Role.TOWER:
            parts.append(next(part for part in name.split(".") if TOWER.search(part)))
        elif role is Role.PROJECTOR:
            parts.append(next(part for part in name.split(".") if PROJECTOR.search(part)))
        elif role is Role.PER_LAYER_INPUT:
            # The whole last part: vLLM reads modelopt's `*per_layer*` as `*per_layer` and `*per_layer.*`.
            parts.append(branch[-1])
        elif role is Role.DRAFT and layer_index(name, prefix) is None:
            parts.append(next(part for part in branch if DRAFT.search(part)))
        elif role in (Role.OTHER, Role.HEAD) and len(shape) == 2 and layer_index(name, prefix) is None:
            parts += _own_part(branch, prefix, quantized)
    return tuple(dict.fromkeys(parts))


def _own_part(branch: list[str], prefix: str, quantized: Collection[str]) -> list[str]:
    """The part of a name that marks its branch and is in no quantized module's name, or an empty text."""
    numbers = [at for at, part in enumerate(branch) if part.isdecimal()]
    candidates = branch[: numbers[0]] if numbers else branch
    decoder = set(prefix.split("."))
    found = [part for part in candidates if part not in decoder and not any(part in other for other in quantized)]
    return found[:1]
