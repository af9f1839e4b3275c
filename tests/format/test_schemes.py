"""What each scheme stores, and in which arithmetics a server may compute it."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import nvquant
import pytest
import torch
from nvquant.format.layouts import LAYOUTS
from nvquant.format.schemes import (
    ARITHMETIC_WORDS,
    ARITHMETICS,
    FP8,
    FP8_STATIC,
    NVFP4,
    NVFP4_A16,
    SCHEMES,
    Scheme,
    arithmetics_of,
    rounds_inputs,
)

ALL = (NVFP4, NVFP4_A16, FP8, FP8_STATIC)


def test_schemes_are_found_by_the_names_of_recipes() -> None:
    assert {name: scheme.words for name, scheme in SCHEMES.items()} == {
        "nvfp4": "NVFP4 W4A4",
        "nvfp4-a16": "NVFP4 weight-only",
        "fp8": "FP8 W8A8",
    }


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.form)
def test_the_shape_of_a_matrix_follows_from_its_codes(scheme: Scheme) -> None:
    assert scheme.shape_of(scheme.parts(48, 64)["codes"].shape) == (48, 64)
    scalars = {part for part, spec in scheme.parts(48, 64).items() if not spec.shape}
    assert scalars == set(scheme.shared)


@pytest.mark.parametrize(
    ("schemes", "expected"),
    [
        ((NVFP4,), ("w4a4", "weight_only")),
        ((NVFP4_A16,), ("weight_only",)),
        ((FP8,), ("w8a8", "weight_only")),
        ((FP8_STATIC, NVFP4), ("w4a4", "w8a8", "weight_only")),
        ((NVFP4_A16, FP8), ("w8a8", "weight_only")),
    ],
)
def test_the_arithmetics_of_a_checkpoint_begin_with_its_own(
    schemes: tuple[Scheme, ...], expected: tuple[str, ...]
) -> None:
    assert arithmetics_of(schemes) == expected


def test_a_server_rounds_the_inputs_that_its_units_take() -> None:
    found = {
        arithmetic: [scheme.words for scheme in (NVFP4, NVFP4_A16, FP8) if rounds_inputs(arithmetic, scheme)]
        for arithmetic in ARITHMETICS
    }
    assert found == {"w4a4": ["NVFP4 W4A4", "FP8 W8A8"], "w8a8": ["FP8 W8A8"], "weight_only": []}
    assert set(ARITHMETIC_WORDS) == set(ARITHMETICS)


def test_the_largest_input_is_what_the_stored_scale_allows() -> None:
    assert NVFP4.largest_input({"input_global": torch.tensor(2688.0 / 8)}) == 8.0
    assert FP8_STATIC.largest_input({"input_scale": torch.tensor(0.5)}) == 224.0
    assert FP8.largest_input({}) == NVFP4_A16.largest_input({}) == math.inf


# A room that needs one of these words treats schemes apart: mend the notion in format/ instead.
OWN_WORDS = {
    *("nvfp4-a16", "NVFP4A16", "W4A16_NVFP4", "FP8_DYNAMIC", "MIXED_PRECISION", "mixed-precision"),
    *("nvfp4-pack-quantized", "float-quantized"),
    *(
        leaf
        for layout in LAYOUTS.values()
        for form in layout.schemes.values()
        for leaf in layout.suffixes(form).values()
    ),
} - {"weight"}
OWN_ROOMS = ("format/",)
ALLOWED = {
    "recipe/schema.py": {"nvfp4-a16"},  # the names that a recipe may use
    "weights/found.py": {"input_scale", "input_global_scale"},  # companions in the sources of other tools
}


def test_names_of_schemes_and_of_stored_tensors_occur_in_one_room() -> None:
    root = Path(nvquant.__file__).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).as_posix()
        if module.startswith(OWN_ROOMS):
            continue
        constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        words = {word for word in constants if isinstance(word, str)} & OWN_WORDS - ALLOWED.get(module, set())
        if words:
            found[module] = sorted(words)
    assert found == {}
