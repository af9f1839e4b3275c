"""What servers fuse beyond q/k/v and gate/up shares its scales, is refused by halves, and is held by verify."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nvquant.convert.options import ConvertOptions
from nvquant.convert.pipeline import convert
from nvquant.errors import InputError
from nvquant.recipe.load import parse_recipe
from nvquant.recipe.schema import Recipe
from nvquant.verify.structure import verify_structure
from safetensors.torch import load_file, save_file
from support.conversions import planned, tensors_in
from support.tiny_hybrids import tiny_delta_net, tiny_latent
from support.tiny_models import tiny_llama

DELTA, LATENT = "model.layers.0.linear_attn", "model.layers.0.self_attn"
PAIRS = {
    "qkvz": (tiny_delta_net, DELTA, "in_proj_qkv", "in_proj_z", "in_proj_qkvz"),
    "ba": (tiny_delta_net, DELTA, "in_proj_b", "in_proj_a", "in_proj_ba"),
    "latent": (tiny_latent, LATENT, "q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj"),
}


def own(*leaves: str) -> Recipe:
    pattern = json.dumps(rf"re:.*\.({'|'.join(leaves)})$")
    return parse_recipe(
        f"name: own\nexperts: bf16\nquantize:\n  - modules: [{pattern}]\n    scheme: nvfp4-a16\nquantizer: rtn\n", "own"
    )


def faults(folder: Path, source: Path) -> dict[str, list[str]]:
    report = verify_structure(folder, source)
    return {check.name: list(check.finding.faults) for check in report.checks if not check.passed}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, str, str, str]:
    write, parent, first, second, fused = PAIRS[request.param]
    return write(tmp_path / "source"), f"{parent}.{first}", f"{parent}.{second}", f"{parent}.{fused}", request.param


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_a_fused_pair_shares_its_scale_and_verify_holds_it(
    pair: tuple[Path, str, str, str, str], layout: str, tmp_path: Path
) -> None:
    source, first, second, fused, _ = pair
    plan = planned(source, own(first.rpartition(".")[2], second.rpartition(".")[2]), layout)
    assert {plan.matrices[first].weight_group, plan.matrices[second].weight_group} == {fused}
    out = tmp_path / "out"
    convert(plan, ConvertOptions(out, "rtn"), None)
    stored = tensors_in(out)
    scale = plan.layout.suffixes(plan.matrices[first].scheme)["weight_global"]
    assert torch.equal(stored[f"{first}.{scale}"], stored[f"{second}.{scale}"])
    assert faults(out, source) == {}

    files = [path for path in out.glob("*.safetensors") if f"{second}.{scale}" in load_file(path)]
    (out / "nvquant_manifest.json").unlink()
    tensors = load_file(files[0])
    tensors[f"{second}.{scale}"] = tensors[f"{second}.{scale}"] * 2
    save_file(tensors, files[0], metadata={"format": "pt"})
    assert f"{fused}: weight global scales differ" in faults(out, source)["fused_groups"][0]


def test_half_of_a_fused_pair_is_refused(pair: tuple[Path, str, str, str, str]) -> None:
    source, first, second, _, _ = pair
    for one, other in ((first, second), (second, first)):
        with pytest.raises(InputError, match=rf"{other.rpartition('.')[2]}, which vLLM fuses with it"):
            planned(source, own(one.rpartition(".")[2]))


def test_verify_fails_a_pair_of_which_one_is_not_quantized(
    pair: tuple[Path, str, str, str, str], tmp_path: Path
) -> None:
    source, first, second, fused, _ = pair
    plan = planned(source, own(first.rpartition(".")[2], second.rpartition(".")[2]))
    out = tmp_path / "out"
    convert(plan, ConvertOptions(out, "rtn"), None)
    (out / "nvquant_manifest.json").unlink()
    file = next(path for path in out.glob("*.safetensors") if f"{second}.weight_packed" in load_file(path))
    tensors = {name: value for name, value in load_file(file).items() if not name.startswith(f"{second}.weight")}
    tensors[f"{second}.weight"] = load_file(source / "model.safetensors")[f"{second}.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert f"{second} is not quantized, but the rest of {fused} is" in faults(out, source)["fused_groups"]


def test_names_of_other_families_are_fused_too(tmp_path: Path) -> None:
    """w1 and w3, as InternLM2 calls gate and up."""
    source = tiny_llama(tmp_path / "source", shards=1)
    tensors = load_file(source / "model.safetensors")
    renamed = {
        name.replace("mlp.gate_proj", "feed_forward.w1")
        .replace("mlp.up_proj", "feed_forward.w3")
        .replace("mlp.down_proj", "feed_forward.w2"): value
        for name, value in tensors.items()
    }
    save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    plan = planned(source, own("w1", "w2", "w3"))
    assert plan.matrices["model.layers.0.feed_forward.w1"].weight_group == "model.layers.0.feed_forward.gate_up_proj"
    convert(plan, ConvertOptions(tmp_path / "out", "rtn"), None)
    assert faults(tmp_path / "out", source) == {}
