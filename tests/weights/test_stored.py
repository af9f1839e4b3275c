"""The one reader of stored matrices: which tensors belong together, in which scheme, and what is wrong with them."""

from __future__ import annotations

import pytest
from nvquant.checkpoint.headers import TensorInfo
from nvquant.format.layouts import COMPRESSED_TENSORS, LAYOUTS, MODELOPT, Layout
from nvquant.format.schemes import FP8, FP8_STATIC, NVFP4, NVFP4_A16, Scheme
from nvquant.weights.stored import (
    StoredMatrix,
    find_matrices,
    input_leaf,
    is_complete,
    layouts_present,
    part_leaves,
    split_name,
)

MODULE = "model.layers.0.mlp.up_proj"
ROWS, COLS = 48, 64
PAIRS = [(layout, form) for layout in LAYOUTS.values() for form in layout.schemes.values()]
Specs = dict[str, tuple[str, tuple[int, ...]]]  # last part of the name to dtype and shape


def tensors(layout: Layout, scheme: Scheme) -> Specs:
    """The tensors of a good matrix."""
    return {suffix: (spec.dtype, spec.shape) for suffix, spec in layout.specs(scheme, ROWS, COLS).values()}


def infos(specs: Specs, module: str = MODULE) -> dict[str, TensorInfo]:
    names = {f"{module}.{leaf}": spec for leaf, spec in specs.items()}
    return {name: TensorInfo(name, dtype, shape, 0, 0) for name, (dtype, shape) in names.items()}


def found(layout: Layout, specs: Specs) -> StoredMatrix:
    (matrix,) = find_matrices(infos(specs), layout).values()
    return matrix


@pytest.mark.parametrize(("layout", "scheme"), PAIRS, ids=lambda one: one.name)
def test_a_good_matrix_is_found_with_its_scheme_and_shape(layout: Layout, scheme: Scheme) -> None:
    matrix = found(layout, tensors(layout, scheme))
    assert (matrix.module, matrix.tensor, matrix.scheme) == (MODULE, f"{MODULE}.weight", scheme)
    assert matrix.is_sound
    assert matrix.faults == ()
    assert (matrix.rows, matrix.cols) == (ROWS, COLS)
    assert set(matrix.parts) == set(scheme.parts(ROWS, COLS))
    assert matrix.has_input_scale == (scheme.inputs == "calibrated")
    assert is_complete(matrix, layout)


@pytest.mark.parametrize(("layout", "scheme"), PAIRS, ids=lambda one: one.name)
def test_every_missing_tensor_is_named(layout: Layout, scheme: Scheme) -> None:
    for part, leaf in layout.suffixes(scheme).items():
        specs = tensors(layout, scheme)
        if specs.pop(leaf, None) is None or part == "input_global":  # without it a matrix is weight-only
            continue
        matrix = found(layout, specs)
        assert matrix.scheme.bits == scheme.bits
        assert f"{MODULE} lacks {leaf}" in matrix.faults
        assert not is_complete(matrix, layout)


@pytest.mark.parametrize(("layout", "scheme"), PAIRS, ids=lambda one: one.name)
def test_a_wrong_dtype_of_any_tensor_is_a_fault_and_changes_no_scheme(layout: Layout, scheme: Scheme) -> None:
    for suffix, spec in layout.specs(scheme, ROWS, COLS).values():
        matrix = found(layout, tensors(layout, scheme) | {suffix: ("F64", spec.shape)})
        assert matrix.scheme == scheme
        assert f"{MODULE}.{suffix} is F64, not {spec.dtype}" in matrix.faults


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_without_an_input_scale_nvfp4_is_weight_only(layout: Layout) -> None:
    specs = tensors(layout, NVFP4)
    del specs[input_leaf(layout, NVFP4)]
    assert found(layout, specs).scheme is NVFP4_A16


def test_packed_codes_under_another_dtype_are_not_fp8() -> None:
    """modelopt names both kinds of codes `weight`."""
    specs = tensors(MODELOPT, NVFP4)
    matrix = found(MODELOPT, specs | {"weight": ("F8_E4M3", (ROWS, COLS))})
    assert matrix.scheme is NVFP4
    assert matrix.faults == (f"{MODULE}.weight is F8_E4M3, not U8",)


def test_a_weight_is_quantized_by_its_dtype_alone() -> None:
    for layout in LAYOUTS.values():
        assert find_matrices(infos({"weight": ("BF16", (ROWS, COLS)), "bias": ("BF16", (ROWS,))}), layout) == {}
        assert list(find_matrices(infos({"weight": ("F8_E4M3", (ROWS, COLS))}), layout)) == [MODULE]
    assert find_matrices(infos({"weight": ("U8", (ROWS, COLS))}), COMPRESSED_TENSORS) == {}
    assert list(find_matrices(infos({"weight": ("U8", (ROWS, COLS))}), MODELOPT)) == [MODULE]


def test_a_bias_and_cache_scales_may_stand_beside_and_others_may_not() -> None:
    specs = tensors(COMPRESSED_TENSORS, FP8)
    beside: Specs = {"bias": ("BF16", (ROWS,)), "k_scale": ("F32", (1,)), "v_scale": ("F32", (1,))}
    assert found(COMPRESSED_TENSORS, specs | beside).is_sound
    stranger: Specs = {"weight_zero_point": ("I8", (ROWS,))}
    assert found(COMPRESSED_TENSORS, specs | stranger).faults == (f"{MODULE} also has weight_zero_point",)


@pytest.mark.parametrize(
    ("layout", "scheme", "leaf", "spec", "words"),
    [
        (COMPRESSED_TENSORS, NVFP4, "weight_packed", ("U8", (ROWS, 12)), "[48, 12], not [rows, a multiple of 8]"),
        (COMPRESSED_TENSORS, NVFP4, "weight_packed", ("U8", (ROWS * 32,)), "[1536], not [rows, a multiple of 8]"),
        (COMPRESSED_TENSORS, NVFP4, "weight_scale", ("F8_E4M3", (4, 48)), "not [48, 4] as codes of [48, 32] require"),
        (MODELOPT, NVFP4, "weight_scale_2", ("F32", (2,)), "[2], not [1] or []"),
        (COMPRESSED_TENSORS, FP8, "weight", ("F8_E4M3", (ROWS, 24)), "[48, 24], not [rows, a multiple of 16]"),
        (COMPRESSED_TENSORS, FP8, "weight_scale", ("F32", (ROWS,)), "[48], not [48, 1] as codes of [48, 64] require"),
        (COMPRESSED_TENSORS, FP8, "weight_scale", ("F32", (1,)), "[1], not [48, 1] as codes of [48, 64] require"),
        (MODELOPT, FP8_STATIC, "weight_scale", ("F32", (ROWS,)), "[48], not [1] or []"),
        (MODELOPT, FP8_STATIC, "input_scale", ("F32", (2,)), "[2], not [1] or []"),
    ],
)
def test_a_wrong_shape_is_a_fault(
    layout: Layout, scheme: Scheme, leaf: str, spec: tuple[str, tuple[int, ...]], words: str
) -> None:
    (fault,) = found(layout, tensors(layout, scheme) | {leaf: spec}).faults
    assert fault.startswith(f"{MODULE}.{leaf} has shape ")
    assert fault.endswith(words)


def test_scalars_have_either_shape_and_fp8_scales_either_dtype() -> None:
    for shape in ((), (1,)):
        specs: Specs = {"weight_scale": ("BF16", shape), "input_scale": ("BF16", shape)}
        assert found(MODELOPT, tensors(MODELOPT, FP8_STATIC) | specs).is_sound
    assert found(COMPRESSED_TENSORS, tensors(COMPRESSED_TENSORS, FP8) | {"weight_scale": ("BF16", (ROWS, 1))}).is_sound
    global_scale: Specs = {"weight_global_scale": ("BF16", (1,))}
    assert not found(COMPRESSED_TENSORS, tensors(COMPRESSED_TENSORS, NVFP4) | global_scale).is_sound


def test_layouts_are_told_apart_by_names_that_only_one_has() -> None:
    assert layouts_present(infos(tensors(COMPRESSED_TENSORS, NVFP4))) == {"compressed-tensors": 3}
    assert layouts_present(infos(tensors(MODELOPT, NVFP4))) == {"modelopt": 2}
    assert layouts_present(infos(tensors(MODELOPT, FP8_STATIC))) == {"modelopt": 1}
    assert layouts_present(infos(tensors(COMPRESSED_TENSORS, FP8))) == {}  # modelopt has the same two names


def test_matrices_come_in_the_order_of_the_files() -> None:
    both = infos(tensors(MODELOPT, NVFP4), "b") | infos(tensors(MODELOPT, FP8_STATIC), "a")
    assert [(module, one.scheme.name) for module, one in find_matrices(both, MODELOPT).items()] == [
        ("b", "nvfp4"),
        ("a", "fp8"),
    ]


def test_names_are_split_at_their_last_dot() -> None:
    assert split_name("model.norm.weight") == ("model.norm", "weight")
    assert split_name("weight") == ("", "weight")
    assert part_leaves(MODELOPT) == {"weight", "weight_scale", "weight_scale_2", "input_scale"}
    assert input_leaf(MODELOPT, FP8_STATIC) == input_leaf(MODELOPT, NVFP4) == "input_scale"
