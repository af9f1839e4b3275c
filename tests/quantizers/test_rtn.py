"""Round to nearest, and the names and declarations of quantizers."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from nvquant.calibrate.statistics.ranges import InputStatistics
from nvquant.errors import InputError
from nvquant.format.blocks import quantize_blocks, weight_amax
from nvquant.format.scales import global_scale
from nvquant.format.schemes import NVFP4, SCHEMES
from nvquant.quantizers import QUANTIZERS, get_quantizer, quantizer_for
from nvquant.quantizers.base import GroupInputs
from nvquant.recipe.matrices import Matrix
from nvquant.recipe.schema import ON_QUANTIZED_PATH, QuantizerName


def test_quantizers_declare_what_they_need_and_what_verify_may_recompute() -> None:
    assert list(QUANTIZERS) == ["rtn", "mse", "gptq"]
    found = {name: (q.name, q.claim.headroom, set(q.needs), q.lane, q.by_site) for name, q in QUANTIZERS.items()}
    assert found == {
        "rtn": ("rtn", 1.0, set(), "source", False),
        "mse": ("mse", 2.0, {"mean_square"}, "source", False),
        "gptq": ("gptq", 2.0, {"mean_square", "moments"}, "quantized", True),
    }
    assert {name: (q.claim.codes, q.claim.scale_offsets) for name, q in QUANTIZERS.items()} == {
        "rtn": ("nearest", range(1)),
        "mse": ("nearest", range(-2, 8)),
        "gptq": ("any", None),
    }
    assert get_quantizer("mse") is QUANTIZERS["mse"]


def test_recipes_know_the_same_quantizers_and_which_of_them_see_the_quantized_path() -> None:
    assert list(get_args(QuantizerName)) == list(QUANTIZERS)
    assert {name for name, quantizer in QUANTIZERS.items() if quantizer.lane == "quantized"} == ON_QUANTIZED_PATH
    assert {name for name, quantizer in QUANTIZERS.items() if "moments" in quantizer.needs} == ON_QUANTIZED_PATH


def test_rows_alone_have_a_claim_that_verify_can_recompute_under_the_same_headroom() -> None:
    for quantizer in QUANTIZERS.values():
        assert quantizer.rows_claim.codes == "nearest" and quantizer.rows_claim.scale_offsets is not None
        assert quantizer.rows_claim.headroom == quantizer.claim.headroom


def test_every_scheme_has_a_quantizer_whatever_the_recipe_chooses() -> None:
    for chosen in QUANTIZERS.values():
        assert {name: quantizer_for(name, chosen).name for name in SCHEMES} == {
            "nvfp4": chosen.name,
            "nvfp4-a16": chosen.name,
            "fp8": "nearest",
        }


def test_an_unknown_quantizer_is_refused_with_the_ones_that_exist() -> None:
    with pytest.raises(InputError, match=r"^quantizer 'best' does not exist: choose rtn, mse or gptq\.$") as caught:
        get_quantizer("best")
    assert caught.value.exit_code == 2


def test_rtn_is_the_reference_and_does_not_look_at_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(32, 64, generator=generator), 3 * torch.randn(16, 64, generator=generator)]
    group = [Matrix(name, name, NVFP4, len(w), 64, "g", "g", "g") for name, w in zip("ab", weights, strict=True)]
    amax = max(weight_amax(weight) for weight in weights)
    for inputs in (None, GroupInputs(InputStatistics(1.0, 0.5, torch.rand(64, dtype=torch.float64), 4))):
        found = get_quantizer("rtn").quantize(group, weights, inputs)
        assert found.amax == float(amax)
        for matrix, weight in zip(group, weights, strict=True):
            wanted, parts = quantize_blocks(weight, global_scale(amax)), found.parts[matrix.name]
            assert torch.equal(parts["codes"], wanted.packed)
            assert torch.equal(parts["scales"].view(torch.uint8), wanted.scales.view(torch.uint8))
