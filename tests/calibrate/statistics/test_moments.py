"""Second moments of inputs."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from nvquant.calibrate.statistics.moments import FRACTION_BITS, SecondMoments, add_products
from nvquant.errors import CheckFailed
from torch import Tensor

COLS = 48


def sequences(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Inputs of a source and of a quantized path, [1, 20, cols] each. Their columns differ much in size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(1.5 * torch.randn(COLS, generator=generator))
    made = []
    for _ in range(count):
        source = torch.randn(1, 20, COLS, generator=generator) * sizes
        made.append((source, source + 0.1 * sizes * torch.randn(1, 20, COLS, generator=generator)))
    return made


def mean_square(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([source for source, _ in pairs]).double().square().mean((0, 1))


def halved(inputs: Tensor) -> Tensor:
    return inputs.float() / 2


def observed(pairs: list[tuple[Tensor, Tensor]], sizes: Tensor, weight: Tensor | None = None) -> SecondMoments:
    moments = SecondMoments(sizes, halved, weight)
    for source, quantized in pairs:
        moments.observe({"source": source, "quantized": quantized})
        moments.commit()
    return moments


@pytest.mark.parametrize("is_through", [False, True])
def test_they_are_the_means_of_the_products(is_through: bool) -> None:
    pairs = sequences(7)
    weight = torch.randn(12, COLS, generator=torch.Generator().manual_seed(9)) if is_through else None
    found = observed(pairs, mean_square(pairs), weight).result("a group")
    source = torch.cat([source for source, _ in pairs]).flatten(0, 1).double()
    quantized = torch.cat([quantized for _, quantized in pairs]).flatten(0, 1).double()
    rounded = quantized / 2
    moved = source - quantized if weight is None else (source - quantized) @ weight.double().t()
    sizes, rows = rounded.square().mean(0).sqrt(), moved.square().mean(0).sqrt()
    gram, cross = rounded.t() @ rounded / len(source), moved.t() @ rounded / len(source)
    assert found.cross is not None
    assert ((found.gram - gram) / (sizes * sizes.unsqueeze(1))).abs().max() < 1e-6
    assert ((found.cross - cross) / (sizes * rows.unsqueeze(1))).abs().max() < 1e-6
    assert torch.equal(found.gram, found.gram.t())
    assert found.is_through_weight is is_through


def test_they_depend_neither_on_order_nor_on_batches_nor_on_ranks() -> None:
    pairs = sequences(6)
    sizes = mean_square(pairs)
    whole = observed(pairs, sizes).result("a group")
    turned = observed(pairs[::-1], sizes).result("a group")
    joined = (torch.cat([pair[0] for pair in pairs[:4]]), torch.cat([pair[1] for pair in pairs[:4]]))
    batched = observed([joined, *pairs[4:]], sizes).result("a group")
    states = [observed(part, sizes).state() for part in (pairs[:1], [], pairs[1:])]
    ranks = SecondMoments.merged(states).result("a group")
    for other in (turned, batched, ranks):
        assert torch.equal(whole.gram, other.gram)
        assert whole.cross is not None and other.cross is not None
        assert torch.equal(whole.cross, other.cross)


def test_a_discarded_batch_does_not_count() -> None:
    pairs = sequences(3)
    sizes = mean_square(pairs)
    moments = observed(pairs[:2], sizes)
    moments.observe({"source": pairs[2][0], "quantized": pairs[2][1]})
    moments.discard()
    assert torch.equal(moments.result("a group").gram, observed(pairs[:2], sizes).result("a group").gram)


def test_without_the_source_there_is_no_cross() -> None:
    pairs = sequences(2)
    moments = SecondMoments(mean_square(pairs), halved, wants_cross=False)
    assert moments.lanes == ("quantized",)
    for _, quantized in pairs:
        moments.observe({"quantized": quantized})
    moments.commit()
    found = moments.result("a group")
    assert found.cross is None
    assert torch.equal(found.gram, observed(pairs, mean_square(pairs)).result("a group").gram)


def test_what_was_never_reached_or_grows_without_limit_is_named() -> None:
    pairs = sequences(1)
    with pytest.raises(CheckFailed, match="never reached a group"):
        SecondMoments(mean_square(pairs), halved).result("a group")
    for far in (1e9, torch.nan, torch.inf):
        with pytest.raises(CheckFailed, match="a group grow without limit"):
            observed([(source, quantized * far) for source, quantized in pairs], mean_square(pairs)).result("a group")
    with pytest.raises(CheckFailed, match="never reached a group"):
        SecondMoments.merged([observed([], mean_square(pairs)).state()] * 2).result("a group")


def in_python(products: Tensor) -> list[int]:
    """Each product in fixed point, to nearest and to even, by Python's exact arithmetic."""
    return [round(Fraction(float(product)) * (1 << FRACTION_BITS)) for product in products.flatten()]


def products_of_every_size() -> Tensor:
    """Products that end in a half of the last bit, that are whole, and that are larger than float32's fraction."""
    generator = torch.Generator().manual_seed(7)
    halves = (torch.arange(-6.0, 7.0) + 0.5) * 2.0**-FRACTION_BITS
    return torch.cat([halves, *(torch.randn(700, generator=generator) * 2.0**power for power in (-30, -12, 0, 12, 30))])


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
            ],
        ),
    ],
)
def test_products_are_added_exactly(device: str) -> None:
    products = products_of_every_size()
    before = torch.arange(len(products)) - 40
    sums, peak = before.to(device, copy=True), torch.ones((), device=device)
    add_products(products.to(device, copy=True), sums, peak)
    assert (sums.cpu() - before).tolist() == in_python(products)
    assert torch.equal(peak.cpu(), products.abs().amax())
    add_products(torch.full((3,), float("nan"), device=device), sums[:3], peak)
    assert bool(peak.isnan())
