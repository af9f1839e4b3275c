"""The interface of a model's weights: its tensors as its code computes with them, whatever stores them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..checkpoint.headers import TensorInfo
from ..recipe.decoder import layer_index

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Weights(Protocol):
    """A model's tensors by the names and shapes that its code gives them.

    A `Checkpoint` is one whose tensors are stored so. A quantized checkpoint decodes its matrices
    (`verify.numerics.served.ServedModel`).

    Attributes:
        folder: with config.json, from which the model's class is built.
        config: config.json.
        where: the name in messages.
    """

    @property
    def folder(self) -> Path:
        """See the class."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """See the class."""
        ...

    @property
    def where(self) -> str:
        """See the class."""
        ...

    def infos(self) -> Mapping[str, TensorInfo]:
        """All tensors by name. A decoded one has the dtype BF16, and no place in a file."""
        ...

    def stored(self, name: str) -> tuple[str, ...]:
        """The names of the stored tensors that are read for a tensor with its layer.

        Raises:
            KeyError: there is no such tensor.
        """
        ...

    def assemble(self, names: Iterable[str], stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors by name, from the stored ones.

        Args:
            stored: at least `stored(name)` of each name, on one device.
            dtype: of decoded tensors. The others keep theirs, and are not copied.
        """
        ...

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in its stored dtype or, decoded, in float32.

        Raises:
            InputError: a shard vanished, changed or cannot be read.
        """
        ...

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of one tensor, otherwise as `read`."""
        ...


def names_by_layer(weights: Weights, prefix: str) -> dict[int, list[str]]:
    """Names of the tensors of each decoder layer.

    Args:
        prefix: before a layer's number.
    """
    layers: dict[int, list[str]] = {}
    for name in weights.infos():
        layer = layer_index(name, prefix)
        if layer is not None:
            layers.setdefault(layer, []).append(name)
    return dict(sorted(layers.items()))


def stored_names(weights: Weights, names: Iterable[str]) -> list[str]:
    """The stored tensors of some tensors, each once."""
    return list(dict.fromkeys(stored for name in names for stored in weights.stored(name)))
