"""vLLM's own rules for which layers of a checkpoint are quantized, so that nvquant can compare config and tensors
without vLLM.

A layer here is one that vLLM builds, fused (qkv_proj, gate_up_proj) where the model fuses. vLLM renames modules of
multimodal models before it matches, and renames exact entries too, but not regular expressions. The name depends on the
model class that serves. So these rules give a verdict for every name that a layer may have, and all verdicts must be
equal.
Source: vLLM 0.32.0 and 0.33.0, vllm/model_executor/layers/quantization/compressed_tensors/utils.py
(`should_ignore_layer`, `find_matched_target`), .../modelopt.py (`is_layer_excluded`), .../utils/quant_utils.py
(`is_layer_skipped`). The behaviour is rewritten here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from ..format.declared import MIXED_ALGORITHM
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
    layers = config.get("quantized_layers") if algorithm == MIXED_ALGORITHM else None
    listed = None
    if isinstance(layers, Mapping):
        listed = {str(name): _algorithm_of(entry) for name, entry in layers.items()}

    def verdict(name: str, at: int) -> str:
        entries = [_rename(part, at) for entry in exclude for part in _split_wildcard(entry)]
        skipped = _shards_agree(name, _shards(name, members), lambda shard: shard in entries)
        if skipped is None:
            return REFUSED
        if skipped or any(entry in name or fnmatchcase(name, entry) for entry in entries):
            return UNQUANTIZED
        if "vision_tower" in name or "vision_model" in name:
            return UNQUANTIZED
        if listed is None:
            return algorithm
        return _listed_algorithm(name, {_rename(module, at): found for module, found in listed.items()}, members)

    return _same_under_all_names(module, verdict)


def _algorithm_of(entry: object) -> str:
    return str(entry.get("quant_algo")).upper() if isinstance(entry, Mapping) else UNQUANTIZED


def _listed_algorithm(name: str, listed: Mapping[str, str], members: Sequence[str] | None) -> str:
    """The algorithm of a layer in a config that lists modules: its own, or that of all its listed members."""
    names = [name, *_as_the_other_class(name)]
    own = next((listed[candidate] for candidate in names if candidate in listed), None)
    if own is not None:
        return own
    of_members = {listed[shard] for candidate in names for shard in _shards(candidate, members) if shard in listed}
    if len(of_members) > 1:
        return REFUSED
    if of_members:
        return of_members.pop()
    below = (algorithm for module, algorithm in listed.items() if any(module.startswith(f"{one}.") for one in names))
    return next(below, UNQUANTIZED)


def _as_the_other_class(name: str) -> list[str]:
    """The other prefix under which a layer of a multimodal model may be listed."""
    first, second = "language_model.model.", "model.language_model."
    if name.endswith(".lm_head"):
        return ["lm_head"]
    if name.startswith(first):
        return [second + name.removeprefix(first)]
    return [first + name.removeprefix(second)] if name.startswith(second) else []


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
