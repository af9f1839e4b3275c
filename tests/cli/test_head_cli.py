"""The key `head` of a recipe on the command line: its cost in `plan`, and its refusals by both commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import Command
from support.conversions import TinyModels, edit_config
from support.tiny_models import tiny_llama

BF16, NVFP4 = 2 * 512 * 64, 512 * 64 * 9 // 16 + 4


def recipe_file(folder: Path, **keys: Any) -> Path:
    path = folder / "mine.yaml"
    lines = {"name": "mine", "quantize": [{"modules": ["mlp"], "scheme": "nvfp4-a16"}], **keys}
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()))
    return path


def test_plan_prints_the_cost_and_has_it_in_its_document(nvquant: Command, tiny: TinyModels, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, head="nvfp4")
    ended = nvquant("plan", tiny("llama"), "--recipe", recipe, "--format", "modelopt")
    assert ended.code == 0
    assert "The head in nvfp4-a16 takes 0.0 MB more in the files" in ended.stdout
    document = json.loads(nvquant("plan", tiny("llama"), "--recipe", recipe, "--json").stdout)
    assert document["head"] == {
        "scheme": "nvfp4-a16", "was_tied": True, "file_bytes": NVFP4, "memory_bytes": NVFP4,
        "token_bytes": NVFP4 - BF16,
    }  # fmt: skip
    assert json.loads(nvquant("plan", tiny("llama"), "--json").stdout)["head"] is None


@pytest.mark.parametrize("command", ["plan", "convert"])
@pytest.mark.parametrize(
    ("keys", "changes", "words"),
    [
        ({"head": "int8"}, {}, "mine.yaml:3: key 'head': input should be 'bf16', 'fp8' or 'nvfp4'"),
        (
            {"head": "fp8"},
            {"tie_word_embeddings": False},
            "model has no output head (it stores none, and config.json ties none to the embedding)",
        ),
        (
            {"head": "fp8"},
            {"architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification has no output head that is a linear layer): remove the key `head`.",
        ),
        (
            {"quantize": [{"modules": ["lm_head"], "scheme": "fp8"}]},
            {},
            ": to quantize the head, use the key `head`.",
        ),
    ],
)
def test_bad_heads_end_both_commands_with_one_sentence(
    nvquant: Command, tmp_path: Path, command: str, keys: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    model = edit_config(tiny_llama(tmp_path / "model"), **changes)
    output = ("-o", tmp_path / "out", "--device", "cpu") if command == "convert" else ()
    ended = nvquant(command, model, "--recipe", recipe_file(tmp_path, **keys), *output)
    assert ended.code == 2
    assert words in " ".join(ended.stderr.split())
