"""vLLM's own rules for which layers of a checkpoint are quantized, so that nvquant can compare config and tensors
without vLLM.

A layer here is one that vLLM builds, fused (qkv_proj, gate_up_proj) where the model fuses. vLLM renames modules of
multimodal models before it matches, and renames exact entries too, but not regular expressions. The name depends on the
model class that serves. So these rules give a verdict for every name that a layer may have, and all verdicts must be
equal.
Source: vLLM 0.32.0 and 0.33.0, vllm/model_executor/layers/quantization/compressed_tensors/utils.py
(`should_ignore_layer`, `find_matched_target`), .../modelopt.py (`is_layer_excluded`, `_resolve_quant_algo`),
.../utils/quant_utils.py (`is_layer_skipped`). The behaviour is rewritten here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from ..format.declared import LINEAR_ALGORITHMS, MIXED_ALGORITHM
from .groups import members_called
from .patterns import matches
from .roles import Role, role_of

UNQUANTIZED = "unquantized"
REFUSED = "refused"

# The multimodal class puts the decoder under language_model.model, the text-only class under model.
_RENAMES = (
    (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower", "vision_tower"),
        ("model.embed_vision", "embed_vision"),
        ("model.audio_tower.", "audio_tower."),
        ("model.embed_audio.", "embed_audio."),
        ("lm_head", "language_model.lm_head"),
    ),
    (("model.language_model.", "model."),),
)
_TOWERS = ("vision_tower", "vision_model", "vit_large_projector")  # never quantized by one algorithm for all layers
_FUSED_EVERYWHERE = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def serving_names(module: str) -> list[str]:
    """The names under which vLLM may build a module, its own first."""
    names = [module]
    for rename in _RENAMES:
        for old, new in rename:
            if module.startswith(old):
                names.append(new + module[len(old) :])
                break
    return names


def _same_under_all_names(module: str, verdict: Callable[[str, int], str]) -> str:
    verdicts = {verdict(name, at) for at, name in enumerate(serving_names(module))}
    return verdicts.pop() if len(verdicts) == 1 else REFUSED


def compressed_tensors_verdict(module: str, config: Mapping[str, object], members: Sequence[str] | None = None) -> str:
    """The config group that vLLM gives a layer.

    Args:
        module: the layer by its name in the checkpoint, fused where vLLM fuses.
        config: `quantization_config` of the checkpoint.
        members: last parts of the names that the layer is fused of, see `Fusions.members`. By default they are those of
            most models for a layer of its name.
    Returns:
        the name of a config group, "unquantized", or "refused" (vLLM raises because members of a fused layer differ, or
        the verdict depends on the name under which the model is built).
    """
    ignore = _entries(config.get("ignore"))
    groups = config.get("config_groups")
    targets = [
        (target, name)
        for name, group in (groups.items() if isinstance(groups, Mapping) else ())
        for target in _entries(group.get("targets"))
    ]

    def verdict(name: str, at: int) -> str:
        shards = _shards(name, members)
        ignored = _shards_agree(name, shards, lambda shard: any(_equal_or_regex(shard, entry, at) for entry in ignore))
        if ignored is None:
            return REFUSED
        return UNQUANTIZED if ignored else _matched_target(name, shards, targets, at)

    return _same_under_all_names(module, verdict)


def modelopt_verdict(module: str, config: Mapping[str, object], members: Sequence[str] | None = None) -> str:
    """The algorithm that vLLM gives a layer, "unquantized" or "refused". The arguments are those
    of `compressed_tensors_verdict`."""
    exclude = _entries(config.get("ignore") or config.get("exclude_modules"))
    algorithm = str(config.get("quant_algo"))
    is_mixed = algorithm == MIXED_ALGORITHM
    layers = config.get("quantized_layers")
    if is_mixed and not (isinstance(layers, Mapping) and layers):
        return REFUSED
    listed = {str(name): _algorithm_of(entry) for name, entry in layers.items()} if isinstance(layers, Mapping) else {}

    def verdict(name: str, at: int) -> str:
        entries = [_rename(part, at) for entry in exclude for part in _split_wildcard(entry)]
        skipped = _shards_agree(name, _shards(name, members), lambda shard: shard in entries)
        if skipped is None:
            return REFUSED
        if skipped or any(entry in name or fnmatchcase(name, entry) for entry in entries):
            return UNQUANTIZED
        if is_mixed:
            found = _listed_algorithm(name, {_rename(module, at): one for module, one in listed.items()}, members)
            return found if found in (*LINEAR_ALGORITHMS, REFUSED) else UNQUANTIZED
        return UNQUANTIZED if any(tower in name for tower in _TOWERS) else algorithm

    return _same_under_all_names(module, verdict)


def _algorithm_of(entry: object) -> str:
    """The algorithm of an entry of `quantized_layers`. vLLM raises where there is none."""
    algorithm = entry.get("quant_algo") if isinstance(entry, Mapping) else None
    return algorithm.upper() if isinstance(algorithm, str) else REFUSED


def _listed_algorithm(name: str, listed: Mapping[str, str], members: Sequence[str] | None) -> str:
    """The algorithm of a layer in a config that lists modules (`_resolve_quant_algo`).

    It is the layer's own, else the one of all of its listed members, else the first one of a module below it, else the
    one of the listed members that layers of its name have in most models. "unquantized" without any of these.
    """
    names = listed_as(name)
    own = next((listed[candidate] for candidate in names if candidate in listed), None)
    if own is not None:
        return own
    of_members = _algorithm_of_members(names, listed, members)
    if of_members is not None:
        return of_members
    for candidate in names:
        below = next((listed[module] for module in listed if module.startswith(f"{candidate}.")), None)
        if below is not None:
            return below
    usual = _FUSED_EVERYWHERE.get(name.rpartition(".")[2], ())
    found = (_algorithm_of_members([candidate], listed, usual) for candidate in names)
    return next((algorithm for algorithm in found if algorithm is not None), UNQUANTIZED)


def _algorithm_of_members(names: Sequence[str], listed: Mapping[str, str], members: Sequence[str] | None) -> str | None:
    """The algorithm of the listed members of a layer, "refused" where they have several, or None without any."""
    shards = [shard for name in names for shard in _shards(name, members)]
    algorithms = {listed[shard] for shard in shards if shard in listed}
    return None if not algorithms else algorithms.pop() if len(algorithms) == 1 else REFUSED


def listed_as(name: str) -> list[str]:
    """The names under which vLLM looks for a layer in `quantized_layers`, its own first."""
    first, second = "language_model.model.", "model.language_model."
    names = [name, "lm_head"] if name.endswith(".lm_head") else [name]
    if name.startswith(first):
        names.append(second + name.removeprefix(first))
    elif name.startswith(second):
        names.append(first + name.removeprefix(second))
    return names


def _entries(value: object) -> list[str]:
    return [str(entry) for entry in value] if isinstance(value, Sequence) and not isinstance(value, str) else []


def _rename(entry: str, at: int) -> str:
    """An exact entry as vLLM renames it, for the naming number `at` of `serving_names`."""
    if at == 0 or entry.startswith("re:") or "." not in entry:
        return entry
    return next((new + entry[len(old) :] for old, new in _RENAMES[at - 1] if entry.startswith(old)), entry)


def _equal_or_regex(name: str, entry: str, at: int) -> bool:
    if entry.startswith("re:"):
        return matches(entry[3:], name)
    return name == _rename(entry, at)


def _shards(name: str, members: Sequence[str] | None) -> list[str]:
    """Names of the members of a fused layer, or nothing if a layer stands alone."""
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{member}" for member in (members_called(leaf) if members is None else members)]


def _shards_agree(name: str, shards: Sequence[str], matches: Callable[[str], bool]) -> bool | None:
    """Whether a layer is matched, by its fused name or by all of its members, or None if only some members are."""
    if matches(name):
        return True
    found = [matches(shard) for shard in shards]
    if any(found) and not all(found):
        return None
    return bool(found) and all(found)


def _matched_target(name: str, shards: Sequence[str], targets: list[tuple[str, str]], at: int) -> str:
    def first(candidate: str) -> str | None:
        return next((group for target, group in targets if _equal_or_regex(candidate, target, at)), None)

    found = first(name)
    if found is None:
        members = [first(shard) for shard in shards]
        found = members[0] if members and None not in members else None
    # Heads and embeddings are ParallelLMHead and VocabParallelEmbedding.
    if found is not None or role_of(f"{name}.weight", (1, 1)) in (Role.HEAD, Role.EMBEDDING):
        return found or UNQUANTIZED
    # Last, vLLM looks for the target in the class name of the layer: `Linear` is part of all linear ones.
    return next((group for target, group in targets if target == "Linear"), UNQUANTIZED)


def _split_wildcard(entry: str) -> list[str]:
    """`X*` stands for `X` and `X.*` in vLLM's reading of modelopt's wildcards."""
    if len(entry) >= 2 and entry.endswith("*") and entry[-2] != ".":
        return [entry[:-1], entry[:-1] + ".*"]
    return [entry]
