"""`nvquant distill` and `nvquant convert --distill`: their results, their documents and their refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nvquant.checkpoint.source import open_checkpoint
from nvquant.distill.run import distill
from nvquant.distill.training import RECORD_NAME
from nvquant.stream.manifest import MANIFEST_NAME
from support.commands import Command
from support.conversions import Conversions, TinyModels, contents, random_samples, write_ids
from support.distilling import distilled, options_of, write_text


@pytest.fixture(scope="module")
def checkpoint(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Conversions(tiny, tmp_path_factory.mktemp("conversions"))("llama")


def arguments(checkpoint: Path, source: Path, output: Path) -> list[object]:
    """Two steps, judged on the rows of the training."""
    rows = write_text(output.with_name("rows.jsonl"), 36, 12)
    words = ["distill", checkpoint, "--against", source, "-o", output, "--tokens", 2 * 8 * 512, "--calibration", rows]
    return [*words, "--text", rows, "--device", "cpu"]


def recorded(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text())["distillation"]
    return record


def test_the_command_writes_a_checkpoint_and_its_document(
    nvquant: Command, checkpoint: Path, tiny: TinyModels, tmp_path: Path
) -> None:
    command = arguments(checkpoint, tiny("llama"), tmp_path / "out")
    ended = nvquant(*command, "--json")
    assert ended.code == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert document["steps"] == 2
    assert recorded(tmp_path / "out").items() <= document.items()
    assert not document["was_finished"]
    again = nvquant(*command)
    assert again.code == 0
    assert "An equal run has already written this output. To rebuild it, use --restart." in again.stderr
    assert f"{tmp_path / 'out'}: {document['tokens']:,} tokens, " in again.stdout
    assert f"Next: nvquant verify {tmp_path / 'out'} --against {tiny('llama')}" in again.stderr
    assert nvquant("verify", tmp_path / "out", "--against", tiny("llama"), "--stage", "structure").code == 0
    assert nvquant(*command, "--restart", "--json").code == 0


def test_a_killed_run_resumes_and_gives_the_same_bytes(
    nvquant: Command, checkpoint: Path, tiny: TinyModels, tmp_path: Path
) -> None:
    rows = write_text(tmp_path / "rows.jsonl", 8 * 14, 12)
    command: list[object] = ["distill", checkpoint, "--against", tiny("llama"), "--tokens", 8 * 14 * 512, "--device"]
    command += ["cpu", "--calibration", rows, "--text", rows, "--json", "-o"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert nvquant(*command, whole).code == 0
    words = [sys.executable, "-m", "nvquant", *map(str, command), str(killed)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (tmp_path / "killed.partial" / "nvquant_run" / RECORD_NAME).exists():
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not killed.exists()
    assert nvquant(*command, killed).code == 0
    assert contents(killed) == contents(whole)
    assert not (tmp_path / "killed.partial").exists()


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"--against": None}, 2, "Missing option '--against'"),
        ({"--tokens": 0}, 2, "0 is not in the range x>=1"),
        ({"--tokens": 100}, 2, "100 tokens of distillation are fewer than one sequence of 512: give 409600"),
        ({"--tokens": 512 * 400}, 2, "rows.jsonl has only 36 samples of 512 tokens, not 400: use fewer tokens or a"),
        (
            {"--memory-budget": "1MB"},
            3,
            "GB of host memory, but 0.00 GB may be used: use a larger GPU",
        ),
        ({"--against": "no-such-folder"}, 2, "no-such-folder is not a folder: give the path of a model folder"),
    ],
)
def test_a_wrong_request_ends_in_one_sentence(
    nvquant: Command, checkpoint: Path, tiny: TinyModels, tmp_path: Path, changed: dict[str, Any], code: int, words: str
) -> None:
    given = arguments(checkpoint, tiny("llama"), tmp_path / "out")
    options = {str(key): value for key, value in zip(given[2::2], given[3::2], strict=True)} | changed
    kept = [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    ended = nvquant("distill", checkpoint, *kept)
    assert ended.code == code, ended.stderr
    assert words in ended.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_convert_distills_its_output_in_place_and_repeats_nothing(
    nvquant: Command, tiny: TinyModels, tmp_path: Path
) -> None:
    ids = write_ids(tmp_path / "ids.jsonl", random_samples())
    command = ["convert", tiny("llama"), "--recipe", "nvfp4-full", "--calibration", ids, "--samples", 6, "-o"]
    command += [tmp_path / "out", "--device", "cpu", "--distill", 2048]
    ended = nvquant(*command, "--json")
    assert ended.code == 0, ended.stderr
    document = json.loads(ended.stdout)["distillation"]
    assert (document["steps"], document["text"]["name"]) == (1, "offline")
    assert set(document["heldout"]) == {"technical", "prose", "code", "dialogue", "language", "mathematics"}
    assert recorded(tmp_path / "out").items() <= document.items()
    before = contents(tmp_path / "out")
    again = nvquant(*command)
    assert again.code == 0
    assert "Distilled with 2,048 tokens, " in again.stderr
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.jsonl", "out"]


def test_a_distilled_output_is_not_taken_for_one_without_distillation(
    nvquant: Command, tiny: TinyModels, tmp_path: Path
) -> None:
    ids = write_ids(tmp_path / "ids.jsonl", random_samples())
    command = ["convert", tiny("llama"), "--recipe", "nvfp4-full", "--calibration", ids, "--samples", 6, "-o"]
    command += [tmp_path / "out", "--device", "cpu", "--quantizer", "rtn"]
    assert nvquant(*command).code == 0
    aside = distilled(tmp_path / "out", tiny("llama"), tmp_path / "aside").record
    options = replace(options_of(tmp_path / "out"), is_in_place=True)
    assert distill(tmp_path / "out", open_checkpoint(tiny("llama")), options).record.scales == aside.scales
    shards = {name: digest for name, digest in contents(tmp_path / "out").items() if name.endswith(".safetensors")}
    assert shards.items() <= contents(tmp_path / "aside").items()
    ended = nvquant(*command)
    assert ended.code == 2
    assert "contains the finished checkpoint of a run with --distill: repeat the option" in ended.stderr
    assert nvquant(*command, "--distill", 2048).code == 2  # another distillation
    assert nvquant(*command, "--restart").code == 0
    assert "distillation" not in json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--engine", "llmcompressor"], "--engine llmcompressor and a distillation exclude each other"),
        (["--memory-budget", "1MB"], " GB of host memory, but 0.00 GB may be used"),
        (["--distill", "100"], "100 tokens of distillation are fewer than one sequence of 512"),
    ],
)
def test_convert_refuses_an_impossible_distillation_before_any_work(
    nvquant: Command, tiny: TinyModels, tmp_path: Path, more: list[str], words: str
) -> None:
    command = ["convert", tiny("llama"), "--recipe", "nvfp4-a16", "-o", tmp_path / "out", "--device", "cpu"]
    ended = nvquant(*command, "--distill", 4096, *more)
    assert ended.code in (2, 3)
    assert words in ended.stderr
    assert list(tmp_path.iterdir()) == []
