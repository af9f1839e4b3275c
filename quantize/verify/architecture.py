"""Checks of the model's description in config.json against the stored tensors, and of these tensors' numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..calibrate.ids import config_value
from ..calibrate.model_class import embedding_rows, model_ties_head
from ..checkpoint.custom_code import missing_code
from ..checkpoint.headers import TensorInfo
from ..checkpoint.source import torch_dtype
from ..format.native import amax_on_cpu, has_native
from ..recipe.decoder import has_layer_count
from ..recipe.heads import KEY, tie_of, token_embedding
from ..recipe.roles import Role, decoder_prefix, layer_index, role_of, text_config
from .report import Finding, counted, not_read
from .subject import Subject, pieces
from .threads import map_in_threads

FLOATS = ("BF16", "F16", "F32", "F64")


def check_architecture(subject: Subject) -> Finding:
    """Check that exactly the decoder layers that the config counts are there, that the embedding has a row for each
    token, that a head that the config does not tie to it is stored, and that no quantized head is tied."""
    prefix = decoder_prefix(subject.shapes, subject.config)
    layers = {layer_index(name, prefix) for name in subject.infos} - {None}
    faults = [*_wrong_layers(subject, {layer for layer in layers if layer is not None}), *_wrong_vocabulary(subject)]
    names = [*subject.roles, *(f"{module}.weight" for module in subject.matrices)]
    has_head = any(role_of(name, (1, 1)) is Role.HEAD for name in names)
    if not has_head and tie_of(subject.config) is False and not model_ties_head(subject.checkpoint):
        faults.append("tie_word_embeddings is false, but no head is stored: servers would leave it uninitialized")
    if subject.head is not None and _may_be_tied(subject.config):
        faults.append(
            f"{subject.head} is quantized, but config.json ties it to the embedding, which servers would use instead"
        )
    faults += [
        f"{name} is missing, which {by} {'imports' if by.endswith('.py') else 'names in auto_map'}"
        for name, by in missing_code(subject.folder).items()
    ]
    return Finding(counted(len(layers), "decoder layer"), faults)


def _may_be_tied(config: Mapping[str, Any]) -> bool:
    """Whether any reader ties the head: by the class, or by the flag of the config or of the text config alone."""
    return tie_of(config) is not False or True in (config.get(KEY), text_config(config).get(KEY))


def _wrong_layers(subject: Subject, layers: set[int]) -> Iterator[str]:
    count = config_value(subject.config, "num_hidden_layers")
    if not isinstance(count, int) or not layers or has_layer_count(subject.config, len(layers)):
        return
    missing = sorted(set(range(count)) - layers)
    if missing:
        yield f"num_hidden_layers is {count}, but layer {missing[0]} is not stored ({len(missing)} missing)"
    # Layers that only predict further tokens are stored behind the others (GLM 4.5, DeepSeek V3).
    predicts_more = any("nextn" in key or "mtp" in key for key in text_config(subject.config))
    if max(layers) >= count and not predicts_more:
        yield f"num_hidden_layers is {count}, but layer {max(layers)} is stored"


def _wrong_vocabulary(subject: Subject) -> Iterator[str]:
    """An embedding with other rows than the config counts, unless its class builds more of them (as Mllama does). vLLM
    refuses all others as it loads them (`VocabParallelEmbedding.weight_loader`)."""
    size = config_value(subject.config, "vocab_size")
    name = token_embedding({name: subject.infos[name].shape for name in subject.roles}, subject.config)
    if name is None or not isinstance(size, int):
        return
    rows = subject.infos[name].shape[0]
    if rows < size or (rows > size and embedding_rows(subject.checkpoint) != rows):
        yield f"vocab_size is {size}, but {name} has {rows} rows"


def check_unquantized(subject: Subject) -> Finding:
    """Check that no unquantized tensor contains a NaN."""
    infos = [subject.infos[name] for name in subject.roles if subject.infos[name].dtype in FLOATS]
    if subject.is_remote:
        return not_read(f"{counted(len(infos), 'tensor')}, {sum(info.nbytes for info in infos):,} bytes")
    found = map_in_threads(lambda info: _first_nan(subject, info), infos, subject.progress, "reading other tensors")
    faults = [f"{info.name} holds a NaN at element {at:,}" for info, at in zip(infos, found, strict=True) if at >= 0]
    return Finding(f"{counted(len(infos), 'tensor')}, {sum(info.nbytes for info in infos):,} bytes", faults)


def _first_nan(subject: Subject, info: TensorInfo) -> int:
    """The number of the first element that is a NaN, or -1."""
    dtype = torch_dtype(info.dtype)
    for begin, piece in pieces(subject.checkpoint, info.name):
        values = torch.frombuffer(piece, dtype=dtype)
        if has_native(values) and bool(amax_on_cpu(values).isfinite()):
            continue
        if bool(values.sum(dtype=torch.float64).isnan()):  # quicker than asking each; infinities may cancel, too
            nan = values.isnan().nonzero()
            if len(nan):
                return begin // dtype.itemsize + int(nan[0])
    return -1
