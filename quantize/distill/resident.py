"""A model with all of its weights on one device, whose own forward runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..calibrate.skeleton import build_skeleton, computing_on, load_outer, loaded_layer
from ..checkpoint.source import Checkpoint
from ..verify.numerics.head import Head
from ..weights.base import Weights, names_by_layer, stored_names


class Resident:
    """A model that is ready to run. The source is one, and the checkpoint another.

    Attributes:
        skeleton: with its weights.
        head: of the model.
        head_rows: the weight of the head on the device.

    Args:
        stored: where the stored tensors of `weights` are read from.
        prefix: before a layer's number in the names of the weights.
        ids: int64, every token id that will be embedded.
    Raises:
        EnvironmentLack, InputError: see `build_skeleton` and `Head`.
    """

    def __init__(
        self,
        weights: Weights,
        stored: Checkpoint,
        prefix: str,
        ids: Tensor,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.skeleton = build_skeleton(weights, prefix, device, dtype)
        self.device, self.dtype = device, dtype
        self._loaded = ExitStack()
        load_outer(self.skeleton, ids)
        for layer, names in names_by_layer(weights, prefix).items():
            read = {name: stored.read(name).to(device) for name in stored_names(weights, names)}
            tensors = weights.assemble(names, read, dtype)
            self._loaded.enter_context(loaded_layer(self.skeleton, layer, tensors))
        self.head = Head(self.skeleton)
        self.head_rows = self.read_head().to(device)

    def read_head(self) -> Tensor:
        """The weight of the head on the CPU."""
        return self.head.read(range(self.head.rows))

    def close(self) -> None:
        """Free the memory of the layers."""
        self._loaded.close()

    def hidden(self, batch: Tensor) -> Tensor:
        """The input of the head.

        Args:
            batch: int64 [sequences, tokens].
        Returns:
            [sequences, tokens, hidden size] in the model's dtype.
        """
        model: Any = self.skeleton.model
        with computing_on(self.device):
            output: Tensor = model(input_ids=batch.to(self.device), use_cache=False).last_hidden_state
        return output

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The logits of some tokens.

        Args:
            hidden: [tokens, hidden size], from `hidden`.
            rows: the weight of the head in float32.
        Returns:
            float32 [tokens, vocabulary].
        """
        return self.head.logits(hidden.float(), 0, rows)


def padded(samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences as one batch. In a causal model, tokens on the right change none before them.

    Args:
        samples: int64 [tokens] each.
    Returns:
        int64 [sequences, tokens], each filled up with its own last id, and bool of the same shape: the real tokens.
    """
    length = max(map(len, samples))
    batch = torch.stack([torch.cat([ids, ids[-1:].expand(length - len(ids))]) for ids in samples])
    return batch, torch.stack([torch.arange(length) < len(ids) for ids in samples])
