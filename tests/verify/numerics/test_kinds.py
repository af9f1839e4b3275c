"""The loss by kind of text, and the guard that names a kind that lost clearly more than the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nvquant.verify.numerics.document import Predictions, known
from nvquant.verify.numerics.kinds import beside, kind_warnings, losses_by_kind, over_floor, warning_words
from nvquant.verify.numerics.tokens import TokenScores
from verify.breaking import edit_tensors
from verify.checkpoints import Copy
from verify.numerics.measuring import Measured, measured

KINDS = ("code", "prose", "language")
EACH, TOKENS = 4, 50


def scores(*means: float, spread: float = 0.1, seed: int = 0) -> TokenScores:
    """Four sequences of each kind, whose KL has a mean of the kind and a relative spread between sequences."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        mean
        * (1 + spread * torch.randn(1, generator=generator)).clamp(min=0.1)
        * torch.rand(TOKENS, generator=generator)
        for mean in means
        for _ in range(EACH)
    ]
    kl = torch.cat(rows).double()
    return TokenScores(kl, kl, kl < kl.median(), [TOKENS] * len(rows))


def kinds_of_sequences(kinds: Sequence[str] = KINDS) -> list[str]:
    return [kind for kind in kinds for _ in range(EACH)]


def warned(lane: TokenScores, floor: TokenScores, kinds: Sequence[str] = KINDS) -> list[str | None]:
    predictions = Predictions(kinds=losses_by_kind(lane, floor, kinds_of_sequences(kinds)))
    return [warning.kind for warning in kind_warnings({"w4a4": predictions})]


def test_each_kind_has_the_numbers_of_its_own_sequences() -> None:
    lane, floor = scores(0.3, 0.2, 0.4), scores(2e-4, 2e-4, 3e-4, seed=1)
    losses = losses_by_kind(lane, floor, kinds_of_sequences())
    assert list(losses) == list(KINDS)
    for at, loss in enumerate(losses.values()):
        own = slice(at * EACH * TOKENS, (at + 1) * EACH * TOKENS)
        assert (loss.sequences, loss.tokens) == (EACH, EACH * TOKENS)
        assert loss.kl.mean == pytest.approx(float(lane.kl[own].mean()))
        assert loss.top1.agreement == pytest.approx(float(lane.agrees[own].double().mean()))
    whole = sum(known(loss.kl.mean) * known(loss.tokens) for loss in losses.values()) / len(lane.kl)
    assert whole == pytest.approx(float(lane.kl.mean()))


def test_kinds_may_stand_in_any_order() -> None:
    lane, floor = scores(0.3, 0.2, 0.4), scores(2e-4, 2e-4, 3e-4, seed=1)
    order = torch.randperm(3 * EACH, generator=torch.Generator().manual_seed(2)).tolist()
    mixed = losses_by_kind(lane.of(order), floor.of(order), [kinds_of_sequences()[at] for at in order])
    for kind, loss in losses_by_kind(lane, floor, kinds_of_sequences()).items():
        assert known(mixed[kind].kl.mean) == pytest.approx(known(loss.kl.mean))
        assert known(mixed[kind].relative) == pytest.approx(known(loss.relative))


def test_a_kind_that_lost_twice_as_much_as_in_noise_is_named() -> None:
    floor = scores(2e-4, 2e-4, 2e-4, seed=1)
    assert warned(scores(0.2, 0.2, 0.4), floor) == ["language"]
    assert warned(scores(0.4, 0.2, 0.2), floor) == ["code"]


def test_a_kind_that_any_noise_moves_more_is_not_named() -> None:
    """Other languages lose about 1.8 times as much as English on SmolLM2, in BF16 and in NVFP4."""
    assert warned(scores(0.2, 0.2, 0.4), scores(2e-4, 2e-4, 4e-4, seed=1)) == []
    assert warned(scores(0.2, 0.2, 0.2), scores(2e-4, 2e-4, 1e-4, seed=1)) == ["language"]


def test_a_difference_within_the_noise_or_below_the_limit_is_not_named() -> None:
    floor = scores(2e-4, 2e-4, 2e-4, seed=1, spread=0)
    assert warned(scores(0.2, 0.2, 0.27, spread=0), floor) == []
    noisy = losses_by_kind(scores(0.2, 0.2, 0.4, spread=0.8, seed=5), floor, kinds_of_sequences())["language"]
    assert known(noisy.relative) > 1.5 and known(noisy.relative) - 1 < 3 * known(noisy.relative_error)
    assert warned(scores(0.2, 0.2, 0.4, spread=0.8, seed=5), floor) == []


def test_the_error_is_of_pairs_so_that_hard_sequences_do_not_widen_it() -> None:
    floor = scores(2e-4, spread=0.5, seed=3)
    ratio, error = over_floor(replace(floor, kl=floor.kl * 1000), floor) or (0.0, 1.0)
    assert ratio == pytest.approx(1000) and error == pytest.approx(0, abs=1e-6)


def test_the_error_of_a_ratio_is_what_repeated_draws_show() -> None:
    found = [over_floor(scores(0.3, seed=seed), scores(1e-3, seed=1000 + seed)) or (0.0, 0.0) for seed in range(400)]
    ratios = torch.tensor(found).double()
    assert float(ratios[:, 1].square().mean().sqrt()) == pytest.approx(float(ratios[:, 0].std()), rel=0.15)


def test_without_a_second_kind_or_sequence_nothing_is_compared() -> None:
    lane, floor = scores(0.3, 0.2), scores(2e-4, 2e-4, seed=1)
    (one,) = losses_by_kind(lane, floor, ["text"] * 2 * EACH).values()
    assert one.relative is None and one.relative_error is None
    assert losses_by_kind(lane, floor, []) == {}
    lone = losses_by_kind(lane.of([0, 4, 5]), floor.of([0, 4, 5]), ["a", "b", "b"])
    assert lone["a"].relative is None and lone["a"].kl.standard_error is None
    assert over_floor(lane, replace(floor, kl=floor.kl * 0)) is None
    assert beside((1.0, 0.1), [(0.0, 0.0)]) is None


SOUND, LOST = ("low", "high", "middle"), "high"


@pytest.fixture(scope="module")
def samples() -> list[torch.Tensor]:
    """Token ids of three ranges, which no other kind has."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(40 + 60 * at, 100 + 60 * at, (40,), generator=generator) for at in range(3) for _ in range(4)]


def measure(checkpoint: Path, source: Path, samples: list[torch.Tensor]) -> Measured:
    return measured(checkpoint, source, samples, kinds=[kind for kind in SOUND for _ in range(4)])


def test_a_checkpoint_that_lost_one_kind_is_named_and_passes(
    copy: Callable[[str], Copy], models: dict[str, Path], samples: list[torch.Tensor], good: Callable[[str], Path]
) -> None:
    sound = measure(good("llama-ct"), models["llama"], samples)
    assert sound.document["kind_warnings"] == []
    assert set(sound.document["arithmetics"]["w4a4"]["kinds"]) == set(SOUND)

    broken = copy("llama-ct").folder
    with edit_tensors(broken) as tensors:
        embedding = tensors["model.embed_tokens.weight"]
        row = 2 * embedding.shape[1]  # of BF16
        embedding.data[100 * row : 160 * row] = embedding.data[160 * row : 220 * row]
    found = measure(broken, models["llama"], samples)
    assert {(one["arithmetic"], one["kind"]) for one in found.document["kind_warnings"]} == {
        ("w4a4", LOST),
        ("weight_only", LOST),
    }
    notes = found.findings["kl"].notes
    assert [note.partition(":")[0] for note in notes] == [
        "W4A4 by kind, KL (top-1)",
        "weight-only by kind, KL (top-1)",
        "warning",
        "warning",
    ]
    assert f"Text of the kind {LOST} lost " in notes[2]


def test_a_text_without_kinds_has_no_notes(
    models: dict[str, Path], samples: list[torch.Tensor], good: Callable[[str], Path]
) -> None:
    found = measured(good("llama-ct"), models["llama"], samples)
    assert found.findings["kl"].notes == [] and found.document["arithmetics"]["w4a4"]["kinds"] == {}


def test_a_warning_is_a_sentence_with_a_way_out() -> None:
    floor = scores(2e-4, 2e-4, 2e-4, seed=1)
    predictions = Predictions(kinds=losses_by_kind(scores(0.2, 0.2, 0.4), floor, kinds_of_sequences()))
    (warning,) = kind_warnings({"w4a4": predictions})
    words = warning_words(warning, "W4A4")
    assert words.startswith("Text of the kind language lost ") and words.endswith(
        "Calibrate on more text of this kind."
    )
    assert f"KL {known(warning.kl):.4f} nats" in words
