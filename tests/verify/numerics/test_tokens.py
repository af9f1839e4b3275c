"""What is gathered while the vocabulary passes by in parts is what whole logits in float64 give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvquant.verify.numerics import predictions
from nvquant.verify.numerics.tokens import (
    RunningDivergence,
    RunningLogits,
    TokenScores,
    perplexity,
    quantile,
    rounding_noise,
    standard_error,
)
from torch import Tensor

LARGEST = 3e4  # of a logit; any real one is far below


@dataclass
class Gathered:
    source: RunningLogits
    other: RunningLogits
    divergence: RunningDivergence


def gather(source: Tensor, other: Tensor, targets: Tensor, cuts: Sequence[int], row_cuts: Sequence[int]) -> Gathered:
    """Reduce logits [tokens, vocabulary] in parts, cut at the given columns and rows."""
    made = Gathered(RunningLogits(targets), RunningLogits(targets), None)  # type: ignore[arg-type]
    made.divergence = RunningDivergence(made.source, made.other)
    columns, rows = [0, *sorted(set(cuts)), source.shape[1]], [0, *sorted(set(row_cuts)), len(source)]
    for first, end in pairwise(columns):
        for begin, stop in pairwise(rows):
            part = {"source": source[begin:stop, first:end], "w4a4": other[begin:stop, first:end]}
            predictions._add_part(
                slice(begin, stop), first, part, {"source": made.source, "w4a4": made.other}, {"w4a4": made.divergence}
            )
    return made


@st.composite
def logits(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, list[int], list[int]]:
    """Two models' logits, targets, and where to cut columns and rows."""
    tokens, vocabulary = draw(st.integers(1, 5)), draw(st.integers(2, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    spread = draw(st.sampled_from([1e-3, 1.0, 20.0, LARGEST]))
    source = spread * torch.randn(tokens, vocabulary, generator=generator).clamp(-1, 1)
    other = source + draw(st.sampled_from([0.0, 1e-4, 1.0, 100.0])) * torch.randn(source.shape, generator=generator)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    cuts = draw(st.lists(st.integers(1, vocabulary - 1), max_size=6))
    row_cuts = draw(st.lists(st.integers(1, tokens - 1), max_size=3)) if tokens > 1 else []
    return source, other, targets, cuts, row_cuts


@settings(max_examples=300, deadline=None)
@given(logits())
def test_parts_of_any_size_give_what_whole_logits_give(
    given: tuple[Tensor, Tensor, Tensor, list[int], list[int]],
) -> None:
    source, other, targets, cuts, row_cuts = given
    found = gather(source, other, targets, cuts, row_cuts)
    a, b = (values.double().log_softmax(-1) for values in (source, other))
    # float32 has a step of 2e-7 of a logit's size; nothing else is lost.
    allowed = 1e-6 + 5e-7 * float(max(source.abs().max(), other.abs().max()))
    for running, exact, values in ((found.source, a, source), (found.other, b, other)):
        torch.testing.assert_close(running.nll, -exact.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=allowed)
        assert torch.equal(running.top, values.max(-1).values)
        assert torch.equal(running.top_at, values.argmax(-1))
        torch.testing.assert_close(running.log_mass, values.double().logsumexp(-1), rtol=1e-6, atol=allowed)
    kl = (a.exp() * (a - b)).sum(-1)
    torch.testing.assert_close(found.divergence.kl, kl, rtol=1e-5, atol=allowed)
    assert bool((found.divergence.kl >= 0).all())
    assert torch.equal(found.divergence.agrees, source.argmax(-1) == other.argmax(-1))


def test_equal_logits_diverge_by_nothing() -> None:
    values = 50 * torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    found = gather(values, values.clone(), torch.arange(7), [100, 101, 250], [3])
    assert float(found.divergence.kl.max()) < 1e-9
    assert bool(found.divergence.agrees.all())


def test_a_tie_over_two_parts_goes_to_the_smaller_id_as_in_argmax() -> None:
    values = torch.zeros(1, 8)
    values[0, [2, 6]] = 5.0
    assert int(gather(values, values, torch.tensor([0]), [4], []).source.top_at[0]) == 2


@pytest.mark.parametrize("cuts", [[], [2], [1, 2, 3]])
@pytest.mark.parametrize("at", [0, 2, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_no_number_makes_its_token_nan_and_no_other(bad: float, at: int, cuts: list[int]) -> None:
    source = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    for broken in ("source", "other"):
        pair = {"source": source.clone(), "other": source + 0.1}
        pair[broken][1, at] = bad
        found = gather(pair["source"], pair["other"], torch.tensor([0, 1, 2]), cuts, [])
        running = found.source if broken == "source" else found.other
        assert running.nll.isnan().tolist() == [False, True, False]
        assert found.divergence.kl.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("cuts", [[], [2], [1, 2, 3]])
def test_a_token_that_only_one_of_the_models_forbids_never_counts_as_a_finite_loss(cuts: list[int]) -> None:
    source = torch.randn(2, 4, generator=torch.Generator().manual_seed(2))
    other = source.clone()
    other[1, 3] = -math.inf
    found = gather(source, other, torch.tensor([0, 3]), cuts, [])
    assert found.divergence.kl.isfinite().tolist() == [True, False]
    assert found.other.nll.isfinite().tolist() == [True, False]


def test_a_row_without_any_finite_logit_is_nan() -> None:
    values = torch.full((1, 6), -math.inf)
    found = gather(values, torch.zeros(1, 6), torch.tensor([0]), [3], [])
    assert found.source.nll.isnan().all() and found.divergence.kl.isnan().all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=8), st.integers(0, 10**6))
def test_the_standard_error_is_the_ratio_estimators(lengths: list[int], seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=sum(lengths))
    sequences = np.split(values, np.cumsum(lengths)[:-1])
    n, sizes = len(lengths), np.array(lengths)
    residuals = np.array([part.sum() for part in sequences]) - values.mean() * sizes
    expected = math.sqrt((residuals**2).sum() / (n - 1) / n) / sizes.mean()
    found = standard_error(torch.from_numpy(values), lengths)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_standard_error_of_sequences_of_equal_length_is_that_of_their_means() -> None:
    values = torch.arange(24, dtype=torch.float64).square()
    means = values.view(4, 6).mean(1).numpy()
    assert standard_error(values, [6] * 4) == pytest.approx(means.std(ddof=1) / 2)


def test_tokens_that_repeat_each_other_do_not_make_the_error_smaller() -> None:
    values = torch.tensor([1.0, 5.0, 2.0, 7.0], dtype=torch.float64)
    apart = standard_error(values, [1] * 4)
    assert standard_error(values.repeat_interleave(100), [100] * 4) == pytest.approx(apart)


def test_one_sequence_has_no_standard_error() -> None:
    assert standard_error(torch.ones(5, dtype=torch.float64), [5]) is None


@pytest.mark.parametrize("percent", [50, 99])
def test_a_quantile_is_the_smallest_value_that_has_that_share_at_or_below_it(percent: int) -> None:
    for count in range(1, 401):
        values = torch.randperm(count, generator=torch.Generator().manual_seed(count)).double()
        below = -(-percent * count // 100)  # at least so many
        assert quantile(values, percent / 100) == below - 1


def test_a_quantile_of_what_holds_a_nan_is_nan() -> None:
    assert math.isnan(quantile(torch.tensor([1.0, math.nan, 2.0], dtype=torch.float64), 0.5))


def test_scores_are_means_over_tokens() -> None:
    scores = TokenScores(
        nll=torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64),
        kl=torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64),
        agrees=torch.tensor([True, True, False]),
        lengths=[2, 1],
    )
    found = scores.numbers("a lane", torch.tensor([1.5, 2.0, 4.0], dtype=torch.float64))
    assert found.words == "a lane"
    assert found.nll == 3.0 and found.delta_nll == 0.5
    assert found.nll_difference == pytest.approx(2.5 / 3)
    assert found.perplexity == pytest.approx(math.exp(3))
    assert found.kl.mean == pytest.approx(0.2)
    assert found.kl.median == 0.1 and found.kl.p99 == 0.5
    assert found.top1.agreement == pytest.approx(2 / 3)
    assert found.top1.standard_error is not None and found.top1.standard_error > 0


def test_a_perplexity_beyond_a_float_is_infinite() -> None:
    assert perplexity(1e4) == math.inf
    assert not math.isfinite(perplexity(math.nan))


def test_rounding_noise_is_the_spread_of_equal_computations() -> None:
    generator = torch.Generator().manual_seed(3)
    lengths, spread = [40] * 500, 0.3
    truth = torch.randn(20_000, generator=generator, dtype=torch.float64)
    first, second = (truth + spread * torch.randn(20_000, generator=generator, dtype=torch.float64) for _ in range(2))
    assert rounding_noise(first, second, lengths) == pytest.approx(spread / 20_000**0.5, rel=0.1)


def test_rounding_noise_is_zero_for_equal_results_and_absent_without_a_second() -> None:
    values = torch.rand(6, dtype=torch.float64)
    assert rounding_noise(values, values, [2, 4]) == 0
    assert rounding_noise(values, None, [2, 4]) is None
