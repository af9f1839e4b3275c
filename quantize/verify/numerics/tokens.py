"""The loss of one model's predictions against another's, token by token, gathered while the vocabulary passes by.

Logits of all tokens over all of a vocabulary are never in memory at once. Each part of the vocabulary is reduced to a
few numbers a token. For the reference a and another model b, with p = softmax(a):

    KL(a || b) = sum p (a - b) - logsumexp(a) + logsumexp(b)

in nats. Sums over a part are float32, over parts float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .document import Agreement, Divergence, Predictions


class RunningLogits:
    """The running reduction of one model's logits.

    Args:
        targets: int64 [tokens], the token that really comes next.
    """

    def __init__(self, targets: Tensor) -> None:
        count, device = len(targets), targets.device
        self.targets = targets
        self.top = torch.full((count,), -math.inf, device=device)
        self.top_at = torch.zeros(count, dtype=torch.int64, device=device)
        self.mass = torch.zeros(count, dtype=torch.float64, device=device)  # sum of exp(logit - top)
        self.target = torch.zeros(count, device=device)
        self.is_finite = torch.ones(count, dtype=torch.bool, device=device)

    def add(self, rows: slice, logits: Tensor, first: int) -> Tensor:
        """Take in float32 [tokens of `rows`, part of the vocabulary from id `first` on].

        Returns:
            float64 [tokens], the factor by which earlier sums shrink, since the largest logit may have grown.
        """
        top, at = logits.max(-1)
        old = self.top[rows]
        grown = top > old
        new = torch.where(grown, top, old)
        shrink = torch.where(old == new, 1.0, (old - new).double().exp())
        self.mass[rows] = self.mass[rows] * shrink + (logits - new[:, None]).exp_().sum(-1).double()
        self.top_at[rows] = torch.where(grown, at + first, self.top_at[rows])
        self.top[rows] = new
        self.is_finite[rows] &= torch.isfinite(top)
        targets = self.targets[rows] - first
        inside = (targets >= 0) & (targets < logits.shape[1])
        found = logits.gather(1, targets.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.target[rows] = torch.where(inside, found, self.target[rows])
        return shrink

    @property
    def log_mass(self) -> Tensor:
        """log of the sum of exp(logit), float64 [tokens]."""
        return self.top.double() + self.mass.log()

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood of the next token in nats, float64 [tokens]. NaN where a logit is no number."""
        nll = self.log_mass - self.target.double()
        return torch.where(self.is_finite, nll, torch.nan)


class RunningDivergence:
    """The running sum p (a - b) of a reference a and another model b."""

    def __init__(self, reference: RunningLogits, other: RunningLogits) -> None:
        self._reference, self._other = reference, other
        self._sum = torch.zeros(len(reference.targets), dtype=torch.float64, device=reference.targets.device)

    def add(self, rows: slice, weights: Tensor, shrink: Tensor, difference: Tensor) -> None:
        """Take in a part of the vocabulary.

        Args:
            weights: float32 [tokens of `rows`, part], exp(a - its running top).
            shrink: float64 [tokens], of the reference's `add`.
            difference: float32, a - b.
        """
        self._sum[rows] = self._sum[rows] * shrink + (weights * difference).sum(-1).double()

    @property
    def kl(self) -> Tensor:
        """KL divergence in nats, float64 [tokens], not below 0. NaN where a logit is no number."""
        reference, other = self._reference, self._other
        kl = self._sum / reference.mass - reference.log_mass + other.log_mass
        return torch.where(reference.is_finite & other.is_finite, kl.clamp(min=0), torch.nan)

    @property
    def agrees(self) -> Tensor:
        """Whether both models have the same most likely token, bool [tokens]."""
        return self._reference.top_at == self._other.top_at


@dataclass(frozen=True)
class TokenScores:
    """One model against the reference.

    Attributes:
        nll: float64 [tokens].
        kl: float64 [tokens].
        agrees: bool [tokens].
        lengths: scored tokens of each sequence, in their order.
    """

    nll: Tensor
    kl: Tensor
    agrees: Tensor
    lengths: Sequence[int]

    def of(self, sequences: Sequence[int]) -> TokenScores:
        """The scores of some of the sequences, by their places."""

        def chosen(values: Tensor) -> Tensor:
            parts = values.split(list(self.lengths))
            return torch.cat([parts[at] for at in sequences])

        lengths = [self.lengths[at] for at in sequences]
        return TokenScores(chosen(self.nll), chosen(self.kl), chosen(self.agrees), lengths)

    def numbers(self, words: str, nll_source: Tensor, again: TokenScores | None = None) -> Predictions:
        """Means over all tokens.

        Args:
            words: the lane's arithmetic.
            nll_source: of the reference, float64 [tokens].
            again: the same computation in the noise of BF16. Without it, the rounding noise is None.
        """
        nll = float(self.nll.mean())
        return Predictions(
            words=words,
            kl=self.divergence(again),
            nll=nll,
            delta_nll=nll - float(nll_source.mean()),
            nll_difference=float((self.nll - nll_source).abs().mean()),
            perplexity=perplexity(nll),
            top1=self.agreement(again),
        )

    def divergence(self, again: TokenScores | None = None) -> Divergence:
        """Mean KL divergence with its standard error over sequences, rounding noise, median and 99th percentile."""
        return Divergence(
            mean=float(self.kl.mean()),
            standard_error=standard_error(self.kl, self.lengths),
            rounding_noise=rounding_noise(self.kl, None if again is None else again.kl, self.lengths),
            median=quantile(self.kl, 0.5),
            p99=quantile(self.kl, 0.99),
        )

    def agreement(self, again: TokenScores | None = None) -> Agreement:
        """Top-1 agreement with its standard error over sequences and rounding noise."""
        agrees = self.agrees.double()
        return Agreement(
            agreement=float(agrees.mean()),
            standard_error=standard_error(agrees, self.lengths),
            rounding_noise=rounding_noise(agrees, None if again is None else again.agrees.double(), self.lengths),
        )


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood, infinite where that is beyond a float."""
    return math.exp(nll) if nll < 700 else math.inf


def quantile(values: Tensor, share: float) -> float:
    """The value below which a share of them lies, one that occurs (float64). NaN where any is NaN."""
    if bool(values.isnan().any()):
        return math.nan
    ordered = values.sort().values
    return float(ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)])


def standard_error(values: Tensor, lengths: Sequence[int]) -> float | None:
    """Standard error of the mean over tokens, with sequences as the independent units, because the tokens of a text are
    correlated: the ratio estimator's (Cochran, Sampling Techniques, 3rd edition, section 2.11). None for one sequence.

    Args:
        values: float64 [tokens].
        lengths: of the sequences, in order.
    """
    count = len(lengths)
    if count < 2:
        return None
    mean = values.mean()
    sizes = torch.tensor(lengths, dtype=torch.float64, device=values.device)
    sums = torch.stack([part.sum() for part in values.split(list(lengths))])
    spread = (sums - mean * sizes).square().sum() / (count - 1)
    return float((spread / count).sqrt() / sizes.mean())


def rounding_noise(values: Tensor, again: Tensor | None, lengths: Sequence[int]) -> float | None:
    """Standard deviation of the mean over tokens that the last bits of products cause, None without a second result.

    The two results differ by nothing else. Half of the squared differences of the sequences' sums therefore estimates
    the variance of the sum of one.

    Args:
        values, again: float64 [tokens], of two computations.
        lengths: of the sequences, in order.
    """
    if again is None:
        return None
    sums = torch.stack([part.sum() for part in (values - again).split(list(lengths))])
    return float((sums.square().sum() / 2).sqrt() / len(values))
