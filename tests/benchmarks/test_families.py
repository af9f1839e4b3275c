"""The families sweep: a sample of classes of many kinds, and its page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# One class of each kind: plain, transposed, renamed shared experts, stacked and transposed experts beside a tower,
# Mamba and attention in one list, layers that hand on more than a hidden state, a list below the decoder,
# a composite model that requires an image for its own forward.
SAMPLE = {
    "LlamaForCausalLM": "whole",
    "GPT2LMHeadModel": "refused",
    "HYV3ForCausalLM": "partly",
    "Qwen3VLMoeForConditionalGeneration": "partly",
    "NemotronHForCausalLM": "partly",
    "GlmMoeDsaForCausalLM": "partly",
    "OPTForCausalLM": "whole",
    "Kosmos2ForConditionalGeneration": "whole",
    "BertLMHeadModel": "whole",
}


@pytest.fixture(scope="module", autouse=True)
def importable() -> Any:
    """The programs of the benchmarks import each other as neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = tmp_path_factory.mktemp("families") / "rows.json"
    sweep(rows, *SAMPLE)
    return rows


def sweep(rows: Path, *classes: str, limit: float = 120) -> None:
    command = [sys.executable, str(BENCHMARKS / "families.py"), "--rows", str(rows), "--limit", str(limit)]
    done = subprocess.run([*command, "--only", *classes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_sample_of_classes_ends_as_the_page_states(swept: Path) -> None:
    found = {row["name"]: (row["outcome"], row["reason"]) for row in json.loads(swept.read_text())["rows"]}
    assert {name: outcome for name, (outcome, _) in found.items()} == SAMPLE, found
    kept = {row["name"]: row["outcome"] for row in json.loads((BENCHMARKS / "families.json").read_text())["rows"]}
    assert {name: kept[name] for name in SAMPLE} == SAMPLE


def test_the_kept_rows_cover_every_class_of_the_installed_transformers_without_a_traceback() -> None:
    import transformers
    from families import class_names

    document = json.loads((BENCHMARKS / "families.json").read_text())
    if transformers.__version__ != document["transformers"]:
        pytest.skip(f"the rows are of transformers {document['transformers']}")
    assert [row["name"] for row in document["rows"]] == class_names()
    assert [row["name"] for row in document["rows"] if row["outcome"] in ("traceback", "ended")] == []


def test_a_class_that_runs_into_the_limit_is_a_row(tmp_path: Path) -> None:
    sweep(tmp_path / "rows.json", "LlamaForCausalLM", limit=0.01)
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (row["outcome"], row["reason"]) == ("ended", "the time limit")


def test_the_page_is_made_of_the_rows() -> None:
    from families_page import page

    document = json.loads((BENCHMARKS / "families.json").read_text())
    written = (BENCHMARKS.parent / "docs" / "families.md").read_text(encoding="utf-8")
    assert page(document["rows"], document["transformers"]) == written


@pytest.mark.slow
@pytest.mark.thorough
def test_the_whole_sweep_gives_the_kept_rows(tmp_path: Path) -> None:
    from families import class_names

    sweep(tmp_path / "rows.json", *class_names())
    assert (tmp_path / "rows.json").read_text() == (BENCHMARKS / "families.json").read_text()
