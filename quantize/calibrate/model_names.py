"""Where a checkpoint stores what a model's code computes with, and which of the code's modules are the decoder's.

Names differ by what precedes the decoder (`model.language_model.`, `model.`, nothing), or as transformers describes for
the class (see `stored_form`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from .stored_form import Joined


def find_layers(full: Any, origins: Mapping[str, Joined], prefix: str) -> str | None:
    """The path of the list of decoder layers in a model, or None without one.

    It is the list whose elements own the tensors that the checkpoint stores in the layers of the same numbers. If no
    name leads there, it is the list in the model's decoder that has the checkpoint's name for it, or the only such
    list.

    Args:
        full: a PreTrainedModel.
        origins: where its parameters are stored, by their names in the model.
        prefix: the prefix of a layer's number in the checkpoint.
    """
    lists: set[str] = {name for name, module in full.named_modules() if isinstance(module, nn.ModuleList)}
    votes = Counter[str]()
    for parameter, origin in origins.items():
        numbers = {name[len(prefix) + 1 :].partition(".")[0] for name in origin.stored if name.startswith(f"{prefix}.")}
        parts = parameter.split(".")
        for at, part in enumerate(parts):
            if part in numbers and ".".join(parts[:at]) in lists:
                votes[".".join(parts[:at])] += 1
                break
    if votes:
        return votes.most_common(1)[0][0]
    container = prefix.rpartition(".")[2]
    named = [name for name in lists if name.rpartition(".")[2] == container]
    decoder = full.get_decoder()
    own = [name for name in named if getattr(decoder, container, None) is full.get_submodule(name)]
    return own[0] if own else named[0] if len(named) == 1 else None


def find_decoder(full: Any, layers: str) -> str:
    """The path of the decoder in a model: the smallest part around its layers that embeds tokens.

    Args:
        layers: the path of its layers.
    """
    parts = layers.split(".")
    paths = (".".join(parts[:size]) for size in range(len(parts) - 1, 0, -1))
    return next((path for path in paths if _embeds(full.get_submodule(path))), "")


def _embeds(module: Any) -> bool:
    """Whether a module is a model with a table of tokens."""
    try:
        return isinstance(module.get_input_embeddings(), nn.Embedding)
    except (AttributeError, NotImplementedError):
        return False


def tied_origin(parameter: str, full: Any, origins: Mapping[str, Joined], stored: Collection[str]) -> Joined | None:
    """Where a parameter is stored that the model's class ties to another one, or None.

    Args:
        parameter: its name in the model.
        full: see `find_layers`.
        origins: see `find_layers`.
        stored: all names in the checkpoint.
    """
    tied: Mapping[str, str] = full.all_tied_weights_keys
    source = tied.get(parameter, parameter)
    others = [source, *(name for name, target in tied.items() if target == source)]
    found = next((origins[name] for name in others if name in origins), None)
    plain = next((name for name in others if name in stored), None)
    return found if found is not None or plain is None else Joined({"": (plain,)}, None)


def modules_inside(layer: Mapping[str, Joined], path: str) -> dict[str, tuple[str, ...]]:
    """The model's modules that each stored module of a layer becomes, where the names differ: several where it is cut
    into parts, one for several that are joined.

    Args:
        layer: where the layer's weights are stored, by their names in the model.
        path: of the layer in the model, with a final dot.
    Returns:
        names inside the layer, by the name of the stored module in the checkpoint.
    """
    found: dict[str, list[str]] = {}
    for parameter, origin in layer.items():
        if parameter.endswith(".weight"):
            for stored in origin.stored:
                if stored.endswith(".weight"):
                    inside = parameter.removeprefix(path).removesuffix(".weight")
                    found.setdefault(stored.removesuffix(".weight"), []).append(inside)
    return {name: tuple(inside) for name, inside in found.items()}
