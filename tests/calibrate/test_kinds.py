"""Samples of kinds of text in their shares, for calibration by a spec and for evaluation in equal numbers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from nvquant.calibrate.kinds import KindStreams, draw_by_kind, kinds_in
from nvquant.calibrate.samples import CalibrationSet, load_calibration
from nvquant.calibrate.text import Document
from nvquant.errors import InputError
from support.tiny_tokenizer import special_ids, write_tiny_tokenizer

VOCABULARY = 512
WORDS = {"code": "return", "prose": "Whale", "poem": "rose"}
BUNDLED = {"technical": 2, "prose": 1, "code": 1, "dialogue": 1, "language": 1, "mathematics": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_tokenizer(folder / "chat", "gemma4", vocab_size=VOCABULARY)
    write_tiny_tokenizer(folder / "base", "gemma4", vocab_size=VOCABULARY, base=True)
    return folder


def write_text(path: Path, **documents: int) -> Path:
    """A table of documents that repeat the word of their kind."""
    rows = [
        {"kind": kind, "text": f"{WORDS[kind]} {at}.\n\n" + f"{WORDS[kind]} " * 300}
        for kind, count in documents.items()
        for at in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(name: Path | str, model: Path, samples: int, length: int = 64, **more: Any) -> CalibrationSet:
    config = {"vocab_size": VOCABULARY}
    return load_calibration(
        str(name), model_folder=model, config=config, samples=samples, sequence_length=length, seed=0, **more
    )


def words_in(found: CalibrationSet, model: Path) -> list[set[str]]:
    """The kinds whose words each sample contains."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.decode(ids) for ids in found.samples]
    return [{kind for kind, word in WORDS.items() if word in text} for text in texts]


@pytest.mark.parametrize("model", ["chat", "base"])
def test_each_sample_has_one_kind_and_one_bos(models: Path, tmp_path: Path, model: str) -> None:
    path = write_text(tmp_path / "text.jsonl", code=9, prose=3, poem=3)
    found = load(path, models / model, 9, in_equal_kinds=True)
    assert Counter(found.kinds) == {"code": 3, "prose": 3, "poem": 3}
    assert words_in(found, models / model) == [{kind} for kind in found.kinds]
    bos = special_ids("gemma4")["<bos>"]
    assert all(int(ids[0]) == bos and int((ids == bos).sum()) == 1 for ids in found.samples)


@pytest.mark.parametrize("model", ["chat", "base"])
def test_the_bundled_set_has_two_shares_of_technical_prose(models: Path, model: str) -> None:
    found = load("offline", models / model, 28, 96)
    tokens: Counter[str] = Counter()
    for kind, ids in zip(found.kinds, found.samples, strict=True):
        tokens[kind] += len(ids)
    assert tokens == {kind: weight * 4 * 96 for kind, weight in BUNDLED.items()}


@pytest.mark.parametrize("model", ["chat", "base"])
def test_the_first_samples_do_not_depend_on_their_number(models: Path, model: str) -> None:
    few, many = load("offline", models / model, 9), load("offline", models / model, 30)
    assert few.kinds == many.kinds[:9]
    assert all(a.equal(b) for a, b in zip(few.samples, many.samples[:9], strict=True))
    assert few.sha256 == load("offline", models / model, 9).sha256


def test_chats_of_each_kind_think_by_turns(models: Path) -> None:
    found = load("offline", models / "chat", 28)
    think = special_ids("gemma4")["<|think|>"]
    thinking = Counter(kind for kind, ids in zip(found.kinds, found.samples, strict=True) if think in ids)
    assert thinking == {kind: weight * 2 for kind, weight in BUNDLED.items()}


def write_spec(path: Path, **kinds: float) -> Path:
    spec = yaml.safe_load((Path(__file__).parents[2] / "calibration" / "offline.yaml").read_text())
    path.write_text(yaml.safe_dump(spec | {"kinds": kinds}, sort_keys=False))
    return path


def test_a_spec_of_ones_own_weighs_kinds(models: Path, tmp_path: Path) -> None:
    found = load(write_spec(tmp_path / "mine.yaml", mathematics=3, code=0.5), models / "base", 14)
    assert Counter(found.kinds) == {"mathematics": 12, "code": 2}


def test_a_kind_that_the_text_does_not_have_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"offline has no text of the kind poetry \(it has code, .*technical\)") as no:
        load(write_spec(tmp_path / "mine.yaml", poetry=1, code=1), models / "base", 4)
    assert no.value.hint


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan"), "much"])
def test_a_weight_that_is_no_share_is_refused(models: Path, tmp_path: Path, weight: Any) -> None:
    with pytest.raises(InputError, match=r"kinds\.code"):
        load(write_spec(tmp_path / "mine.yaml", code=weight), models / "base", 4)


def test_a_kind_that_runs_dry_leaves_the_others(models: Path, tmp_path: Path) -> None:
    path = write_text(tmp_path / "text.jsonl", code=1, prose=20)
    found = load(path, models / "base", 40, 200, in_equal_kinds=True)
    counts = Counter(found.kinds)
    assert 0 < counts["code"] < 10 and counts["prose"] == 40 - counts["code"]


def test_every_kind_is_found_wherever_it_stands(tmp_path: Path) -> None:
    assert kinds_in(write_text(tmp_path / "text.jsonl", prose=40, code=1)) == ("code", "prose")
    (tmp_path / "none.jsonl").write_text(json.dumps({"text": "No kind."}) + "\n")
    assert kinds_in(tmp_path / "none.jsonl") == ()


def test_more_kinds_than_samples_leave_some_out(models: Path, tmp_path: Path) -> None:
    path = write_text(tmp_path / "text.jsonl", code=2, prose=2, poem=2)
    assert load(path, models / "base", 2, in_equal_kinds=True).kinds == ("code", "poem")


def test_a_text_without_kinds_is_measured_as_it_comes(models: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"Text {at}. " * 60}) for at in range(9)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    plain, asked = (load(tmp_path / "text.jsonl", models / "base", 6, in_equal_kinds=asks) for asks in (False, True))
    assert plain.sha256 == asked.sha256 and asked.kinds == ()


def test_calibration_takes_the_documents_of_a_users_file_as_they_come(models: Path, tmp_path: Path) -> None:
    path = write_text(tmp_path / "text.jsonl", code=12, prose=1)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    for model in ("chat", "base"):
        found = load(path, models / model, 8)
        assert found.sha256 == load(tmp_path / "plain.jsonl", models / model, 8).sha256 and found.kinds == ()


def test_rows_of_token_ids_keep_their_order_and_their_kinds(models: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "kind": kind} for kind in ("b", "b", "a")]
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(path, models / "base", 3, in_equal_kinds=True).kinds == ("b", "b", "a")
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"input_ids": [5, 6]}]))
    assert load(path, models / "base", 4, in_equal_kinds=True).kinds == ()


def test_the_next_sample_is_of_the_kind_with_the_fewest_tokens_for_its_weight() -> None:
    def stream(length: int) -> Iterator[list[int]]:
        while True:
            yield [0] * length

    drawn = draw_by_kind({"short": stream(1), "long": stream(3)}, {"short": 1.0, "long": 3.0})
    kinds = [next(drawn)[0] for _ in range(8)]
    assert kinds == ["short", "long"] * 4


def test_documents_of_other_kinds_wait_for_their_turn() -> None:
    documents = [Document(kind, f"{kind}{at}") for at, kind in enumerate("abaabc")]
    streams = KindStreams(iter(documents), {"a": 1.0, "b": 1.0}, "text")
    a, b = streams.of("a"), streams.of("b")
    assert next(b).text == "b1"
    assert [document.text for document in a] == ["a0", "a2", "a3"]
    assert [document.text for document in b] == ["b4"]
