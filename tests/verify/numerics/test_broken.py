"""Broken checkpoints, for which the stage numerics is the first that sees the fault or that tells its size; and that
none of the faults that structure finds ends the run with anything but a verdict."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from nvquant.checkpoint.source import open_checkpoint
from nvquant.verify.numerics.stage import NumericsOptions
from nvquant.verify.run import Verification, VerifyOptions
from nvquant.verify.structure import verify_structure
from support.conversions import random_samples, write_ids
from verify.breaking import MANIFEST, Fault, edit_json, edit_tensors
from verify.checkpoints import Copy
from verify.faults import FAULTS
from verify.numerics.measuring import Measured, held_out, measured, no_progress

LAYER = "model.layers.7"


@dataclass(frozen=True)
class Broken:
    """A way to break a real checkpoint that another tool made.

    Attributes:
        against_source: the structure checks that fail with `--against`; without it all pass.
        numerics: the numerics checks that fail.
        names: what the first of these says.
    """

    apply: Callable[[Path, Measured], None]
    against_source: frozenset[str]
    numerics: tuple[str, ...]
    names: str

    @property
    def first(self) -> str:
        """Where it is seen first."""
        return "source" if self.against_source else "numerics"


def input_scales_ten_times_too_large(folder: Path, before: Measured) -> None:
    """A divisor made from a tenth of the amax."""
    amaxes = {one["name"]: one["amax"] for one in before.document["inputs"]}
    with edit_tensors(folder) as tensors:
        for leaf in ("gate", "up"):
            scale = tensors[f"{LAYER}.mlp.{leaf}_proj.input_global_scale"]
            scale.set_scalar(2688 / amaxes[f"{LAYER}.mlp.gate_up_proj"] * 10)


def input_scale_stored_as_multiplier(folder: Path, before: Measured) -> None:
    """No bound on an input's amax tells: head-room alone brings it to a million."""
    (amax,) = (one["amax"] for one in before.document["inputs"] if one["name"] == f"{LAYER}.self_attn.o_proj")
    with edit_tensors(folder) as tensors:
        tensors[f"{LAYER}.self_attn.o_proj.input_global_scale"].set_scalar(amax / 2688)


def layers_sorted_as_text(folder: Path, _before: Measured) -> None:
    order = sorted(range(30), key=str)
    with edit_tensors(folder) as tensors:
        old = {name: (stored.shape, stored.data) for name, stored in tensors.items()}
        for name, stored in tensors.items():
            parts = name.split(".")
            if parts[:2] == ["model", "layers"]:
                parts[2] = str(order[int(parts[2])])
                stored.shape, stored.data = old[".".join(parts)]


def nibbles_swapped(folder: Path, _before: Measured) -> None:
    table = bytes((byte >> 4) | (byte & 15) << 4 for byte in range(256))
    with edit_tensors(folder) as tensors:
        stored = tensors[f"{LAYER}.self_attn.o_proj.weight_packed"]
        stored.data = bytearray(stored.data.translate(table))


def layer_of_zeros(folder: Path, _before: Measured) -> None:
    with edit_tensors(folder) as tensors:
        for name, stored in tensors.items():
            if name.startswith(f"{LAYER}.") and name.endswith("weight_packed"):
                stored.data = bytearray(len(stored.data))


def rope_theta_of_another_model(folder: Path, _before: Measured) -> None:
    with edit_json(folder / "config.json") as config:
        config["rope_parameters"]["rope_theta"] = 500.0


BROKEN = [
    Broken(input_scales_ten_times_too_large, frozenset(), ("inputs",), f"{LAYER}.mlp.gate_up_proj: "),
    Broken(input_scale_stored_as_multiplier, frozenset(), ("inputs",), f"{LAYER}.self_attn.o_proj: "),
    Broken(
        layers_sorted_as_text,
        frozenset({"untouched", "weights"}),
        ("layers", "kl", "top1", "nll", "matrices"),
        "layer 2, W4A4: relative error",
    ),
    Broken(
        nibbles_swapped, frozenset({"weights"}), ("matrices", "layers"), f"{LAYER}.self_attn.o_proj: relative error 1"
    ),
    Broken(layer_of_zeros, frozenset({"weights"}), ("layers", "matrices"), "layer 7, W4A4: relative error 1 of"),
    Broken(rope_theta_of_another_model, frozenset({"config_source"}), ("top1",), "W4A4: top-1 agreement"),
]

# Seen by the same checks as another one, or on tiny models too.
REPEATED = BROKEN[1:]


@pytest.fixture
def foreign(smollm2_full: Path, tmp_path: Path) -> Path:
    """A copy of the converted model that another tool might have made."""
    shutil.copytree(smollm2_full, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / MANIFEST).unlink()
    return tmp_path / "checkpoint"


@pytest.mark.slow
def test_a_good_real_checkpoint_passes_and_its_numbers_are_of_the_right_size(smollm2_measured: Measured) -> None:
    """Measured by others with the same recipe: KL 0.44 with rounded inputs, 0.24 with quantized weights alone."""
    assert smollm2_measured.failed == set()
    assert 0.3 < smollm2_measured.kl("w4a4") < 0.8
    assert 0.12 < smollm2_measured.kl("weight_only") < 0.45
    assert 0 < smollm2_measured.kl("floor") < 0.005
    assert max(smollm2_measured.own_errors("w4a4")) < 0.4


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [pytest.param(one, marks=[pytest.mark.thorough] * (one in REPEATED), id=one.apply.__name__) for one in BROKEN],
)
def test_a_real_checkpoint_is_seen_to_be_broken_where_it_can_be_seen_first(
    broken: Broken, foreign: Path, smollm2: Path, smollm2_measured: Measured
) -> None:
    broken.apply(foreign, smollm2_measured)
    assert {check.name for check in verify_structure(foreign).checks if not check.passed} == set()
    against = {check.name for check in verify_structure(foreign, smollm2).checks if not check.passed}
    assert against == broken.against_source
    found = measured(foreign, smollm2, held_out(smollm2, 6, 128), max_kl=1.0)
    assert found.failed >= set(broken.numerics)
    assert found.failed <= {*broken.numerics, "layers", "kl", "top1", "nll"}
    assert any(broken.names in fault for fault in found.findings[broken.numerics[0]].faults)
    if broken.first == "numerics":
        assert found.kl("weight_only") == smollm2_measured.kl("weight_only")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_no_fault_ends_the_run_without_a_verdict(fault: Fault, copy: Callable[[str], Copy], tmp_path: Path) -> None:
    made = copy(fault.on)
    fault.apply(made.folder)
    ids = write_ids(tmp_path / "ids.jsonl", random_samples((9,)))
    options = VerifyOptions(("structure", "numerics"), NumericsOptions(ids, samples=1, sequence_length=9, min_top1=0.0))
    verification = Verification(made.folder, open_checkpoint(made.source), options, no_progress)
    checks = list(verification.run())
    assert {check.name for check in checks if check.stage == "structure" and not check.passed} == set(fault.fails)
    assert any(check.stage == "numerics" for check in checks)
    assert not verification.report().passed
