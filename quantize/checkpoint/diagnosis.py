"""What a folder holds that cannot be converted as it is, so that a refusal names it and its way out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .regular import is_file

ADAPTER_CONFIG = "adapter_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHOWN = 3


def no_model(folder: Path, single: str, index: str) -> str:
    """A sentence that tells what a folder without a config or without weights is.

    Args:
        single: name of the file of a model in one shard.
        index: name of the index of a model in several.
    """
    if found := _names(folder, ("*.gguf",)):
        return (
            f"{folder} holds GGUF weights ({found[0]}), which are quantized already: convert "
            f"from the original BF16 model."
        )
    if has_adapter(folder):
        return (
            f"{folder} is a LoRA (PEFT) adapter, not a model: merge it into its base model with PEFT's "
            f"merge_and_unload, save the result, and convert that folder."
        )
    if not is_file(folder / "config.json"):
        return f"{folder / 'config.json'} is missing: every Hugging Face model folder has one."
    if found := _names(folder, ("*.safetensors",)):
        return (
            f"{folder} holds {_listed(found)}, but neither {single} nor {index}, which names the shard of each tensor: "
            f"download {index} too."
        )
    if found := _names(folder, _PICKLES):
        return (
            f"{folder} holds only pickle weights ({found[0]}), which can run code when loaded: convert the model to "
            f"safetensors first."
        )
    return f"{folder} holds no {single} and no {index}: download the model's weights."


def missing_shard(folder: Path, name: str, indexed: Iterable[str], index: str) -> str:
    """A sentence about a shard that the index names and the folder lacks.

    Args:
        indexed: the names of all shards in the index.
    """
    strays = [found for found in _names(folder, ("*.safetensors",)) if found not in set(indexed)]
    if strays:
        return (
            f"{folder}: {index} names {name}, which is missing, and does not fit the files that are there "
            f"({_listed(strays)}): download index and shards of the same revision, or remove the index if one file "
            f"holds the whole model."
        )
    return f"{folder}: shard {name} is missing, but the index names it: download it again."


def has_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return is_file(folder / ADAPTER_CONFIG)


def _names(folder: Path, patterns: Iterable[str]) -> list[str]:
    try:
        return sorted(path.name for pattern in patterns for path in folder.glob(pattern))
    except OSError:
        return []


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
