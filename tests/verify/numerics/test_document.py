"""The document of the stage: what is written is read back, and what others wrote is checked."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from nvquant.verify.numerics.document import LayerLoss, LayerLosses, Numerics, known, numerics_of
from nvquant.verify.report import plain_json
from support import reports

MEASURED: dict[str, Any] = {
    "kl": 0.2, "perplexity": 9.0, "perplexity_source": 8.0, "top1": 0.7, "source": "m",
    "text": {"name": "t", "framing": "chat", "sequences": 2, "tokens": 20, "scored": 18, "sha256": "0" * 64},
    "device": "cpu", "dtype": "float32", "nll_source": 2.1,
    "arithmetics": {
        name: {
            "words": name,
            "kl": {"mean": 0.2, "standard_error": 0.01, "rounding_noise": None, "median": 0.1, "p99": 1.5},
            "nll": 2.2, "delta_nll": 0.1, "nll_difference": 0.2, "perplexity": 9.0,
            "top1": {"agreement": 0.7, "standard_error": 0.02, "rounding_noise": None},
            "kinds": {
                "code": {
                    "sequences": 3, "tokens": 9,
                    "kl": {"mean": 0.3, "standard_error": 0.01, "rounding_noise": None, "median": 0.1, "p99": 1.5},
                    "top1": {"agreement": 0.6, "standard_error": 0.02, "rounding_noise": None},
                    "relative": 1.6, "relative_error": 0.1,
                },
            },
        }
        for name in ("w4a4", "floor")
    },
    "layers": [
        {
            "layer": 0,
            "w4a4": {
                "relative_error": 0.1, "sqnr_db": 20.0, "cosine": 0.99, "accumulated_error": 0.1, "clipped": 0.0,
            },
        }
    ],
    "matrices": [
        {
            "name": "a", "layer": 0, "scheme": "W4A4", "weight_error": 0.09, "blocks": 8, "zero_blocks": 0,
            "clamped_blocks": 0, "flushed_blocks": 1,
        }
    ],
    "inputs": [{"name": "a", "layer": 0, "amax": 3.0, "calibrated_amax": 2.0, "clipped": 0.01, "lost": 0.0}],
    "thresholds": {"max_kl": None, "min_top1": 0.5, "max_delta_nll": 1.0},
    "kind_warnings": [{"arithmetic": "w4a4", "kind": "code", "kl": 0.3, "relative": 1.6, "relative_error": 0.1}],
}  # fmt: skip


def test_what_is_written_is_read_back_byte_for_byte() -> None:
    numbers = numerics_of(MEASURED)
    assert numbers is not None
    assert json.dumps(plain_json(numbers.as_json())) == json.dumps(MEASURED)
    assert numbers.inputs[0].growth == 1.5
    assert numbers.layers == (LayerLosses(0, {"w4a4": LayerLoss(0.1, 20.0, 0.99, 0.1, 0.0)}),)


def test_numbers_that_json_cannot_hold_come_back_and_pass_no_limit() -> None:
    numbers = numerics_of({"kl": "NaN", "perplexity": "Infinity", "top1": "-Infinity", "nll_source": "high"})
    assert numbers is not None
    assert math.isnan(known(numbers.kl)) and numbers.perplexity == math.inf and numbers.top1 == -math.inf
    assert numbers.nll_source is None and not known(numbers.nll_source) <= 1e9


def other(value: Any) -> Any:
    """The document with every value of another type."""
    if isinstance(value, dict):
        return {key: other(item) for key, item in value.items()}
    if isinstance(value, list):
        return [other(item) for item in value]
    return [value] if isinstance(value, str) else "text" if not isinstance(value, bool) else value


def test_values_of_a_wrong_type_are_absent() -> None:
    numbers = numerics_of(other(MEASURED))
    assert numbers is not None
    assert numbers.kl is None and numbers.source is None and numbers.layers == ()
    assert numbers.arithmetics["w4a4"].kl.mean is None and numbers.arithmetics["w4a4"].words is None
    assert numbers.matrices[0].blocks is None and numbers.inputs[0].growth is None
    assert numbers.arithmetics["w4a4"].kinds["code"].relative is None and numbers.kind_warnings[0].kind is None


@pytest.mark.parametrize("document", [None, [], "x", 3])
def test_no_document_is_none(document: Any) -> None:
    assert numerics_of(document) is None


@pytest.mark.parametrize("key", MEASURED)
@pytest.mark.parametrize("value", [None, True, 3, "x", [1, [2]], {"a": {"b": 1}}])
def test_any_value_in_any_place_is_parsed(key: str, value: Any) -> None:
    assert isinstance(numerics_of({**MEASURED, key: value}), Numerics)


def test_a_document_of_an_older_nvquant_is_read() -> None:
    numbers = numerics_of(reports.good(3).numerics)
    assert numbers is not None and len(numbers.layers) == 3 and set(numbers.arithmetics) >= {"w4a4", "floor"}
