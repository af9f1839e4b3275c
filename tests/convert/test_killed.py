"""Conversions killed at every write boundary and at random moments, then run again: the same bytes, nothing left."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from nvquant.stream.manifest import MANIFEST_NAME
from support.conversions import contents, random_samples, write_ids
from support.killing import Outcome, Run, Warm
from support.tiny_models import tiny_gemma4, tiny_llama

RANDOM_RUNS = 24
REPLACING = 30  # more boundaries than a run has left when it begins to replace an output


def two_layer_gemma4(folder: Path) -> Path:
    return tiny_gemma4(
        folder,
        shards=1,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=True,
    )


@dataclass(frozen=True)
class Case:
    """A conversion that is to be killed; `write` makes its source."""

    write: Callable[[Path], Path]
    recipe: str
    is_calibrated: bool
    quantizer: str = "rtn"


CASES = {
    "llama-a16": Case(lambda folder: tiny_llama(folder, num_layers=2), "nvfp4-a16", False),
    "llama-full": Case(lambda folder: tiny_llama(folder, num_layers=2), "nvfp4-full", True),
    "gemma4-full": Case(two_layer_gemma4, "nvfp4-full", True),
    "llama-gptq": Case(lambda folder: tiny_llama(folder, num_layers=2), "nvfp4-a16", True, "gptq"),
}


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm() as warm:
        yield warm


class Target:
    """A conversion in a folder of its own, and what it gives when nobody disturbs it."""

    def __init__(self, warm: Warm, case: Case, folder: Path) -> None:
        self._warm = warm
        source = case.write(folder / "source")
        ids = str(write_ids(folder / "ids.jsonl", random_samples((7, 16)))) if case.is_calibrated else None
        self._place = folder / "runs"
        self.output = self._place / "out"
        self.run = Run(str(source), case.recipe, str(self.output), ids, case.quantizer)
        self.undisturbed = self.finish()
        self.expected = contents(self.output)
        self.clear()

    def clear(self) -> None:
        shutil.rmtree(self._place)

    def killed(self, **how: object) -> Outcome:
        """Run and kill; whatever stands under the output's name is whole."""
        outcome = self._warm(replace(self.run, **how))  # type: ignore[arg-type]
        assert outcome.killed or outcome.code == 0, f"{how}: {outcome.words}"
        if self.output.exists():
            assert contents(self.output) == self.expected, how
        return outcome

    def finish(self, said: object = None) -> Outcome:
        """Run to the end."""
        outcome = self._warm(self.run)
        assert outcome.code == 0, f"after {said}: {outcome.words}"
        return outcome

    def finish_and_check(self, said: object) -> None:
        """Run to the end; the output has the undisturbed run's bytes, and nothing else is left."""
        self.finish(said)
        assert contents(self.output) == self.expected, said
        assert [path.name for path in self._place.iterdir()] == ["out"], said
        self.clear()


REPEATED = [pytest.param(name, marks=pytest.mark.thorough) for name in ("llama-a16", "gemma4-full", "llama-gptq")]


@pytest.fixture(scope="module", params=["llama-full", *REPEATED])
def target(request: pytest.FixtureRequest, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target(warm, CASES[request.param], tmp_path_factory.mktemp(request.param))


def test_a_run_killed_at_any_write_boundary_is_continued_to_the_same_bytes(target: Target) -> None:
    assert target.undisturbed.boundaries > 100
    for boundary in range(1, target.undisturbed.boundaries + 1):
        assert target.killed(kill_at=boundary).killed
        target.finish_and_check(f"boundary {boundary}")


def test_a_run_killed_again_and_again_at_random_boundaries_gets_to_the_same_bytes(target: Target) -> None:
    chance = random.Random(1)
    kills = 0
    for _ in range(RANDOM_RUNS // 3):
        said = []
        for _ in range(chance.randrange(2, 5)):
            said.append(chance.randrange(1, target.undisturbed.boundaries // 2))
            kills += target.killed(kill_at=said[-1]).killed
        target.finish_and_check(said)
    assert kills >= RANDOM_RUNS // 3


def test_a_run_killed_at_random_moments_gets_to_the_same_bytes(target: Target) -> None:
    chance = random.Random(2)
    kills = 0
    for _ in range(RANDOM_RUNS):
        said = [chance.random() * target.undisturbed.seconds for _ in range(chance.randrange(1, 3))]
        kills += sum(target.killed(kill_after=seconds).killed for seconds in said)
        target.finish_and_check(said)
    assert kills  # how many depends on how busy the machine is


# Up to the replacement, the boundaries are those of a run that replaces nothing. The tests above kill that at each one.
@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_run_that_replaces_an_output_is_killed_and_the_old_or_the_new_one_is_whole(
    warm: Warm, tmp_path: Path, every: int
) -> None:
    target = Target(warm, CASES["llama-a16"], tmp_path)
    new = target.run
    old = replace(new, quantizer="mse")
    assert warm(old).code == 0
    old_contents = contents(target.output)
    place, replaced = target.output.parent, target.output.with_name(".out.nvquant-replaced")
    shutil.copytree(target.output, tmp_path / "old")
    undisturbed = warm(replace(new, restart=True))
    assert undisturbed.code == 0, undisturbed.words
    in_between, last = 0, undisturbed.boundaries
    for boundary in sorted({*range(1, last + 1, every), *range(last - REPLACING, last + 1)}):
        target.clear()
        shutil.copytree(tmp_path / "old", target.output)
        killed = warm(replace(new, restart=True, kill_at=boundary))
        assert killed.killed, killed.words
        if target.output.exists():
            may_be_new = [target.expected] * (boundary > last - REPLACING)
            assert contents(target.output) in (old_contents, *may_be_new), boundary
        else:  # the moment between two renames
            in_between += 1
            assert contents(replaced) == old_contents
            assert contents(target.output.with_name("out.partial")) == target.expected
        again = warm(replace(new, restart=True))
        assert again.code == 0, f"boundary {boundary}: {again.words}"
        assert contents(target.output) == target.expected, boundary
        assert [path.name for path in place.iterdir()] == ["out"], boundary
    assert in_between == 1


def test_a_run_killed_between_two_renames_is_finished_by_any_next_one(warm: Warm, tmp_path: Path) -> None:
    target = Target(warm, CASES["llama-a16"], tmp_path)
    assert warm(replace(target.run, quantizer="mse")).code == 0
    shutil.copytree(target.output, tmp_path / "old")
    for boundary in range(warm(replace(target.run, restart=True)).boundaries, 0, -1):
        target.clear()
        shutil.copytree(tmp_path / "old", target.output)
        assert warm(replace(target.run, restart=True, kill_at=boundary)).killed
        if not target.output.exists():
            break
    assert (target.output.with_name("out.partial") / MANIFEST_NAME).exists()
    target.finish_and_check(f"boundary {boundary}")
