"""Names and scalar shapes of the two layouts, literally as other programs read them."""

from __future__ import annotations

from nvquant.format.layouts import COMPRESSED_TENSORS, FORMAT_NAMES, LAYOUTS, MODELOPT
from nvquant.format.schemes import FP8, FP8_STATIC, NVFP4, NVFP4_A16, PartSpec


def test_compressed_tensors_names() -> None:
    names = {
        "codes": "weight_packed",
        "scales": "weight_scale",
        "weight_global": "weight_global_scale",
        "input_global": "input_global_scale",
    }
    assert COMPRESSED_TENSORS.suffixes(NVFP4) == COMPRESSED_TENSORS.suffixes(NVFP4_A16) == names
    assert COMPRESSED_TENSORS.suffixes(FP8) == {"codes": "weight", "scales": "weight_scale"}
    assert (COMPRESSED_TENSORS.scalar_shape, COMPRESSED_TENSORS.divisor) == ((1,), True)


def test_modelopt_names() -> None:
    names = {
        "codes": "weight",
        "scales": "weight_scale",
        "weight_global": "weight_scale_2",
        "input_global": "input_scale",
    }
    assert MODELOPT.suffixes(NVFP4) == names
    assert MODELOPT.suffixes(FP8_STATIC) == {
        "codes": "weight",
        "scales": "weight_scale",
        "input_scale": "input_scale",
    }
    assert (MODELOPT.scalar_shape, MODELOPT.divisor) == ((), False)


def test_a_matrix_has_the_tensors_of_its_scheme_in_the_form_of_the_layout() -> None:
    assert COMPRESSED_TENSORS.specs(NVFP4_A16, 4, 32) == {
        "codes": ("weight_packed", PartSpec("U8", (4, 16))),
        "scales": ("weight_scale", PartSpec("F8_E4M3", (4, 2))),
        "weight_global": ("weight_global_scale", PartSpec("F32", (1,))),
    }
    assert COMPRESSED_TENSORS.specs(FP8, 4, 32) == {
        "codes": ("weight", PartSpec("F8_E4M3", (4, 32))),
        "scales": ("weight_scale", PartSpec("F32", (4, 1))),
    }
    assert MODELOPT.specs(FP8_STATIC, 4, 32) == {
        "codes": ("weight", PartSpec("F8_E4M3", (4, 32))),
        "scales": ("weight_scale", PartSpec("F32", ())),
        "input_scale": ("input_scale", PartSpec("F32", ())),
    }


def test_layouts_are_found_by_what_format_calls_them() -> None:
    assert list(LAYOUTS) == list(FORMAT_NAMES) == ["compressed-tensors", "modelopt"]
    assert all(layout.name == name for name, layout in LAYOUTS.items())


def test_each_layout_has_one_form_of_each_scheme() -> None:
    assert COMPRESSED_TENSORS.schemes == {"nvfp4": NVFP4, "nvfp4-a16": NVFP4_A16, "fp8": FP8}
    assert MODELOPT.schemes == {"nvfp4": NVFP4, "nvfp4-a16": NVFP4_A16, "fp8": FP8_STATIC}
