"""`nvquant plan --context`: the table, its notes, the JSON document, and the requests that are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from nvquant.recipe.load import shipped_recipes
from support.commands import Command
from support.conversions import TinyModels
from support.synthetic_gemma4 import write_synthetic_gemma4
from support.tiny_hybrids import tiny_experts

LOAD = ("--context", 65536, "--kv-cache", "fp8")
NAMES = ["BF16", *shipped_recipes()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_gemma4(tmp_path_factory.mktemp("models") / "gemma-4-31b")


def table_of(text: str) -> dict[str, list[str]]:
    """The cells of the table by the row's name, and the GPUs of the head."""
    part = text.partition("\nServing ")[2].partition(":\n")[2].strip("\n").partition("\n\n")[0]
    first, second, *rows = part.splitlines()
    if not second.startswith("recipe"):  # without GPUs the head has one line
        first, rows = "", [second, *rows]
    cells = {name: cells for name, *cells in (re.split(r" {2,}", row.strip()) for row in rows)}
    return {"GPU": re.split(r" {2,}", first.strip()), **cells}


def serving_of(nvquant: Command, *arguments: object) -> dict[str, Any]:
    ended = nvquant("plan", *arguments, "--json")
    assert ended.code == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)["serving"]
    return found


def test_the_table_of_the_31b_shows_the_recipe_for_each_size_of_card(nvquant: Command, model: Path) -> None:
    ended = nvquant("plan", model, *LOAD)
    assert ended.code == 0, ended.stderr
    assert "Serving 1 user with 65,536 tokens of context and a KV cache in FP8:" in ended.stdout
    assert "Serving 8192 tokens" not in ended.stdout
    assert "180 matrices quantized" in ended.stdout
    table = table_of(ended.stdout)
    assert table["GPU"] == ["RTX 5060 Ti", "RTX 4090", "RTX 5090", "L40S", "RTX PRO 6000", "H200"]
    assert list(table)[1:] == NAMES
    assert table["BF16"] == ["62.55 GB", "3.10 GB", "67.15 GB", "-", "-", "-", "-", "28", "74"]
    assert table["nvfp4"] == ["32.63 GB", "3.10 GB", "37.24 GB", "-", "-", "-", "25", "52", "139"]
    assert table["nvfp4-full"] == ["20.45 GB", "3.10 GB", "25.05 GB", "-", "*45", "80", "39", "80", "214"]
    assert "Weights include vision and audio (1.15 GB), which vLLM does not load with --language-model-only." in (
        ended.stdout
    )
    assert "Total adds 1.50 GB for all else." in ended.stdout
    assert (
        "A star marks a row that fits only if --gpu-memory-utilization is above vLLM's default of 0.92." in ended.stdout
    )


def test_with_several_users_a_cell_has_both_rates(nvquant: Command, model: Path) -> None:
    ended = nvquant("plan", model, *LOAD, "--users", 8, "--on", "RTX PRO 6000")
    table = table_of(ended.stdout)
    assert "Serving 8 users, each with 65,536 tokens" in ended.stdout
    assert "for one user alone / for all 8 together" in ended.stdout
    assert table["GPU"] == ["RTX PRO 6000"], "only the machine's own column"
    assert table["nvfp4"] == ["32.63 GB", "24.83 GB", "58.96 GB", "52 / 255"]
    assert "Forecast on 1 x RTX PRO 6000" in ended.stdout


def test_the_document_has_the_numbers_of_the_table(nvquant: Command, model: Path) -> None:
    found = serving_of(nvquant, model, *LOAD, "--users", 8)
    assert (found["context"], found["users"], found["kv_cache"]) == (65536, 8, "fp8")
    assert [row["name"] for row in found["rows"]] == NAMES
    row = found["rows"][1 + shipped_recipes().index("nvfp4")]
    assert row["total_bytes"] == 32_633_255_032 + 8 * 3_103_784_960 + found["overhead_bytes"]
    card = next(gpu for gpu in row["gpus"] if gpu["gpu"] == "RTX PRO 6000")
    assert (round(card["tokens_per_second_alone"]), round(card["tokens_per_second"])) == (52, 255)


def test_on_a_cpu_there_is_memory_and_no_ceiling(nvquant: Command, tiny: TinyModels) -> None:
    ended = nvquant("plan", tiny("llama"), "--context", 64, "--on", "cpu")
    assert ended.code == 0, ended.stderr
    assert [len(cells) for cells in table_of(ended.stdout).values()][1:] == [3] * len(NAMES)
    assert "memory bandwidth" not in ended.stdout
    assert "vision" not in ended.stdout, "this model has none"


def test_without_a_context_nothing_changes(nvquant: Command, tiny: TinyModels) -> None:
    assert "Serving 8192 tokens of context needs" in nvquant("plan", tiny("llama")).stdout
    assert "serving" not in json.loads(nvquant("plan", tiny("llama"), "--json").stdout)


def test_a_recipe_of_one_s_own_is_a_further_row(nvquant: Command, tiny: TinyModels, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nquantize:\n  - modules: [attention]\n    scheme: nvfp4-a16\n")
    ended = nvquant("plan", tiny("llama"), "--context", 64, "--recipe", recipe)
    assert list(table_of(ended.stdout))[1:] == [*NAMES, "mine"]


def test_recipes_that_do_not_fit_the_model_are_rows_with_the_reason(nvquant: Command, tmp_path: Path) -> None:
    experts = tiny_experts(tmp_path / "model", "qwen3")
    ended = nvquant("plan", experts, "--context", 64)
    assert ended.code == 0, ended.stderr
    assert re.search(r"^BF16 +0\.\d MB ", ended.stdout, re.MULTILINE)
    for name in shipped_recipes():
        assert re.search(rf"^{name} +\S+ is a mixture of experts \(.+: write a recipe", ended.stdout, re.MULTILINE)
    document = json.loads(nvquant("plan", experts, "--context", 64, "--json").stdout)
    assert list(document) == ["model", "commit", "serving"]
    assert ["mixture of experts" in (row["refused"] or "") for row in document["serving"]["rows"]] == [
        *(False, *(True for _ in shipped_recipes()))
    ]


def test_a_recipe_that_the_user_requests_and_that_does_not_fit_is_an_error(nvquant: Command, tmp_path: Path) -> None:
    experts = tiny_experts(tmp_path / "model", "qwen3")
    ended = nvquant("plan", experts, "--context", 64, "--recipe", "nvfp4")
    assert ended.code == 2
    assert "is a mixture of experts" in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--users", 8),
            "--users affects only the comparison of recipes for a context. Give the context with --context.",
        ),
        (("--kv-cache", "fp8"), "--kv-cache affects only the comparison of recipes for a context."),
        (("--context", 10**7), "--context 10000000: the model supports 256 tokens: use --context 256."),
        (("--context", 0), "Invalid value for '--context': 0 is not in the range x>=1."),
        (("--context", "64K"), "Invalid value for '--context': '64K' is not a valid integer range."),
        (("--context", 64, "--users", 0), "Invalid value for '--users'"),
        (("--context", 64, "--kv-cache", "int4"), "'int4' is not one of 'bf16', 'fp8'."),
        (("--context", 64, "--disk", "ram"), "--disk affects only the forecast of a machine."),
    ],
)
def test_requests_without_sense_are_refused_in_a_sentence(
    nvquant: Command, tiny: TinyModels, options: tuple[object, ...], sentence: str
) -> None:
    ended = nvquant("plan", tiny("llama"), *options)
    assert ended.code == 2
    assert sentence in " ".join(ended.stderr.split())
    assert len(re.findall(r"^Error: ", ended.stderr, re.MULTILINE)) == 1
    assert ended.stdout == ""
