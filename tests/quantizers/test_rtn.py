"""Round to nearest, and how quantizers are named."""

from __future__ import annotations

import pytest
import torch
from nvquant.errors import InputError
from nvquant.format.blocks import quantize_blocks, weight_amax
from nvquant.format.scales import global_scale
from nvquant.quantizers import QUANTIZERS, get_quantizer


def test_quantizers_are_found_by_name_and_say_what_they_need() -> None:
    assert list(QUANTIZERS) == ["rtn", "mse"]
    found = {name: (q.name, q.headroom, q.uses_mean_square) for name, q in QUANTIZERS.items()}
    assert found == {"rtn": ("rtn", 1.0, False), "mse": ("mse", 2.0, True)}
    assert get_quantizer("mse") is QUANTIZERS["mse"]


def test_an_unknown_quantizer_is_refused_with_the_ones_that_exist() -> None:
    with pytest.raises(InputError, match=r"^quantizer 'gptq' does not exist: choose rtn or mse\.$") as caught:
        get_quantizer("gptq")
    assert caught.value.exit_code == 2


def test_rtn_is_the_reference_and_does_not_look_at_importance() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    scale = global_scale(weight_amax(weight))
    wanted = quantize_blocks(weight, scale)
    for mean_square in (None, torch.rand(64, dtype=torch.float64)):
        found = get_quantizer("rtn").quantize(weight, scale, mean_square)
        assert torch.equal(found.packed, wanted.packed)
        assert torch.equal(found.scales.view(torch.uint8), wanted.scales.view(torch.uint8))
