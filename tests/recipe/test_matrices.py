"""A matrix as a view of the tensor that contains it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nvquant.format.layouts import LAYOUTS, MODELOPT
from nvquant.format.schemes import FP8, FP8_STATIC, NVFP4
from nvquant.recipe.matrices import Matrix, matrix_entries

STACK = "model.layers.0.experts.gate_up_proj"


def matrix(rows: int, cols: int, **more: object) -> Matrix:
    return replace(Matrix("m", STACK, NVFP4, rows, cols, "w", "i", "s"), **more)  # type: ignore[arg-type]


def test_a_linear_is_its_tensor() -> None:
    weight = torch.arange(48.0).reshape(3, 16)
    found = matrix(3, 16).of({STACK: weight})
    assert torch.equal(found, weight)
    assert found.data_ptr() == weight.data_ptr()


def test_an_expert_is_cut_from_a_stack() -> None:
    stack = torch.arange(4 * 6 * 16.0).reshape(4, 6, 16)
    for expert in range(4):
        gate, up = (matrix(3, 16, index=(expert,), first_row=first).of({STACK: stack}) for first in (0, 3))
        assert torch.equal(gate, stack[expert, :3])
        assert torch.equal(up, stack[expert, 3:])


def test_several_axes_come_first() -> None:
    stack = torch.arange(2 * 3 * 4 * 16.0).reshape(2, 3, 4, 16)
    assert torch.equal(matrix(4, 16, index=(1, 2)).of({STACK: stack}), stack[1, 2])


def test_a_transposed_tensor_is_turned_before_its_rows_are_counted() -> None:
    stack = torch.arange(2 * 16 * 6.0).reshape(2, 16, 6)
    found = matrix(3, 16, index=(1,), first_row=3, is_transposed=True).of({STACK: stack})
    assert found.shape == (3, 16)
    assert torch.equal(found, stack[1].T[3:])


@pytest.mark.parametrize(
    "more", [{}, {"first_row": 2}, {"index": (1,)}, {"index": (0,), "first_row": 4, "is_transposed": True}]
)
def test_it_is_a_view_and_not_a_copy(more: dict[str, object]) -> None:
    stack = torch.zeros((2, 16, 16) if "index" in more else (16, 16))
    matrix(4, 16, **more).of({STACK: stack}).fill_(1.0)
    assert int(stack.sum()) == 4 * 16


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(KeyError, match=STACK):
        matrix(4, 16).of({})


def test_its_stored_tensors_have_its_own_name_and_not_that_of_the_stack() -> None:
    entries = matrix_entries(matrix(32, 64, index=(1,)), MODELOPT)
    assert {part: (entry.name, entry.dtype, entry.shape) for part, entry in entries.items()} == {
        "codes": ("m.weight", "U8", (32, 32)),
        "scales": ("m.weight_scale", "F8_E4M3", (32, 4)),
        "weight_global": ("m.weight_scale_2", "F32", ()),
        "input_global": ("m.input_scale", "F32", ()),
    }


def test_the_stored_tensors_of_fp8_follow_the_layout() -> None:
    found = {
        name: {part: (entry.dtype, entry.shape) for part, entry in matrix_entries(one, LAYOUTS[name]).items()}
        for name, one in (
            ("compressed-tensors", matrix(32, 64, scheme=FP8)),
            ("modelopt", matrix(32, 64, scheme=FP8_STATIC)),
        )
    }
    assert found == {
        "compressed-tensors": {"codes": ("F8_E4M3", (32, 64)), "scales": ("F32", (32, 1))},
        "modelopt": {"codes": ("F8_E4M3", (32, 64)), "scales": ("F32", ()), "input_scale": ("F32", ())},
    }
