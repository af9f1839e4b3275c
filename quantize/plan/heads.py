"""A head that is stored although the config ties it to the embedding.

Readers treat it differently. transformers 5 (`PreTrainedModel.tie_weights`) and vLLM 0.32
(`maybe_untie_word_embeddings`) use the stored head if it differs, and older ones use the embedding. With an equal copy
all readers see the same model.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from ..checkpoint.source import COPY_CHUNK_BYTES, Checkpoint, torch_dtype
from ..errors import InputError
from ..recipe.heads import class_ties_head, is_tied, stored_head, token_embedding
from ..weights.base import Weights
from ..weights.decoding import with_shards_below

if TYPE_CHECKING:
    from torch import Tensor

SPAN_BYTES = 64 << 10
HOW_READERS_TAKE_IT = "transformers 5 and vLLM 0.32 use the stored head, older readers use the embedding"


def tied_pair(source: Checkpoint) -> tuple[str, str] | None:
    """A stored head and the embedding that it is tied to, or None where no head is stored or the model is not tied."""
    shapes = {name: info.shape for name, info in source.infos().items()}
    head, embedding = stored_head(shapes), token_embedding(shapes, source.config)
    if head is None or embedding is None or not is_tied(source.config):
        return None
    return head, embedding


def refuse_other_head(source: Checkpoint, model: str) -> None:
    """Refuse a model with a head of its own that its config ties to the embedding.

    It compares a few ranges of both tensors of a model on the Hub, and every byte of a folder. Without such a head it
    reads nothing.

    Raises:
        InputError: the head differs.
    """
    pair = tied_pair(source)
    if pair is None or _are_equal(source, *pair) or class_ties_head(source.config) is False:
        return
    head, embedding = pair
    raise InputError(
        f"{model} stores {head}, which differs from {embedding}, although config.json ties them: {HOW_READERS_TAKE_IT}",
        where=model,
        hint=(
            f"Set tie_word_embeddings to false in config.json to keep the stored head, or remove {head} from the "
            "weights"
        ),
    )


def _are_equal(source: Checkpoint, head: str, embedding: str) -> bool:
    if source.hub is None:
        return equal_tensors(source, head, embedding)
    from ..checkpoint.hub.ranges import RangeReader
    from ..checkpoint.hub.shards import RemoteShards

    reader = RangeReader(source.hub)
    try:
        return equal_tensors(with_shards_below(source, RemoteShards(reader)), head, embedding, is_sampled=True)
    finally:
        reader.end()


def equal_tensors(weights: Weights, one: str, other: str, is_sampled: bool = False) -> bool:
    """Whether two tensors of a model, with rows, have the same values, in any dtypes.

    Args:
        is_sampled: compare the beginning, the middle and the end only.
    """
    infos = weights.infos()
    left, right = infos[one], infos[other]
    if left.shape != right.shape:
        return False
    sizes = [torch_dtype(info.dtype).itemsize for info in (left, right)]
    rows, row_bytes = left.shape[0], max(sizes) * prod(left.shape[1:])
    height = max(1, (SPAN_BYTES if is_sampled else COPY_CHUNK_BYTES) // max(1, row_bytes))
    starts = {0, max(0, rows // 2 - height), max(0, rows - height)} if is_sampled else range(0, rows, height)
    for start in starts:
        part = range(start, min(rows, start + height))
        if not _same_values(weights.read_rows(one, part), weights.read_rows(other, part)):
            return False
    return True


def _same_values(one: Tensor, other: Tensor) -> bool:
    import torch

    if one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
        return True  # a NaN too
    return torch.equal(one.float(), other.float())
