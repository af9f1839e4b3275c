"""The proved bound of the head's inputs costs no accuracy, although it is far above what calibration would observe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from nvquant.calibrate.output_head import head_input_bound
from nvquant.checkpoint.source import open_checkpoint
from nvquant.format.fp8 import round_under
from verify.numerics.measuring import held_out


@pytest.mark.slow
def test_the_bound_loses_no_more_than_twice_the_observed_amax(
    smollm2: Path, record_property: Callable[[str, object], None]
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        model(input_ids=held_out(smollm2, 1, 512)[0][None], use_cache=False)
        bound = head_input_bound(open_checkpoint(smollm2), "model.layers")
        assert bound is not None
        amax = float(seen[0].abs().max())
        exact = (seen[0] @ model.lm_head.weight.T).log_softmax(-1)

        def kl(largest: float) -> float:
            inputs = round_under(seen[0], torch.tensor(largest / 448))
            rounded = (inputs @ model.lm_head.weight.T).log_softmax(-1)
            return float((exact.exp() * (exact - rounded)).sum(-1).mean())

        found = {"bound": kl(bound), "twice the amax": kl(2 * amax)}
    record_property("bound / amax", bound / amax)  # 1.5
    record_property("kl", found)  # 0.0027 each
    assert bound > amax
    assert found["bound"] < 1.2 * found["twice the amax"]
