"""The limits for error feedback on sources that are hard for limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nvquant.checkpoint.source import open_checkpoint
from nvquant.verify.structure import verify_structure
from nvquant.verify.subject import open_subject
from nvquant.verify.tally_fed_back import tally_fed_back
from support.conversions import converted, edit_tensors
from support.tiny_models import tiny_llama
from torch import Tensor
from verify import breaking
from verify.breaking import LAYER
from verify.checkpoints import Copy


def is_inner(name: str, tensor: Tensor) -> bool:
    return ".layers." in name and tensor.ndim == 2


def blocks_of_zeros(name: str, tensor: Tensor) -> Tensor:
    """A pruned model: a third of the blocks is zero, and feedback cannot keep all of them so."""
    if not is_inner(name, tensor):
        return tensor
    kept = torch.rand(tensor.numel() // 16, generator=torch.Generator().manual_seed(len(name))) > 1 / 3
    return tensor * kept.repeat_interleave(16).view(tensor.shape)


def rows_of_zeros(name: str, tensor: Tensor) -> Tensor:
    if is_inner(name, tensor):
        tensor[::5] = 0
    return tensor


def rows_of_next_to_nothing(name: str, tensor: Tensor) -> Tensor:
    """Below the least block scale under the global scale of their group."""
    if is_inner(name, tensor):
        tensor[::5] *= 1e-9
    return tensor


def columns_of_unequal_size(name: str, tensor: Tensor) -> Tensor:
    return tensor * torch.logspace(-1.5, 1.5, tensor.shape[1]) if is_inner(name, tensor) else tensor


def keys_far_smaller_than_queries(name: str, tensor: Tensor) -> Tensor:
    return tensor / 500 if name.endswith("k_proj.weight") else tensor


@pytest.mark.parametrize(
    "edit",
    [blocks_of_zeros, rows_of_zeros, rows_of_next_to_nothing, columns_of_unequal_size, keys_far_smaller_than_queries],
)
def test_a_source_that_is_hard_to_round_passes(tmp_path: Path, edit: Callable[[str, Tensor], Tensor]) -> None:
    source = edit_tensors(tiny_llama(tmp_path / "source"), edit)
    report = verify_structure(converted(source, tmp_path / "out", quantizer="gptq"), source)
    assert [check.detail for check in report.checks if not check.passed] == []
    assert "21 by the limits for error feedback" in report.checks[-1].detail


def test_sums_are_those_of_the_decoded_matrix_and_a_row_that_is_not_finite_is_poor(
    copy: Callable[[str], Copy],
) -> None:
    made = copy("llama-gptq-ct")
    subject, source = open_subject(made.folder), open_checkpoint(made.source)
    for module, matrix in subject.sound.items():
        tally = tally_fed_back(subject, source, matrix)
        weight = source.read(f"{module}.weight").double()
        assert tally.amax == float(weight.abs().max())
        assert tally.energy == pytest.approx(float(weight.square().sum()), rel=1e-5)
        assert 0.08 < tally.relative_rmse < 0.2
        assert (tally.blocks, tally.poor_rows) == (weight.numel() // 16, 0)
    with breaking.edit_tensors(made.folder) as tensors:
        stored = tensors[f"{LAYER}.mlp.down_proj.weight_scale"]
        stored.data[2 * stored.shape[1] + 1] = 0x7F  # a NaN in row 2
    subject = open_subject(made.folder)
    tally = tally_fed_back(subject, source, subject.sound[f"{LAYER}.mlp.down_proj"])
    assert (tally.poor_rows, tally.first_row, tally.poor_blocks) == (1, 2, 1)
