"""The order of the residual stream's channels: which tensors follow it, found and proved layer by layer.

The channels of the residual stream may stand in any order, if everything that reads or writes it follows. In a good
order, each block of 16 has at most a few of the channels that are large (docs/accuracy.md, section "Order").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..format.constants import BLOCK
from ..recipe.roles import Role
from .trial import LayerTrial, Linears

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Axes:
    """The tensors that follow the residual stream.

    Attributes:
        axes: 0 for rows or the elements of a vector, 1 for columns, by the names of the tensors.
        reason: why there is no order for this model. Empty if there is one.
    """

    axes: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""


def outer_axes(shapes: Mapping[str, tuple[int, ...]], roles: Mapping[str, Role], size: int) -> Axes:
    """The tensors outside of the decoder's layers: an embedding, a final norm, and perhaps a head.

    Args:
        shapes: of all tensors there, by name.
        roles: at least theirs.
        size: channels of the residual stream.
    """
    axes: dict[str, int] = {}
    for name, shape in shapes.items():
        if roles[name] in (Role.EMBEDDING, Role.HEAD) and len(shape) == 2 and shape[1] == size:
            axes[name] = 1
        elif roles[name] is Role.OTHER and shape == (size,):
            axes[name] = 0
        else:
            return Axes(reason=f"{name} stands outside of the decoder's layers and may read hidden states")
    return Axes(axes)


def layer_axes(trial: LayerTrial, tensors: Mapping[str, Tensor], size: int) -> Axes:
    """The tensors of a layer that follow the residual stream, proved by a trial.

    Linears that read the stream itself, or a norm of its size, follow with their columns. Others with as many rows
    write to it. Vectors of its size follow if they are no bias of a reader.

    Args:
        tensors: of the layer in the source, by their names in the checkpoint, on the device.
        size: channels of the residual stream.
    """
    linears = trial.linears(size)
    axes = _axes_of(linears, tensors, size)
    order = _trial_order(size).to(trial.hidden.device)
    changed = {name: tensors[name].float().index_select(axis, order) for name, axis in axes.items()}
    reference = trial.run().output
    moved = trial.run(changed, hidden=trial.hidden.index_select(-1, order)).output
    error = trial.relative(reference.index_select(-1, order), moved)
    return Axes(axes) if error <= TOLERANCE else Axes(reason="a layer's output does not follow the order")


def _axes_of(linears: Linears, tensors: Mapping[str, Tensor], size: int) -> dict[str, int]:
    axes: dict[str, int] = {}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        if tensor.ndim == 2 and name in linears.readers:
            axes[name] = 1
        elif tensor.ndim == 2 and len(tensor) == size:
            axes[name] = 0
        elif tensor.shape == (size,) and f"{module}.weight" not in linears.readers:
            axes[name] = 0
    return axes


def _trial_order(size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))


def dealt(scores: Tensor) -> list[int]:
    """The order that deals channels out to blocks of 16 by falling score: rank r goes to block r modulo their number.

    Args:
        scores: float64 [size], size divisible by 16.
    Returns:
        the former place of each channel.
    """
    blocks = len(scores) // BLOCK
    by_score = scores.argsort(descending=True, stable=True)
    rank = torch.arange(len(scores))
    order = torch.empty_like(rank)
    order[(rank % blocks) * BLOCK + rank // blocks] = by_score
    return [int(place) for place in order]


def share_of_energy(mean_squares: Sequence[Tensor]) -> Tensor:
    """The score of each channel: its mean square in units of the mean over channels, averaged over sites.

    Args:
        mean_squares: float64 [size] each, of inputs after folds.
    """
    return torch.stack([square / square.mean().clamp(min=1e-300) for square in mean_squares]).mean(0)
