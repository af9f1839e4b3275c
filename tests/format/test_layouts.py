"""Names and scalar shapes of the two layouts, literally as other programs read them."""

from __future__ import annotations

from nvquant.format.layouts import COMPRESSED_TENSORS, FORMAT_NAMES, LAYOUTS, MODELOPT


def test_compressed_tensors_names() -> None:
    assert COMPRESSED_TENSORS.suffixes == (
        "weight_packed",
        "weight_scale",
        "weight_global_scale",
        "input_global_scale",
    )
    assert (COMPRESSED_TENSORS.scalar_shape, COMPRESSED_TENSORS.divisor) == ((1,), True)


def test_modelopt_names() -> None:
    assert MODELOPT.suffixes == ("weight", "weight_scale", "weight_scale_2", "input_scale")
    assert (MODELOPT.scalar_shape, MODELOPT.divisor) == ((), False)


def test_layouts_are_found_by_what_format_calls_them() -> None:
    assert list(LAYOUTS) == list(FORMAT_NAMES) == ["compressed-tensors", "modelopt"]
    assert all(layout.name == name for name, layout in LAYOUTS.items())
