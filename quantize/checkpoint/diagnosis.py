"""Sentences for folders and Hub repositories that hold no safetensors model. Each names the files that are there and
the way out. Names alone decide: no file is opened.

Sources of the names: `save_pretrained` of transformers and PEFT, llama.cpp's converters, and the releases of Mistral.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
DOWNLOAD = "download the model's files"
_SHOWN = 3
# Weights that servers do not load as the model's own.
_STRAYS = ("consolidated*.safetensors", "adapter*.safetensors", "optimizer*.safetensors")
_CONVERT = "convert the model to safetensors first"
# In the order of the search: patterns, their description with {} for the file's name, and the way out.
_OTHER_WEIGHTS = (
    (
        ("*.gguf", "*.ggml"),
        "holds GGUF weights ({}), which are quantized already",
        "convert from the original BF16 model",
    ),
    (
        ("adapter_model*", ADAPTER_CONFIG),
        "is a LoRA (PEFT) adapter ({}), not a model",
        "merge it into its base model with PEFT's merge_and_unload, save the result, and convert that folder",
    ),
    (("model_index.json",), "holds a diffusers pipeline ({})", "nvquant converts decoder models"),
    (
        ("consolidated*.safetensors",),
        "holds weights in Mistral's own format ({})",
        f"download the files in Hugging Face's format, with config.json and {SINGLE_NAME} or its shards",
    ),
    (
        ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"),
        "holds only pickle weights ({}), which can run code when loaded",
        _CONVERT,
    ),
    (("*.h5", "*.msgpack"), "holds weights of TensorFlow or Flax ({})", _CONVERT),
    (("*.onnx", "*.onnx_data"), "holds ONNX weights ({})", "convert from the original BF16 model"),
    (("*.nemo",), "holds a NeMo archive ({})", "export the model to Hugging Face's format first"),
)
_UNFINISHED = ("*.incomplete", "*.part", "*.aria2", "*.crdownload")


def names_in(folder: Path) -> list[str]:
    """Names, sorted, of the files of a folder, and of the config.json files one level below; empty on an error."""
    try:
        inner = (path.relative_to(folder).as_posix() for path in folder.glob("*/config.json"))
        return sorted([*(path.name for path in folder.iterdir()), *inner])
    except OSError:
        return []


def no_folder(path: Path) -> str:
    """A sentence for a model's path that is no folder."""
    if path.suffix == ".gguf":
        return f"{path} is a GGUF file, which is quantized already: give the folder or the Hub id of the BF16 model."
    if path.suffix == ".safetensors":
        return f"{path} is not a folder: give the folder around it, with config.json and all shards."
    return f"{path} is not a folder: give the path of a model folder (with config.json) or a Hub id."


def no_config(where: str, names: Collection[str], way_out: str = DOWNLOAD) -> str:
    """A sentence for a folder or repository without config.json.

    Args:
        where: the folder or the Hub model, as messages name it.
        names: of its files.
        way_out: if the files show none.
    """
    found = None if _shards(names) else _other_weights(where, names)
    return found or f"{where} holds no config.json, which every Hugging Face model has: {_inner_model(names, way_out)}."


def no_weights(where: str, names: Collection[str], way_out: str = DOWNLOAD) -> str:
    """A sentence for a model without model.safetensors and without an index; arguments as of `no_config`."""
    shards = _shards(names)
    if shards:
        return (
            f"{where} holds {_listed(shards)}, but neither {SINGLE_NAME} nor {INDEX_NAME}, which names the shard of "
            f"each tensor: download {INDEX_NAME} too."
        )
    unfinished = _matching(names, _UNFINISHED)
    if unfinished:
        return f"{where} holds an unfinished download ({unfinished[0]}) and no {SINGLE_NAME}: finish the download."
    found = _other_weights(where, names)
    return found or f"{where} holds no {SINGLE_NAME} and no {INDEX_NAME}: {_inner_model(names, way_out)}."


def missing_shards(
    where: str, indexed: Iterable[str], names: Collection[str], way_out: str = "download it again"
) -> str | None:
    """A sentence for an index that names shards that are missing; None if all are there.

    Weights that the index does not name belong to another build of the model. Then the missing shards may never have
    existed, and to download them helps nobody.

    Args:
        where: the folder or the Hub model, as messages name it.
        indexed: the shards that the index names.
        names: of the files that are there.
        way_out: if only shards are missing.
    """
    wanted, there = sorted(set(indexed)), set(names)
    missing = [name for name in wanted if name not in there]
    if not missing:
        return None
    strays = [name for name in _shards(names) if name not in set(wanted)]
    if strays:
        return (
            f"{where}: {INDEX_NAME} names {missing[0]}, which is missing, and does not fit the files that are there "
            f"({_listed(strays)}): download index and shards of the same revision, or remove the index if one file "
            f"holds the whole model."
        )
    count = f" ({len(missing)} of {len(wanted)} shards are)" if len(missing) > 1 else ""
    return f"{where}: shard {missing[0]} is missing{count}, but the index names it: {way_out}."


def adapter_beside(names: Collection[str]) -> str | None:
    """The file of a PEFT adapter among the files of a model, or None."""
    return next(iter(_matching(names, (ADAPTER_CONFIG, "adapter_model*.safetensors", "adapter_model*.bin"))), None)


def _other_weights(where: str, names: Collection[str]) -> str | None:
    for patterns, description, way_out in _OTHER_WEIGHTS:
        found = _matching(names, patterns)
        if found:
            return f"{where} {description.format(found[0])}: {way_out}."
    return None


def _matching(names: Collection[str], patterns: Iterable[str]) -> list[str]:
    """The files of the folder itself that fit a pattern, in the order of the patterns and sorted."""
    flat = sorted(name for name in names if "/" not in name)
    return [name for pattern in patterns for name in flat if fnmatch(name, pattern)]


def _shards(names: Collection[str]) -> list[str]:
    """The safetensors files that may be the model's own weights."""
    strays = _matching(names, _STRAYS)
    return [name for name in _matching(names, ("*.safetensors",)) if name not in strays]


def _inner_model(names: Collection[str], way_out: str) -> str:
    """The way out of a folder without a model: a folder inside that is one, if there is one."""
    inner = sorted(name.rpartition("/")[0] for name in names if name.count("/") == 1 and name.endswith("/config.json"))
    return f"give the path of its folder {inner[0]}, which holds a model" if inner else way_out


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
