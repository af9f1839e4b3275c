"""The text on which is measured: held-out, or of one's own, framed as the model wants it."""

from __future__ import annotations

import json
import lzma
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from nvquant.calibrate.specs import shipped_folder
from nvquant.checkpoint.source import read_json
from nvquant.errors import InputError
from nvquant.verify.numerics.stage import NumericsOptions
from nvquant.verify.numerics.text import HELDOUT, load_text, reference_ids
from support.conversions import random_samples, write_ids
from support.tiny_models import tiny_gemma4_text, tiny_llama
from support.tiny_tokenizer import special_ids, stdlib_text

BOS, END = special_ids("gemma4")["<bos>"], special_ids("gemma4")["<turn|>"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base", base=True)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gemma4_text(tmp_path_factory.mktemp("models") / "chat", wider=False)


def load(text: Path | None, model: Path, samples: int = 3, length: int = 50) -> Any:
    return load_text(text, model, read_json(model / "config.json", ""), samples, length)


def write_chats(path: Path, count: int = 8) -> Path:
    words = stdlib_text().split()
    rows = [
        {"messages": [
            {"role": "user", "content": " ".join(words[100 * i : 100 * i + 30])},
            {"role": "assistant", "content": " ".join(words[100 * i + 30 : 100 * i + 90])},
        ]}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_base_model_gets_prose_behind_one_bos(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "prose.txt"
    path.write_text(stdlib_text()[:20_000])
    found = load(path, base)
    assert (found.name, found.framing) == ("prose.txt", "prose")
    bos = special_ids("llama")["<s>"]
    for ids in found.samples:
        assert len(ids) == 50
        assert int(ids[0]) == bos and int((ids == bos).sum()) == 1


def test_a_chat_model_gets_conversations_in_its_own_template(chat: Path, tmp_path: Path) -> None:
    found = load(write_chats(tmp_path / "chats.jsonl"), chat, length=400)
    assert found.framing == "chat"
    turn = special_ids("gemma4")["<|turn>"]
    for ids in found.samples:
        assert ids[:2].tolist() == [BOS, turn]
        assert int((ids == BOS).sum()) == 1
        assert int((ids == turn).sum()) >= 2


def test_token_ids_are_taken_as_they_are(base: Path, chat: Path, tmp_path: Path) -> None:
    samples = random_samples((30, 20, 10))
    path = write_ids(tmp_path / "ids.jsonl", samples)
    for model in (base, chat):
        found = load(path, model)
        assert found.framing == "ids"
        assert [ids.tolist() for ids in found.samples] == [ids.tolist() for ids in samples]


@pytest.mark.parametrize("kind", ["base", "chat"])
def test_without_a_file_it_is_the_shipped_held_out_text(kind: str, request: pytest.FixtureRequest) -> None:
    model: Path = request.getfixturevalue(kind)
    found = load(None, model, samples=2, length=120)
    assert found.name == HELDOUT
    assert found.framing == ("prose" if kind == "base" else "chat")
    assert found.sha256 == load(None, model, samples=2, length=120).sha256


@pytest.mark.parametrize("kind", ["base", "chat"])
def test_the_shipped_text_gives_equal_numbers_of_sequences_of_every_kind(
    kind: str, request: pytest.FixtureRequest
) -> None:
    found = load(None, request.getfixturevalue(kind), NumericsOptions().samples, NumericsOptions().sequence_length)
    kinds = ("code", "dialogue", "language", "mathematics", "prose", "technical")
    assert Counter(found.kinds) == dict.fromkeys(kinds, 3)
    assert {len(ids) for ids in found.samples} == {512}


@pytest.mark.parametrize("kind", ["base", "chat"])
def test_the_request_to_a_server_is_one_sequence_of_held_out_text(kind: str, request: pytest.FixtureRequest) -> None:
    model: Path = request.getfixturevalue(kind)
    ids = reference_ids(model, read_json(model / "config.json", ""), 64)
    assert len(ids) == 64 and ids == reference_ids(model, read_json(model / "config.json", ""), 64)
    assert ids == reference_ids(model, read_json(model / "config.json", ""), 80)[:64]


def test_kinds_of_a_users_own_lines_are_kept(base: Path, tmp_path: Path) -> None:
    path, words = tmp_path / "mine.jsonl", stdlib_text()
    rows = [{"kind": ("law", "news")[at > 6], "text": words[2000 * at : 2000 * at + 1500]} for at in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Counter(load(path, base, samples=6).kinds) == {"law": 3, "news": 3}


def test_sentences_name_the_option_that_the_user_gave(base: Path, tmp_path: Path) -> None:
    short, strange, folder = tmp_path / "short.txt", tmp_path / "text.doc", tmp_path / "folder"
    short.write_text("Too little.")
    strange.write_text("No known suffix.")
    folder.mkdir()
    beyond = write_ids(tmp_path / "ids.jsonl", [random_samples((5,))[0] + 100_000] * 3)
    for path in (short, strange, folder, tmp_path / "missing.txt", beyond):
        with pytest.raises(InputError) as refused:
            load(path, base)
        message = str(refused.value)
        assert "--calibration" not in message, message
        assert "--text" in message or path.name in message, message
        assert message.count(". ") == 0 and message.endswith("."), message


def test_what_does_not_suffice_says_so(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(stdlib_text()[:2000])
    with pytest.raises(InputError, match=r"--text .*short\.txt has only \d+ samples of 50 tokens, not 300"):
        load(path, base, samples=300)


def paragraphs(name: str) -> set[str]:
    lines = [json.loads(line) for line in lzma.open(shipped_folder() / name, "rt", encoding="utf-8")]
    texts = [line["text"] if "text" in line else "\n\n".join(t["content"] for t in line["messages"]) for line in lines]
    words = {re.sub(r"\W+", " ", paragraph).strip().lower() for text in texts for paragraph in text.split("\n\n")}
    return {paragraph for paragraph in words if len(paragraph) >= 100}


def test_held_out_text_and_calibration_text_share_no_paragraph() -> None:
    """Whatever their spacing, case and punctuation; a phrase that documentation repeats is no paragraph."""
    held_out, calibration = paragraphs(HELDOUT), paragraphs("offline.jsonl.xz")
    assert len(held_out) > 500 and len(calibration) > 5000
    assert held_out & calibration == set()
