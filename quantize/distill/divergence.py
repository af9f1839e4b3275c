"""The KL divergence of the checkpoint's predictions from the source's, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .resident import Resident
from .student import Student

LOGITS = {"cpu": 1 << 24, "cuda": 1 << 26}
"""The elements that are computed at a time."""


class Divergence:
    """KL(source || checkpoint) on logits, in nats."""

    def __init__(self, teacher: Resident, student: Student) -> None:
        self._teacher, self._student = teacher, student

    @torch.no_grad()
    def of_tokens(self, source: Tensor, hidden: Tensor) -> Tensor:
        """The divergence of each token.

        Args:
            source, hidden: [tokens, hidden size], the heads' inputs of both models.
        Returns:
            float64 [tokens].
        """
        rows = self._head_rows()
        parts = [self._part(source[part], hidden[part], rows) for part in self._parts(len(hidden))]
        return torch.cat(parts).double()

    def gradient(self, source: Tensor, hidden: Tensor) -> tuple[float, Tensor]:
        """The mean divergence, and its gradient.

        Args:
            source, hidden: as of `of_tokens`, detached.
        Returns:
            The mean over the tokens, and the gradient of `hidden`, of its shape and dtype.
        """
        rows, total = self._head_rows(), 0.0
        found = torch.empty_like(hidden)
        for part in self._parts(len(hidden)):
            leaf = hidden[part].detach().requires_grad_()
            mean = self._part(source[part], leaf, rows).sum() / len(hidden)
            (found[part],) = torch.autograd.grad(mean, leaf)
            total += float(mean.detach())
        return total, found

    def _head_rows(self) -> tuple[Tensor, Tensor]:
        own, other = (one.head_rows for one in (self._teacher, self._student.resident))
        return own.float(), own.float() if own is other else other.float()

    def _parts(self, tokens: int) -> Iterator[slice]:
        vocabulary, device = self._teacher.head.rows, self._teacher.device.type
        height = max(1, LOGITS[device] // vocabulary)
        for begin in range(0, tokens, height):
            yield slice(begin, min(tokens, begin + height))

    def _part(self, source: Tensor, hidden: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            wanted = self._teacher.logits(source, rows[0]).log_softmax(-1)
        got = self._student.logits(hidden, rows[1]).log_softmax(-1)
        return (wanted.exp() * (wanted - got)).sum(-1)
