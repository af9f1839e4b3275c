"""The comparison with the source: which stored numbers it takes for right, and what it says of the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nvquant.checkpoint.source import open_checkpoint
from nvquant.format import native
from nvquant.format.blocks import dequantize_blocks
from nvquant.verify import tally as tallies
from nvquant.verify.structure import verify_structure
from nvquant.verify.subject import open_subject
from nvquant.verify.tally import Rule, Strip, Tally, tally_matrix
from support.conversions import MODELOPT, TinyModels, converted
from verify.breaking import LAYER
from verify.checkpoints import Copy
from verify.faults_numbers import one_code_off_by_one

LAYOUTS = ("compressed-tensors", MODELOPT)


def judged(source: list[float], codes: list[float], step: float = 0.5) -> Tally:
    """The tally of one block that begins with these values and goes on with zeros."""
    columns = [torch.tensor(values + [0.0] * (16 - len(values))).view(16, 1) for values in (source, codes)]
    strip = Strip(0, 1, *columns, torch.zeros(1, dtype=torch.uint8))
    tally = Tally()
    tallies._tally_codes(tally, strip, torch.tensor([step]))
    return tally


@pytest.mark.parametrize("code", [2.0, 3.0])
def test_halfway_between_two_codes_either_is_right(code: float) -> None:
    assert judged([1.25], [code]).wrong_codes == 0


@pytest.mark.parametrize("code", [2.0, 3.0])
def test_an_ulp_beside_the_border_either_is_right(code: float) -> None:
    assert judged([1.25 * (1 + 2**-23), -1.25 * (1 - 2**-23)], [code, -code]).wrong_codes == 0


def test_a_little_beside_the_border_only_the_nearest_is_right() -> None:
    assert judged([1.25 * 1.001], [3.0]).wrong_codes == 0
    tally = judged([0.0, 1.25 * 1.001], [0.0, 2.0])
    assert tally.wrong_codes == 1
    assert tally.first_code == "first at row 0, column 1: 1.25125 is stored as 1"


def test_beyond_the_largest_code_only_that_is_right() -> None:
    assert judged([40.0, -40.0], [6.0, -6.0]).wrong_codes == 0
    assert judged([40.0, -40.0], [4.0, 6.0]).wrong_codes == 2


def test_minus_zero_is_zero() -> None:
    assert judged([-0.01, 0.01], [0.0, -0.0]).wrong_codes == 0


@pytest.mark.parametrize("step", [float("nan"), float("inf"), 0.0])
def test_a_step_that_is_no_number_is_wrong(step: float) -> None:
    assert judged([1.0], [2.0], step).wrong_codes >= 1


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several reads of a matrix, and several strips of a read, the last of them smaller."""
    monkeypatch.setattr(tallies, "READ_ELEMENTS", 1700)
    monkeypatch.setattr(tallies, "STRIP_ELEMENTS", 500)


@pytest.mark.usefixtures("small_strips")
@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("name", ["llama-ct", "gemma4-mo"])
def test_errors_are_those_of_the_decoded_matrix(
    name: str, is_compiled: bool, copy: Callable[[str], Copy], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_compiled:
        monkeypatch.setattr(native, "TARGETS", 0)
    made = copy(name)
    subject, source = open_subject(made.folder), open_checkpoint(made.source)
    for module, matrix in subject.sound.items():
        tally = tally_matrix(subject, source, matrix, None)
        weight = source.read(f"{module}.weight").double()
        packed, scales = (subject.checkpoint.read(matrix.parts[part].name) for part in ("codes", "scales"))
        decoded = dequantize_blocks(packed, scales, subject.divisor(module)).double()
        assert tally.relative_rmse == pytest.approx(float((decoded - weight).norm() / weight.norm()), rel=1e-5)
        assert tally.gain == pytest.approx(float((decoded * weight).sum() / weight.square().sum()), rel=1e-5)
        assert tally.amax == float(weight.abs().max())
        assert tally.blocks == weight.numel() // 16


@pytest.mark.skipif(native.TARGETS == 0, reason="nvquant was installed without a C compiler")
@pytest.mark.parametrize("quantizer", ["rtn", "mse"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_a_good_checkpoint_the_compiled_kernel_settles_every_matrix(
    layout: str, quantizer: str, tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the modelopt layout, whose stored multiplier is not the quantizer's divisor to the last bit."""
    folder = converted(tiny("gemma4"), tmp_path / "out", "nvfp4-full", layout, quantizer)
    monkeypatch.delattr(tallies, "strips_of")
    check = verify_structure(folder, tiny("gemma4")).checks[-1]
    assert check.passed and f"exact for {quantizer}" in check.detail


def test_a_divisor_that_is_not_the_rules_is_left_to_pytorch(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-ct")
    subject, source = open_subject(made.folder), open_checkpoint(made.source)
    module, matrix = next(iter(subject.sound.items()))
    divisor = subject.divisor(module)
    assert tally_matrix(subject, source, matrix, Rule(divisor, range(1))).wrong_codes == 0
    off = tally_matrix(subject, source, matrix, Rule(divisor * 1.5, range(1)))
    assert off.wrong_codes == 0 and off.wrong_scales > 0 and "where rounding gives" in off.first_scale


@pytest.mark.parametrize("unit", ["READ_ELEMENTS", "STRIP_ELEMENTS"])
def test_a_fault_in_a_later_strip_is_told_where_it_is(
    unit: str, copy: Callable[[str], Copy], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = copy("llama-ct")
    words = one_code_off_by_one(made.folder)
    monkeypatch.setattr(tallies, unit, 1)  # a row each
    check = verify_structure(made.folder, made.source).checks[-1]
    assert words in check.detail
    assert f"{LAYER}.mlp.down_proj" in check.detail
