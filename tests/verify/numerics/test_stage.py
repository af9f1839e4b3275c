"""The stage's limits and words: where a limit comes from, when it is kept, and that what is no number never is."""

from __future__ import annotations

import copy as copies
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.checkpoint.source import open_checkpoint
from nvquant.errors import InputError
from nvquant.verify.numerics.document import Thresholds
from nvquant.verify.numerics.stage import NumericsOptions, NumericsStage, thresholds_of
from nvquant.verify.run import Verification, VerifyOptions
from nvquant.verify.subject import open_subject
from support.conversions import random_samples, write_ids
from verify.breaking import LAYER, MANIFEST, bytes_of, edit_json, edit_tensors
from verify.checkpoints import Copy
from verify.numerics.measuring import Measured, measured, no_progress

CHECKS = ["predictions", "kl", "top1", "nll", "layers", "matrices", "inputs"]


@pytest.fixture(scope="module")
def document(good: Callable[[str], Path], models: dict[str, Path]) -> dict[str, Any]:
    """What was measured of a good checkpoint."""
    return dict(measured(good("llama-ct"), models["llama"], random_samples()).document)


def changed(document: dict[str, Any], *path: str | int, to: Any) -> Measured:
    """The document with one number changed."""
    made = copies.deepcopy(document)
    place: Any = made
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return Measured(made)


def test_a_good_checkpoint_passes_every_check(document: dict[str, Any]) -> None:
    assert list(Measured(document).findings) == CHECKS
    assert Measured(document).failed == set()


def test_only_w4a4_has_rounding_noise_and_prints_it_beside_its_kl(document: dict[str, Any]) -> None:
    noises = {name: numbers["kl"]["rounding_noise"] for name, numbers in document["arithmetics"].items()}
    assert noises["weight_only"] is None and noises["floor"] is None
    assert 0 < noises["w4a4"] < document["arithmetics"]["w4a4"]["kl"]["mean"]
    words = Measured(document).findings["kl"].looked_at
    assert f"rounding ± {noises['w4a4']:.2g}" in words
    assert words.count("rounding ±") == 1


def test_the_document_has_the_keys_that_readers_rely_on(document: dict[str, Any]) -> None:
    assert set(document) == {
        "kl", "perplexity", "perplexity_source", "top1", "source", "text", "device", "dtype", "nll_source",
        "arithmetics", "layers", "matrices", "inputs", "thresholds", "kind_warnings",
    }  # fmt: skip
    assert set(document["text"]) == {"name", "framing", "sequences", "tokens", "scored", "sha256"}
    assert set(document["arithmetics"]) == {"w4a4", "weight_only", "floor"}
    for numbers in document["arithmetics"].values():
        assert set(numbers) == {"words", "kl", "nll", "delta_nll", "nll_difference", "perplexity", "top1", "kinds"}
        assert set(numbers["kl"]) == {"mean", "median", "p99", "standard_error", "rounding_noise"}
        assert set(numbers["top1"]) == {"agreement", "standard_error", "rounding_noise"}
    assert [layer["layer"] for layer in document["layers"]] == [0, 1, 2]
    for layer in document["layers"]:
        assert set(layer) == {"layer", "w4a4", "weight_only"}
        assert set(layer["w4a4"]) == {"relative_error", "sqnr_db", "cosine", "accumulated_error", "clipped"}
        assert layer["weight_only"]["clipped"] is None and layer["w4a4"]["clipped"] == 0
    assert len(document["matrices"]) == 21
    assert set(document["matrices"][0]) == {
        "name", "layer", "scheme", "weight_error", "blocks", "zero_blocks", "clamped_blocks", "flushed_blocks",
    }  # fmt: skip
    assert len(document["inputs"]) == 12  # of fused layers
    assert set(document["inputs"][0]) == {"name", "layer", "amax", "calibrated_amax", "clipped", "lost"}
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_the_first_numbers_are_those_of_the_checkpoints_own_scheme(
    document: dict[str, Any], good: Callable[[str], Path], models: dict[str, Path]
) -> None:
    weight_only = measured(good("llama-a16-ct"), models["llama"], random_samples()).document
    for found, scheme in ((document, "w4a4"), (weight_only, "weight_only")):
        own = found["arithmetics"][scheme]
        assert list(found)[:4] == ["kl", "perplexity", "perplexity_source", "top1"]
        assert (found["kl"], found["perplexity"]) == (own["kl"]["mean"], own["perplexity"])
        assert found["top1"] == own["top1"]["agreement"]
        assert found["perplexity_source"] == pytest.approx(math.exp(found["nll_source"]))


def test_the_text_is_counted(document: dict[str, Any]) -> None:
    samples = random_samples()
    tokens = sum(map(len, samples))
    assert document["text"]["tokens"] == tokens
    assert document["text"]["scored"] == tokens - len(samples)
    assert document["text"]["sequences"] == len(samples)


LIMITS = [
    ("kl", ("arithmetics", "w4a4", "kl", "mean"), 0.31, {"max_kl": 0.3}),
    ("kl", ("arithmetics", "weight_only", "kl", "mean"), 0.31, {"max_kl": 0.3}),
    ("top1", ("arithmetics", "w4a4", "top1", "agreement"), 0.49, {}),
    ("top1", ("arithmetics", "weight_only", "top1", "agreement"), 0.29, {"min_top1": 0.3}),
    ("nll", ("arithmetics", "w4a4", "delta_nll"), 1.01, {}),
    ("layers", ("layers", 1, "w4a4", "relative_error"), 0.61, {}),
    ("layers", ("layers", 2, "weight_only", "relative_error"), 0.61, {}),
    ("matrices", ("matrices", 4, "weight_error"), 0.26, {}),
    ("inputs", ("inputs", 3, "clipped"), 0.011, {}),
    ("inputs", ("inputs", 3, "lost"), 0.11, {}),
]


@pytest.mark.parametrize(("check", "path", "value", "limits"), LIMITS)
def test_a_number_beyond_its_limit_fails_its_check_alone_and_is_named(
    check: str, path: tuple[str | int, ...], value: float, limits: dict[str, float], document: dict[str, Any]
) -> None:
    limited = {**document, "thresholds": {**document["thresholds"], "max_kl": 10.0, "min_top1": 0.0, **limits}}
    limited["thresholds"].setdefault("max_delta_nll", 1.0)
    if check == "top1" and not limits:
        limited["thresholds"]["min_top1"] = 0.5
    found = changed(limited, *path, to=value)
    assert found.failed == {check}
    (fault,) = found.findings[check].faults
    if path[0] == "layers":
        assert fault.startswith(f"layer {path[1]}, ")
    elif path[0] in ("matrices", "inputs"):
        assert fault.startswith(document[path[0]][path[1]]["name"])
    else:
        assert fault.startswith({"w4a4": "W4A4", "weight_only": "weight-only"}[str(path[1])])


@pytest.mark.parametrize("lane", ["w4a4", "weight_only"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_never_passes(bad: float, lane: str, document: dict[str, Any]) -> None:
    for check, path in (
        ("predictions", ("arithmetics", lane, "kl", "mean")),
        ("kl", ("arithmetics", lane, "kl", "mean")),
        ("nll", ("arithmetics", lane, "delta_nll")),
        ("layers", ("layers", 0, lane, "relative_error")),
        ("matrices", ("matrices", 0, "weight_error")),
    ):
        limited = {**document, "thresholds": {"max_kl": 1e9, "min_top1": 0.0, "max_delta_nll": 1e9}}
        found = changed(limited, *path, to=bad)
        assert check in found.failed, check
    found = changed(document, "arithmetics", lane, "top1", "agreement", to=math.nan)
    assert "top1" in found.failed


def test_an_input_of_nothing_but_nan_never_passes(document: dict[str, Any]) -> None:
    found = changed(document, "inputs", 0, "amax", to=math.nan)
    assert "inputs" in found.failed


def test_no_limit_on_kl_is_said(document: dict[str, Any]) -> None:
    assert "no limit set" in Measured(document).findings["kl"].looked_at
    assert "at most 0.3" in changed(document, "thresholds", "max_kl", to=0.3).findings["kl"].looked_at


def test_words_have_the_numbers(document: dict[str, Any]) -> None:
    words = {name: finding.looked_at for name, finding in Measured(document).findings.items()}
    scored = document["text"]["scored"]
    assert words["predictions"] == f"{scored} tokens of ids.jsonl (ids), 6 sequences, on cpu in float32"
    assert f"W4A4 {document['arithmetics']['w4a4']['kl']['mean']:.4f} ±" in words["kl"]
    assert f"{document['arithmetics']['weight_only']['top1']['agreement']:.4f}" in words["top1"]
    assert f"source {document['perplexity_source']:.3f}" in words["nll"]
    assert words["layers"].startswith("3 layers, relative error each: W4A4 median ")
    assert words["matrices"].startswith("21 matrices, weight error median ")
    assert words["inputs"].startswith("12 inputs, ")


def test_limits_are_the_defaults_of_the_design_without_a_manifest(good: Callable[[str], Path]) -> None:
    assert thresholds_of(open_subject(good("llama-foreign"))) == Thresholds(None, 0.5, 1.0)


def test_limits_come_from_the_recipe_in_the_manifest(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-ct")
    with edit_json(made.folder / MANIFEST) as manifest:
        manifest["recipe"]["verify"] = {"max_kl": 0.25, "min_top1": 0.7, "max_delta_nll": 0.4}
    assert thresholds_of(open_subject(made.folder)) == Thresholds(0.25, 0.7, 0.4)


def test_options_win_over_the_recipe() -> None:
    recipe = Thresholds(0.25, 0.7, 0.4)
    assert recipe.tightened(None, None) == recipe
    assert recipe.tightened(0.1, None) == Thresholds(0.1, 0.7, 0.4)
    assert recipe.tightened(None, 0.0) == Thresholds(0.25, 0.0, 0.4)
    assert recipe.tightened(0.0, 1.0) == Thresholds(0.0, 1.0, 0.4)


def run_stage(made: Copy, ids: Path, **options: Any) -> set[str]:
    """The checks that fail."""
    rows = len(ids.read_text().splitlines())
    chosen = NumericsOptions(text=ids, samples=rows, sequence_length=64, **options)
    stage = NumericsStage(open_subject(made.folder), open_checkpoint(made.source), chosen, no_progress)
    assert stage.numbers is None
    checks = list(stage.run())
    assert [check.name for check in checks] == CHECKS
    assert {check.stage for check in checks} == {"numerics"}
    assert stage.numbers is not None
    return {check.name for check in checks if not check.passed}


def test_the_recipes_limit_and_the_options_decide_the_verdict(copy: Callable[[str], Copy], tmp_path: Path) -> None:
    made, ids = copy("llama-ct"), write_ids(tmp_path / "ids.jsonl", random_samples())
    assert run_stage(made, ids) == set()
    assert run_stage(made, ids, max_kl=1e-9) == {"kl"}
    assert run_stage(made, ids, min_top1=1.0) == {"top1"}
    with edit_json(made.folder / MANIFEST) as manifest:
        manifest["recipe"]["verify"] = {"max_kl": 1e-9, "min_top1": 1.0}
    assert run_stage(made, ids) == {"kl", "top1"}
    assert run_stage(made, ids, max_kl=10.0, min_top1=0.0) == set()


def test_a_norm_of_nan_fails_predictions_and_all_that_follow_from_them(
    copy: Callable[[str], Copy], tmp_path: Path
) -> None:
    made, ids = copy("llama-ct"), write_ids(tmp_path / "ids.jsonl", random_samples())
    with edit_tensors(made.folder) as tensors:
        norm = tensors[f"{LAYER}.input_layernorm.weight"]
        norm.data[:] = bytes_of(torch.full((64,), math.nan, dtype=torch.bfloat16))
    assert run_stage(made, ids, max_kl=100.0) >= {"predictions", "kl", "nll", "layers", "inputs"}


def test_a_quantized_source_is_refused(copy: Callable[[str], Copy], good: Callable[[str], Path]) -> None:
    made = copy("llama-ct")
    stage = NumericsStage(
        open_subject(made.folder), open_checkpoint(good("llama-a16-ct")), NumericsOptions(), no_progress
    )
    with pytest.raises(InputError, match="is quantized already"):
        list(stage.run())


def test_without_a_source_the_stage_is_refused(copy: Callable[[str], Copy]) -> None:
    with pytest.raises(InputError, match="--stage numerics compares with the source: name it with --against MODEL"):
        Verification(copy("llama-ct").folder, None, VerifyOptions(("numerics",)), no_progress)


@pytest.mark.parametrize("stages", [("structure", "numerics"), ("numerics",)])
def test_what_cannot_be_read_is_not_measured_and_the_reason_is_given(stages: Any, copy: Callable[[str], Copy]) -> None:
    made = copy("llama-ct")
    with edit_tensors(made.folder) as tensors:
        del tensors[f"{LAYER}.mlp.up_proj.weight_scale"]
    verification = Verification(made.folder, open_checkpoint(made.source), VerifyOptions(stages), no_progress)
    checks = [check for check in verification.run() if not check.passed]
    counted = {check.name: check.detail for check in checks if check.stage == "structure"}
    assert counted["matrices"].endswith(f"; {LAYER}.mlp.up_proj lacks weight_scale")
    measured = [check for check in checks if check.stage == "numerics"]
    assert [check.detail for check in measured] == ["not measured; the checks matrices must pass first"]
    assert verification.report().numerics is None
