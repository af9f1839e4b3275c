"""`nvquant convert`: options reach the run, the result goes to stdout and words about it to stderr."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from nvquant.checkpoint.hub import patience
from nvquant.checkpoint.source import open_checkpoint
from safetensors.torch import load_file, save_file
from support.commands import Command
from support.conversions import TinyModels, contents, planned, tensors_in
from support.hub_faults import Hangup
from support.hub_http import Request
from support.hub_models import hub_for_this_process
from support.tiny_models import tiny_llama

RUN = ("--device", "cpu", "--quantizer", "rtn", "--samples", "6", "--sequence-length", "40")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def manifest(folder: Path) -> dict[str, object]:
    return json.loads((folder / "nvquant_manifest.json").read_text())


def test_json_puts_one_document_on_stdout_and_all_else_on_stderr(nvquant: Command, tiny: TinyModels, ids: Path) -> None:
    ended = nvquant("convert", tiny("gemma4"), "-o", "out", "--calibration", ids, *RUN, "--json")
    assert ended.code == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert set(document) == {
        "output", "tensors", "tensor_bytes", "quantized", "seconds", "peak_host_bytes", "peak_gpu_bytes",
        "calibration", "marlin_flushed_blocks", "layers_resumed", "was_finished", "error_feedback", "casts",
        "distillation", "phases",
    }  # fmt: skip
    plan = planned(tiny("gemma4"), "nvfp4")
    assert (document["output"], document["tensors"], document["tensor_bytes"], document["quantized"]) == (
        "out", plan.tensors, plan.tensor_bytes, 18,
    )  # fmt: skip
    assert document["calibration"]["tokens"] == 144
    assert document["seconds"] > 0
    assert document["peak_host_bytes"] > 100_000_000
    assert "recipe nvfp4, rtn, compressed-tensors, cpu" in ended.stderr
    assert "6 samples, 144 tokens, ids" in ended.stderr


def test_without_json_stdout_is_one_line_that_says_what_came_out(nvquant: Command, tiny: TinyModels) -> None:
    ended = nvquant("convert", tiny("llama"), "-o", "out", "--recipe", "nvfp4-a16", "--device", "cpu")
    assert ended.code == 0, ended.stderr
    assert ended.stdout.startswith("out: 71 tensors, 0.1 MB, 21 matrices quantized in ")
    assert ended.stdout.count("\n") == 1
    assert "Next: nvquant verify out --against" in ended.stderr


def test_libraries_write_nothing_on_the_users_screen(nvquant: Command, tiny: TinyModels, ids: Path) -> None:
    ended = nvquant("convert", tiny("gemma4"), "-o", "out", "--calibration", ids, *RUN)
    ours = r"nvquant |calibration |Next: |The compiled CPU kernels are not|\d\d:\d\d:\d\d convert (layer=\d/6 )?phase="
    assert [line for line in ended.stderr.splitlines() if not re.match(ours, line)] == []


def test_the_output_is_named_after_model_and_recipe_by_default(
    nvquant: Command, tiny: TinyModels, tmp_path: Path
) -> None:
    assert nvquant("convert", tiny("llama"), "--recipe", "nvfp4-a16", "--device", "cpu").code == 0
    assert (tmp_path / "llama-nvfp4-a16" / "nvquant_manifest.json").exists()


def test_a_final_slash_changes_nothing(nvquant: Command, tiny: TinyModels, tmp_path: Path) -> None:
    for at, model in enumerate((tiny("llama"), f"{tiny('llama')}/")):
        assert nvquant("convert", model, "-o", f"{at}/", "--recipe", "nvfp4-a16", "--device", "cpu").code == 0
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (("--quantizer", "mse"), "quantizer", "mse"),
        (("--format", "modelopt"), "format", "modelopt"),
        (("--format", "compressed-tensors"), "format", "compressed-tensors"),
    ],
)
def test_options_reach_the_run(
    nvquant: Command, tiny: TinyModels, tmp_path: Path, options: tuple[str, ...], key: str, value: str
) -> None:
    command = ("convert", tiny("llama"), "-o", "out", "--recipe", "nvfp4-a16", "--device", "cpu")
    assert nvquant(*command, *options).code == 0
    assert manifest(tmp_path / "out")[key] == value


def test_the_sizes_of_calibration_reach_the_run(nvquant: Command, tiny: TinyModels, ids: Path, tmp_path: Path) -> None:
    sizes = ("--samples", 3, "--sequence-length", 20, "--batch-size", 2, "--seed", 7)
    ended = nvquant("convert", tiny("llama"), "-o", "out", "--calibration", ids, "--device", "cpu", *sizes)
    assert ended.code == 0, ended.stderr
    assert manifest(tmp_path / "out")["calibration"]["tokens"] == 20 + 20 + 7
    assert manifest(tmp_path / "out")["run"]["batch_size"] == 2


def test_the_models_own_tokenizer_reads_a_text(nvquant: Command, tiny: TinyModels, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Numbers are rounded to the nearest of eight values. " * 200)
    text = ("--calibration", "text.txt", "--samples", 3, "--sequence-length", 24)
    ended = nvquant("convert", tiny("gemma4"), "-o", "out", "--device", "cpu", "--quantizer", "rtn", *text)
    assert ended.code == 0, ended.stderr
    assert manifest(tmp_path / "out")["calibration"]["framing"] == "chat"


def test_a_recipe_of_ones_own_is_given_by_its_path(
    nvquant: Command, tiny: TinyModels, ids: Path, tmp_path: Path
) -> None:
    recipe = "name: own\nquantize:\n  - modules: [attention]\n    scheme: nvfp4\nquantizer: rtn\nexperts: bf16\n"
    (tmp_path / "own.yaml").write_text(recipe)
    ended = nvquant("convert", tiny("gemma4_moe"), "--recipe", "own.yaml", "--calibration", ids, *RUN)
    assert ended.code == 0, ended.stderr
    written = tensors_in(tmp_path / "gemma4_moe-own")
    assert "model.language_model.layers.0.self_attn.q_proj.weight_packed" in written
    assert "model.language_model.layers.0.mlp.up_proj.weight" in written
    assert "model.language_model.layers.0.experts.down_proj" in written


def test_an_earlier_output_is_replaced_only_where_it_is_asked_for(
    nvquant: Command, tiny: TinyModels, tmp_path: Path
) -> None:
    command = ("convert", tiny("llama"), "-o", "out", "--recipe", "nvfp4-a16", "--device", "cpu")
    assert nvquant(*command, "--format", "modelopt").code == 0
    refused = nvquant(*command)
    assert refused.code == 2
    assert "(format is modelopt there, compressed-tensors here)" in refused.stderr
    assert manifest(tmp_path / "out")["format"] == "modelopt"
    assert nvquant(*command, "--restart").code == 0
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert manifest(tmp_path / "out")["format"] == "compressed-tensors"


def test_blocks_that_marlin_would_lose_are_said(nvquant: Command, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", shards=1)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 30000.0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    command = ("convert", source, "-o", "out", "--recipe", "nvfp4-a16", "--device", "cpu", "--quantizer", "rtn")
    ended = nvquant(*command, "--json")
    flushed = json.loads(ended.stdout)["marlin_flushed_blocks"]
    assert flushed > 100
    assert f"{flushed:,} blocks become zeros in Marlin" in ended.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_without_a_gpu_is_a_lack_of_the_environment(nvquant: Command, tiny: TinyModels, tmp_path: Path) -> None:
    ended = nvquant("convert", tiny("llama"), "--device", "cuda")
    assert ended.code == 3
    assert ended.stderr.startswith(f"Error: --device cuda: torch {torch.__version__} sees no CUDA device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [0, 2])
def test_debug_shows_the_traceback_wherever_it_stands(nvquant: Command, tmp_path: Path, place: int) -> None:
    command = ["convert", "missing"]
    command.insert(place, "--debug")
    ended = nvquant(*command)
    assert ended.code == 2
    assert "Traceback (most recent call last)" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("Error: ")


def test_a_source_that_only_may_be_read_is_enough(
    nvquant: Command, tiny: TinyModels, ids: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny("gemma4"), tmp_path / "source")
    before = contents(source)
    assert nvquant("convert", source, "-o", "out", "--calibration", ids, *RUN).code == 0
    assert contents(source) == before


def test_an_equal_run_finds_its_output_whole(nvquant: Command, tiny: TinyModels, tmp_path: Path) -> None:
    command = ("convert", tiny("llama"), "-o", "out", "--recipe", "nvfp4-a16", "--device", "cpu", "--json")
    assert not json.loads(nvquant(*command).stdout)["was_finished"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = nvquant(*command)
    assert again.code == 0, again.stderr
    assert json.loads(again.stdout)["was_finished"]
    assert "An equal run has already written this output." in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_profile_says_where_the_time_went(nvquant: Command, tiny: TinyModels, ids: Path, tmp_path: Path) -> None:
    ended = nvquant("convert", tiny("llama"), "-o", "out", "--calibration", ids, *RUN, "--profile", "deep/profile")
    assert ended.code == 0, ended.stderr
    phases = json.loads((tmp_path / "deep/profile/phases.json").read_text())
    assert {"read", "forward", "quantize", "write", "copy"} <= set(phases["phases"])
    own = sum(row["seconds"] for row in phases["main_thread"].values())
    assert own == pytest.approx(phases["seconds"], rel=1e-3)
    events = json.loads((tmp_path / "deep/profile/trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" and event["cat"] == "forward" for event in events) == 3
    assert "forward" in (tmp_path / "deep/profile/phases.txt").read_text()
    assert "for ui.perfetto.dev" in ended.stderr


def test_a_profile_that_cannot_be_written_is_refused_before_work(
    nvquant: Command, tiny: TinyModels, ids: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("text")
    ended = nvquant("convert", tiny("llama"), "-o", "out", "--calibration", ids, *RUN, "--profile", "file/profile")
    assert ended.code == 2
    assert "file/profile cannot be written (Not a directory): name another folder with --profile." in ended.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_small_memory_budget_changes_no_byte(nvquant: Command, tiny: TinyModels, ids: Path, tmp_path: Path) -> None:
    for name, budget in (("0", ()), ("1", ("--memory-budget", "1MB"))):
        ended = nvquant("convert", tiny("gemma4"), "-o", name, "--calibration", ids, *RUN, *budget)
        assert ended.code == 0, ended.stderr
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


def test_another_calibration_set_is_taken_only_when_asked_for(
    nvquant: Command, tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("llama")
    size = ("--samples", 2, "--sequence-length", 16, "--device", "cpu")
    with hub_for_this_process(monkeypatch, tmp_path / "cache"):
        wanted = ("convert", source, "-o", "out", "--calibration", "org/none", *size)
        refused = nvquant(*wanted)
        assert refused.code == 2
        assert "Hub data set org/none does not exist or is private" in refused.stderr
        ended = nvquant(*wanted, "--calibration-fallback", "offline")
        assert ended.code == 0, ended.stderr
        assert "Calibrating with the --calibration-fallback offline." in ended.stderr
        assert manifest(tmp_path / "out")["calibration"]["name"] == "offline"


def test_a_run_goes_on_at_the_commit_at_which_it_began_though_the_branch_moved(
    nvquant: Command, tiny: TinyModels, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "MOST_FAILURES", 1)
    with hub_for_this_process(monkeypatch, tmp_path / "cache") as hub:
        began = hub.add("model", "org/llama", tiny("llama"))
        wanted = ("convert", "org/llama", "-o", "out", "--calibration", ids, *RUN, "--low-disk")
        last = open_checkpoint(tiny("llama")).info("model.layers.2.mlp.up_proj.weight")

        def end_the_network(request: Request) -> None:
            if f"bytes={last.begin}-" in (request.headers.get("Range") or ""):
                hub.fail("*/resolve/*", Hangup(), times=1000)

        hub.on_request = end_the_network
        assert nvquant(*wanted).code == 2
        assert (tmp_path / "out.partial").is_dir()
        hub.on_request = None
        hub.recover()
        hub.add("model", "org/llama", {**{path.name: path for path in tiny("llama").iterdir()}, "NOTICE": b"new"})
        ended = nvquant(*wanted)
        assert ended.code == 0, ended.stderr
        assert f"The run resumes at its first commit {began[:12]}." in ended.stderr
        written = json.loads((tmp_path / "out" / "nvquant_manifest.json").read_text())
        assert written["source"]["hub"]["commit"] == began


def test_a_plan_of_a_model_on_the_hub_names_its_commit_and_fetches_no_weight(
    nvquant: Command, tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_for_this_process(monkeypatch, tmp_path / "cache") as hub:
        commit = hub.add("model", "Org/Llama", tiny("llama"), tags=("v1",))
        hub.add("model", "Org/Llama", {"config.json": b"{}"})
        ended = nvquant("plan", "org/llama", "--revision", "v1", "--recipe", "nvfp4-full")
        assert ended.code == 0, ended.stderr
        assert ended.stdout.startswith("Org/Llama, recipe nvfp4-full,")
        assert f"Org/Llama at {commit[:12]}\n" in ended.stderr
        assert json.loads(nvquant("plan", "org/llama@v1", "--json").stdout)["commit"] == commit
        shards = [path.name for path in tiny("llama").glob("*.safetensors")]
        assert all(hub.bytes_sent_of("Org/Llama", name) < 5000 for name in shards)
        twice = nvquant("plan", "org/llama@v1", "--revision", "main")
        assert twice.code == 2
        assert "org/llama@v1 names the revision v1, and --revision names main. Give one of them." in twice.stderr
        local = nvquant("plan", tiny("llama"), "--revision", "v1")
        assert local.code == 2
        assert "only a model on the Hub has revisions" in local.stderr
        folder = nvquant("convert", tiny("llama"), "--low-disk", *RUN)
        assert folder.code == 2
        assert "--low-disk works only for models on the Hub" in folder.stderr
