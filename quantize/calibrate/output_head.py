"""The output head of a model's class: whether it can have weights of its own, and the norm that it reads."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.source import Checkpoint
from ..errors import InputError
from ..weights.base import Weights
from .model_class import on_meta
from .norm_bounds import rms_norm_bound
from .record import output_after_layers
from .skeleton import Skeleton, build_skeleton, load_outer

_PROBE_TOKENS = 4


def why_no_own_head(source: Checkpoint, config: Mapping[str, Any], module: str) -> str | None:
    """Why the model's class cannot have a head of its own, in words that follow the name of the class, or None.

    Args:
        config: config.json in which the head is not tied. The class is built from it, because some classes tie whatever
            the flag is.
        module: the name of the head's module in the checkpoint.
    Raises:
        EnvironmentLack: the installed transformers does not know the class, or cannot build it.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        full = on_meta(replace(source, folder=Path(folder), config=config), torch.bfloat16)
    head = full.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return "has no output head that is a linear layer"
    name = next(name for name, part in full.named_modules(remove_duplicate=False) if part is head)
    tied = full.all_tied_weights_keys
    if f"{name}.weight" in tied or f"{name}.weight" in tied.values():
        return "ties its head to the embedding even if tie_word_embeddings is false"
    if name.rpartition(".")[2] != module.rpartition(".")[2]:
        return f"calls its head {name}, but servers read {module}"
    return None


def class_name(source: Weights) -> str:
    """The class that config.json names, for messages."""
    named = source.config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else "the model's class"


def head_input_bound(source: Weights, prefix: str) -> float | None:
    """The largest magnitude of the head's input, whatever the text, or None where it is not proved.

    The model's own forward runs with random vectors as the output of its last layer. The head's input must be the
    output of a module that is an RMSNorm.

    Args:
        prefix: before a layer's number in the checkpoint's names.
    Raises:
        EnvironmentLack, InputError: see `build_skeleton`.
    """
    skeleton = build_skeleton(source, prefix, torch.device("cpu"), torch.float32)
    ids = torch.arange(_PROBE_TOKENS).unsqueeze(0)
    load_outer(skeleton, ids)
    decoder: Any = skeleton.decoder
    width = decoder.get_input_embeddings().weight.shape[1]
    hidden = torch.randn((1, _PROBE_TOKENS, width), generator=torch.Generator().manual_seed(0))
    norm = _module_before_head(skeleton, ids, hidden)
    return None if norm is None else rms_norm_bound(norm, width)


def _module_before_head(skeleton: Skeleton, ids: Tensor, hidden: Tensor) -> nn.Module | None:
    """The module around the decoder's layers whose output is the head's input, bit for bit."""
    full: Any = skeleton.full
    head = full.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    outputs: list[tuple[nn.Module, Tensor]] = []
    inputs: list[Tensor] = []

    def note(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((module, output))

    inside = {id(part) for layer in skeleton.layers for part in layer.modules()}
    watched = [part for part in skeleton.decoder.modules() if id(part) not in inside and not list(part.children())]
    handles = [part.register_forward_hook(note) for part in watched]
    handles.append(head.register_forward_pre_hook(lambda _module, args: inputs.append(args[0])))
    weight, bias = head.weight, head.bias
    try:
        head.weight = nn.Parameter(torch.zeros(1, hidden.shape[-1]), requires_grad=False)
        head.register_parameter("bias", None)
        output_after_layers(replace(skeleton, model=full), ids, hidden)
    except InputError:  # its forward is not that of a chain of layers and a head
        return None
    finally:
        head.weight, head.bias = weight, bias
        for handle in handles:
            handle.remove()
    last = inputs[-1] if inputs else None
    return next(
        (module for module, output in reversed(outputs) if last is not None and torch.equal(output, last)), None
    )
