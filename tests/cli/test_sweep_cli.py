"""`nvquant sweep`, and `nvquant convert` within a budget: options reach the run, and a chosen recipe is converted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nvquant.stream.manifest import read_manifest
from support.commands import Command
from support.conversions import TinyModels, contents, planned, random_samples, write_ids
from support.hub_models import hub_for_this_process

SIZE = ("--device", "cpu", "--samples", "6", "--sequence-length", "40")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_sweep_writes_its_files_and_no_checkpoint(nvquant: Command, tiny: TinyModels, ids: Path) -> None:
    model = tiny("llama")
    budgets = ("--target-bits", "5.5", "--target-bits", "7", "--max-kl", "1")
    ended = nvquant("sweep", model, "--recipe", "nvfp4-full", "--calibration", ids, *SIZE, *budgets, "-o", "out")
    assert ended.code == 0, ended.stderr
    recipes = ["nvfp4-full-5.5bits", "nvfp4-full-7bits", "nvfp4-full-kl1"]
    assert {path.name for path in Path("out").iterdir()} == {
        "sweep.json", "curve.csv", "curve.md", "curve.svg", *(f"{name}.yaml" for name in recipes),
    }  # fmt: skip
    document = json.loads(Path("out/sweep.json").read_text())
    assert [recipe["name"] for recipe in document["recipes"]] == recipes
    assert document["calibration"]["tokens"] == 144
    *_, five, seven, one, last = ended.stdout.splitlines()
    assert five.startswith("out/nvfp4-full-5.5bits.yaml: 5.")
    assert seven.startswith("out/nvfp4-full-7bits.yaml: 6.") or seven.startswith("out/nvfp4-full-7bits.yaml: 7.00")
    assert one.startswith("out/nvfp4-full-kl1.yaml: 4.50 bits a weight")
    assert last.startswith("out: 12 groups measured, KL divergence 0.00")
    assert f"Next: nvquant convert {model} --recipe out/nvfp4-full-5.5bits.yaml" in ended.stderr
    as_json = nvquant(
        "sweep", model, "--recipe", "nvfp4-full", "--calibration", ids, *SIZE, *budgets, "-o", "out", "--json"
    )
    assert json.loads(as_json.stdout) == {"output": "out", **document}


def test_the_default_folder_is_named_for_model_and_recipe(nvquant: Command, tiny: TinyModels, ids: Path) -> None:
    ended = nvquant("sweep", tiny("llama"), "--calibration", ids, *SIZE, "--quiet")
    assert (ended.code, ended.stderr) == (0, "")
    assert ended.stdout.startswith("llama-nvfp4.sweep: 6 groups measured")
    assert Path("llama-nvfp4.sweep/sweep.json").is_file()


def test_a_model_on_the_hub_has_the_numbers_of_its_copy(
    nvquant: Command, tiny: TinyModels, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_for_this_process(monkeypatch, tmp_path / "cache") as hub:
        commit = hub.add("model", "org/llama", tiny("llama"))
        ended = nvquant("sweep", "org/llama", "--calibration", ids, *SIZE, "--fold", "auto", "--quiet")
        assert ended.code == 0, ended.stderr
        local = nvquant("sweep", tiny("llama"), "--calibration", ids, *SIZE, "--fold", "auto", "--quiet", "-o", "local")
        assert local.code == 0, local.stderr
        low = nvquant("convert", "org/llama", "--low-disk", "--target-bits", "5")
        assert low.code == 2
        assert "reads the model several times, and --low-disk reads it once" in low.stderr
    remote, beside = (json.loads(Path(name, "sweep.json").read_text()) for name in ("llama-nvfp4.sweep", "local"))
    assert remote["source"]["hub"] == {"id": "org/llama", "commit": commit}
    assert {**remote, "source": None} == {**beside, "source": None}


def test_a_conversion_within_a_budget_has_the_recipe_of_its_sweep(
    nvquant: Command, tiny: TinyModels, ids: Path, tmp_path: Path
) -> None:
    model, text = tiny("llama"), write_ids(tmp_path / "long.jsonl", random_samples((512,) * 8))
    run = ("convert", model, "--recipe", "nvfp4-full", "--calibration", text, "--device", "cpu", "--samples", "4")
    ended = nvquant(*run, "--sequence-length", "40", "--target-bits", "6", "-o", "out")
    assert ended.code == 0, ended.stderr
    assert "--target-bits 6: 5." in ended.stderr
    manifest = read_manifest(Path("out"))
    assert manifest is not None and not isinstance(manifest, str)
    assert manifest.recipe.name == "nvfp4-full-6bits"
    found = {group.record.scheme for group in manifest.groups.values()}
    assert found == {"nvfp4", "fp8"}
    plain = nvquant(
        *run[:2], "--recipe", "out.sweep/nvfp4-full-6bits.yaml", *run[4:], "--sequence-length", "40", "-o", "plain"
    )
    assert plain.code == 0, plain.stderr
    assert contents(Path("plain")) == contents(Path("out"))
    again = nvquant(*run, "--sequence-length", "40", "--target-bits", "6", "-o", "out")
    assert "An equal run has already written this output" in again.stderr
    assert "measuring" not in again.stderr
    verified = nvquant("verify", "out", "--against", model)
    assert verified.code == 0, verified.stdout


def test_the_size_of_the_conversion_is_within_the_budget(nvquant: Command, tiny: TinyModels, tmp_path: Path) -> None:
    text = write_ids(tmp_path / "long.jsonl", random_samples((512,) * 8))
    size = planned(tiny("llama"), "nvfp4-full").file_bytes + 20_000
    ended = nvquant(
        "convert", tiny("llama"), "--recipe", "nvfp4-full", "--calibration", text, "--device", "cpu", "--samples", "4",
        "--sequence-length", "40", "--target-size", f"{size / 1000}kB", "-o", "out",
    )  # fmt: skip
    assert ended.code == 0, ended.stderr
    written = sum(path.stat().st_size for path in Path("out").glob("*.safetensors"))
    assert planned(tiny("llama"), "nvfp4-full").file_bytes < written <= size


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--target-bits", "5", "--max-kl", "0.1"), "are two budgets for one conversion"),
        (("--target-bits", "4.4"), "--target-bits 4.4 is impossible, because the recipes of this curve reach from 4.5"),
        (("--target-bits", "-1"), "is not a positive number"),
        (("--target-size", "9 apples"), "is not a size"),
        (("--target-bits", "5", "--recipe", "nvfp4-a16", "--fold", "auto"), "calibrates nothing"),
    ],
)
def test_a_wrong_budget_is_one_sentence_and_nothing_is_converted(
    nvquant: Command, tiny: TinyModels, tmp_path: Path, options: tuple[str, ...], sentence: str
) -> None:
    text = write_ids(tmp_path / "long.jsonl", random_samples((512,) * 8))
    ended = nvquant("convert", tiny("llama"), "-o", "out", "--device", "cpu", "--calibration", text, *options)
    assert ended.code == 2
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not Path("out").exists() and not Path("out.partial").exists()


def test_several_ranks_are_refused_with_the_way_out(
    nvquant: Command, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = nvquant("convert", tiny("llama"), "-o", "out", "--target-bits", "5")
    assert ended.code == 2
    assert "run `nvquant sweep` in one process first" in ended.stderr
