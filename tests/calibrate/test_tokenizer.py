from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nvquant.calibrate.tokenizer import ModelTokenizer
from nvquant.errors import InputError
from support.tiny_tokenizer import FAMILIES, special_ids, write_tiny_tokenizer

NAMES = sorted(special_ids("gemma4"))


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    return ModelTokenizer(write_tiny_tokenizer(tmp_path_factory.mktemp("gemma4"), "gemma4"))


@given(parts=st.lists(st.sampled_from([*NAMES, "<", "|", ">", " ", "bos", "word", "é", "<b", "<|tu"]), max_size=12))
def test_no_text_becomes_a_special_token(gemma4: ModelTokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    harmless = gemma4.harmless(text)
    assert not any(name in harmless for name in NAMES)
    assert harmless.replace(" ", "") == text.replace(" ", "")
    assert not set(special_ids("gemma4").values()) & set(gemma4.encode_rendered(harmless))
    assert gemma4.encode_text(text) == gemma4.encode_rendered(harmless)


def test_text_without_special_names_is_left_alone(gemma4: ModelTokenizer) -> None:
    text = "if a < b | c > d: <b>bold</b> <bo s> [x]"
    assert gemma4.harmless(text) == text
    assert gemma4.harmless("a<bos>b<eos>") == "a< bos>b< eos>"


def test_special_tokens_of_a_rendered_chat_are_meant(gemma4: ModelTokenizer) -> None:
    ids = special_ids("gemma4")
    assert gemma4.encode_rendered("<bos><|turn>")[:2] == [ids["<bos>"], ids["<|turn>"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_added_to_a_text(family: str, tmp_path: Path) -> None:
    tokenizer = ModelTokenizer(write_tiny_tokenizer(tmp_path / family, family))
    assert tokenizer.encode_text("some words") == tokenizer.encode_rendered("some words")
    assert tokenizer.encode_text("") == []
    assert tokenizer.bos_id == special_ids(family).get(FAMILIES[family].bos or "")


def test_a_model_without_template_has_none(tmp_path: Path) -> None:
    assert ModelTokenizer(write_tiny_tokenizer(tmp_path / "chat", "qwen")).has_chat_template
    assert not ModelTokenizer(write_tiny_tokenizer(tmp_path / "base", "qwen", base=True)).has_chat_template


def test_a_tokenizer_that_wants_its_own_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    (tmp_path / "own.py").write_text("raise SystemExit('this code must not run')\n")
    with pytest.raises(InputError, match="has no tokenizer that transformers can load"):
        ModelTokenizer(tmp_path)
