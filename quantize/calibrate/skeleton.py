"""The source model without its weights: built on the meta device from its config, filled one decoder layer at a time.

Names: a tensor's name in the checkpoint and in the model's state dict differ at most in what precedes the decoder
(`model.language_model.`,
`model.`, nothing); inside of the decoder they are equal, or the model is refused.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.source import Checkpoint
from ..errors import EnvironmentLack, InputError

log = logging.getLogger("nvquant.calibrate")

ATTENTION = "sdpa"


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device.

    Attributes:
        model: what is called in the recording pass: the base model, without a head.
        decoder: the text decoder.
        layers: its decoder layers.
        root: what precedes the decoder's own names in the checkpoint, with a final dot; empty for nothing.
        layer_prefix: what precedes a layer's number in the checkpoint.
    """

    source: Checkpoint
    model: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList
    root: str
    layer_prefix: str
    device: torch.device
    dtype: torch.dtype

    def layer_tensors(self, layer: int) -> dict[str, str]:
        """Names inside of a layer to names in the checkpoint, for every parameter and buffer that the layer has."""
        return {name: f"{self.layer_prefix}.{layer}.{name}" for name in self.layers[layer].state_dict()}


def build_skeleton(source: Checkpoint, prefix: str, device: torch.device, dtype: torch.dtype) -> Skeleton:
    """Build the model of a checkpoint on the meta device and check that the checkpoint has all that its decoder needs.

    Args:
        prefix: what precedes a layer's number in the checkpoint's names (`recipe.roles.decoder_prefix`).
        dtype: in which the model computes; rotary tables stay float32.
    Raises:
        EnvironmentLack: the installed transformers does not know the architecture.
        InputError: the model's code or names are not as the walk needs them.
    """
    from accelerate import init_empty_weights

    model_class, config = _model_class(source)
    with _quiet(), init_empty_weights(include_buffers=False):
        full = model_class._from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    full.eval().requires_grad_(False)
    decoder = full.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(
            f"{source.folder}: {type(decoder).__name__} has no list of decoder layers: nvquant cannot walk this "
            f"architecture."
        )
    root = prefix.removesuffix("layers")
    skeleton = Skeleton(source, full.base_model, decoder, layers, root, prefix, device, dtype)
    _check_names(skeleton)
    return skeleton


def load_outer(skeleton: Skeleton, token_ids: Tensor) -> None:
    """Fill what surrounds the decoder's layers: small tensors whole, embeddings only with the rows that `token_ids`
    needs.

    Args:
        token_ids: int64, any shape: every id that calibration will embed.
    """
    from accelerate.utils import set_module_tensor_to_device

    embeddings = {name: module for name, module in _outer_modules(skeleton) if isinstance(module, nn.Embedding)}
    for name, embedding in embeddings.items():
        _load_embedding_rows(skeleton, f"{skeleton.root}{name}.weight", embedding, token_ids)
    for name in _outer_state(skeleton):
        if name.rpartition(".")[0] in embeddings:
            continue
        value = skeleton.source.read(skeleton.root + name)
        set_module_tensor_to_device(skeleton.decoder, name, skeleton.device, value=value, dtype=skeleton.dtype)
    for _, module in _outer_modules(skeleton):
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[key] = buffer.to(skeleton.device)  # rotary tables: float32, whatever the model's dtype


@contextlib.contextmanager
def loaded_layer(skeleton: Skeleton, layer: int, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """A decoder layer with its weights; without them again afterwards.

    Args:
        tensors: the layer's tensors by their names in the checkpoint, on the device, in their stored dtype.
    """
    from accelerate.utils import set_module_tensor_to_device

    module = skeleton.layers[layer]
    names = skeleton.layer_tensors(layer)
    for name, stored in names.items():
        set_module_tensor_to_device(module, name, skeleton.device, value=tensors[stored], dtype=skeleton.dtype)
    for part in module.modules():
        for key, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[key] = buffer.to(skeleton.device)
    try:
        yield module
    finally:
        for name in names:
            set_module_tensor_to_device(module, name, "meta")


def _model_class(source: Checkpoint) -> tuple[Any, Any]:
    import transformers

    architecture = (source.config.get("architectures") or ["none"])[0]
    model_class = getattr(transformers, architecture, None)
    wrote = source.config.get("transformers_version", "another version")
    if model_class is None:
        raise EnvironmentLack(
            f"{source.folder}: transformers {transformers.__version__} does not know the architecture {architecture} "
            f"(the model was made with {wrote}): install a transformers that does, or use a weight-only recipe."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            Path(source.folder), local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, TypeError) as error:
        raise EnvironmentLack(
            f"{source.folder}: transformers {transformers.__version__} cannot read config.json, made with "
            f"{wrote} ({error})."
        ) from error
    return model_class, config


def _outer_modules(skeleton: Skeleton) -> Iterator[tuple[str, nn.Module]]:
    for name, module in skeleton.decoder.named_modules():
        if name != "layers" and not name.startswith("layers."):
            yield name, module


def _outer_state(skeleton: Skeleton) -> list[str]:
    return [name for name in skeleton.decoder.state_dict() if not name.startswith("layers.")]


def _check_names(skeleton: Skeleton) -> None:
    wanted = [skeleton.root + name for name in _outer_state(skeleton)]
    for layer in range(len(skeleton.layers)):
        wanted += skeleton.layer_tensors(layer).values()
    missing = [name for name in wanted if name not in skeleton.source.files]
    if missing:
        raise InputError(
            f"{skeleton.source.folder} lacks {missing[0]} ({len(missing)} of {len(wanted)} tensors that "
            f"{type(skeleton.decoder).__name__} needs): "
            "the checkpoint is incomplete, or stores the model in a form that nvquant cannot walk."
        )


def _load_embedding_rows(skeleton: Skeleton, name: str, embedding: nn.Embedding, token_ids: Tensor) -> None:
    """Give an embedding only the rows it will be asked for, and let it look ids up among them."""
    ids = torch.unique(token_ids)
    rows = skeleton.source.info(name).shape[0]
    if int(ids[-1]) >= rows:
        raise InputError(
            f"calibration holds the token id {int(ids[-1])}, but {name} has {rows} rows: the ids belong to "
            f"another tokenizer."
        )
    table = skeleton.source.read_rows(name, ids.tolist()).to(skeleton.device, skeleton.dtype)
    embedding.weight = nn.Parameter(table, requires_grad=False)
    embedding.padding_idx = None  # F.embedding checks it against the number of rows; it has no effect on values
    known = ids.to(skeleton.device)
    embedding.register_forward_pre_hook(lambda _module, args: (torch.searchsorted(known, args[0]), *args[1:]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' advice for people who load models by hand off the user's screen."""
    from transformers.utils import logging as library

    before = library.get_verbosity()
    library.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library.set_verbosity(before)
