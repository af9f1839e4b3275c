"""Every way of reading a reordered checkpoint gives the tensors in the new order, whatever the piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nvquant.checkpoint.reordered import Reordered, reordered
from nvquant.checkpoint.source import Checkpoint, open_checkpoint, tensor_bytes
from support.tiny_models import tiny_llama

COLUMNS, ROWS, VECTOR = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.input_layernorm.weight",
)
ORDER = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(tiny_llama(tmp_path / "source"))


@pytest.fixture
def changed(source: Checkpoint) -> Reordered:
    return reordered(source, ORDER, {COLUMNS: 1, ROWS: 0, VECTOR: 0})


def expected(source: Checkpoint, name: str) -> torch.Tensor:
    tensor = source.read(name)
    return {COLUMNS: lambda: tensor[:, ORDER], ROWS: lambda: tensor[ORDER], VECTOR: lambda: tensor[ORDER]}.get(
        name, lambda: tensor
    )()


@pytest.mark.parametrize("name", [COLUMNS, ROWS, VECTOR, "model.embed_tokens.weight"])
def test_whole_tensors_pieces_and_rows_have_the_new_order(source: Checkpoint, changed: Reordered, name: str) -> None:
    wanted = expected(source, name)
    assert torch.equal(changed.read(name), wanted)
    assert b"".join(bytes(piece) for piece in changed.pieces(name)) == bytes(tensor_bytes(wanted))
    rows = [3, 0, 7, 7, 8]
    assert torch.equal(changed.read_rows(name, rows), wanted[rows])


@pytest.mark.parametrize("name", [COLUMNS, ROWS, VECTOR])
@pytest.mark.parametrize(("begin", "size"), [(0, 1), (1, 5), (3, 130), (100, 27), (0, 0), (127, 1)])
def test_any_range_of_bytes_is_that_of_the_new_tensor(
    source: Checkpoint, changed: Reordered, name: str, begin: int, size: int
) -> None:
    wanted = bytes(tensor_bytes(expected(source, name)))
    buffer = bytearray(size)
    if begin + size <= len(wanted):
        changed.read_into(name, memoryview(buffer), begin)
        assert bytes(buffer) == wanted[begin : begin + size]
    with pytest.raises(IndexError):
        changed.read_into(name, memoryview(bytearray(1)), len(wanted))


@pytest.mark.parametrize("order", [[0] * 64, list(range(63)), list(range(1, 65))])
def test_an_order_that_is_no_permutation_is_refused(source: Checkpoint, order: list[int]) -> None:
    with pytest.raises(ValueError, match=r"permutation|6[34] elements"):
        reordered(source, order, {VECTOR: 0})


@pytest.mark.parametrize("axes", [{VECTOR: 1}, {ROWS: 1}, {COLUMNS: 2}, {COLUMNS: -1}])
def test_an_axis_of_another_length_is_refused(source: Checkpoint, axes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="elements along axis"):
        reordered(source, ORDER, axes)


def test_a_tensor_that_does_not_exist_is_refused(source: Checkpoint) -> None:
    with pytest.raises(KeyError):
        reordered(source, ORDER, {"no.weight": 0})
