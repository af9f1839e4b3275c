from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from nvquant.calibrate.samples import CalibrationSet, load_calibration
from nvquant.calibrate.text import split_text
from nvquant.errors import InputError
from support.tiny_tokenizer import FAMILIES, special_ids, stdlib_text, write_tiny_tokenizer

VOCABULARY = 512
CONFIG = {"vocab_size": VOCABULARY}
DIALOGUES = [
    [
        {"role": "user", "content": f"Question {index}: how is item {index} of a list removed?"},
        {"role": "assistant", "content": f"Answer {index}. Use del items[{index}], or pop it. " * 4},
    ]
    for index in range(40)
]


def write_lines(path: Path, rows: list[dict[str, object]]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `llama`, `llama-base`, `gemma4`, … each with a tokenizer, the base ones without a chat template."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        write_tiny_tokenizer(folder / family, family, vocab_size=VOCABULARY)
        write_tiny_tokenizer(folder / f"{family}-base", family, vocab_size=VOCABULARY, base=True)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mixed.jsonl.xz`: 60 texts of 1500 characters at most and 40 dialogues."""
    rows: list[dict[str, object]] = [{"kind": "prose", "text": text} for text in split_text(stdlib_text(), 1500)[:60]]
    rows += [{"kind": "dialogue", "messages": messages} for messages in DIALOGUES]
    return write_lines(tmp_path_factory.mktemp("texts") / "mixed.jsonl.xz", rows)


def load(
    name: Path | str, model: Path, *, samples: int = 6, sequence_length: int = 64, seed: int = 0
) -> CalibrationSet:
    return load_calibration(
        str(name), model_folder=model, config=CONFIG, samples=samples, sequence_length=sequence_length, seed=seed
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_base_models_get_full_sequences_with_one_bos_and_no_other_special_token(
    family: str, models: Path, texts: Path
) -> None:
    result = load(texts, models / f"{family}-base")
    bos = special_ids(family).get(FAMILIES[family].bos or "")
    special = set(special_ids(family).values())
    assert result.framing == "prose" and len(result.samples) == 6
    assert result.tokens == 6 * 64
    for ids in result.samples:
        assert ids.shape == (64,) and ids.dtype == torch.int64
        if bos is not None:
            assert int(ids[0]) == bos
        assert not special & set(ids[0 if bos is None else 1 :].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_models_get_their_template_with_one_bos(family: str, models: Path, texts: Path) -> None:
    result = load(texts, models / family)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / family)
    assert result.framing == "chat" and len(result.samples) == 6
    for ids in result.samples:
        assert len(ids) == 64
        assert set(ids.tolist()) <= set(range(VOCABULARY))
        if tokenizer.bos_token_id is not None:
            assert int(ids[0]) == tokenizer.bos_token_id != int(ids[1])
        begin = {
            "llama": "<s>User:",
            "gemma4": "<bos><|turn>",
            "qwen": "<|im_start|>user",
            "smollm2": "<|im_start|>user",
        }
        assert tokenizer.decode(ids).startswith(begin[family])


def test_packed_prose_is_the_text_itself_in_order(models: Path, tmp_path: Path) -> None:
    text = stdlib_text()[:3000].strip()
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    result = load(tmp_path / "one.txt", models / "gemma4-base", samples=4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "gemma4-base")
    assert text.startswith(tokenizer.decode(torch.cat([ids[1:] for ids in result.samples])))


def test_base_models_read_the_words_of_dialogues(models: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": messages} for messages in DIALOGUES])
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "qwen-base")
    text = "".join(tokenizer.decode(ids) for ids in load(path, models / "qwen-base").samples)
    asked, answered = re.search(r"Question (\d+): .*?\n\nAnswer (\d+)\.", text).groups()
    assert asked == answered


def test_equal_requests_give_equal_ids_in_another_process_with_another_hash_seed(models: Path, texts: Path) -> None:
    here = load(texts, models / "gemma4", seed=3)
    code = (
        "import sys; from pathlib import Path; from nvquant.calibrate.samples import load_calibration as load\n"
        "made = load(sys.argv[1], model_folder=Path(sys.argv[2]), config={}, samples=6, sequence_length=64, seed=3)\n"
        "print(made.sha256)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(texts), str(models / "gemma4")],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == here.sha256


def test_another_seed_chooses_other_documents(models: Path, texts: Path) -> None:
    digests = {load(texts, models / "llama-base", seed=seed).sha256 for seed in range(4)}
    assert len(digests) == 4


def test_fewer_samples_are_the_first_of_more(models: Path, texts: Path) -> None:
    for model in ("gemma4", "gemma4-base"):
        few, more = load(texts, models / model, samples=3), load(texts, models / model, samples=6)
        assert all(torch.equal(a, b) for a, b in zip(few.samples, more.samples, strict=False))


def test_digest_is_over_lengths_and_ids(tmp_path: Path) -> None:
    rows = [[5, 6, 7], [8, 9]]
    path = write_lines(tmp_path / "ids.jsonl", [{"input_ids": row} for row in rows])
    result = load(path, tmp_path / "no-model", samples=2)
    packed = b"".join(struct.pack(f"<q{len(row)}q", len(row), *row) for row in rows)
    assert result.sha256 == hashlib.sha256(packed).hexdigest()
    assert (result.name, result.framing, result.tokens) == ("ids.jsonl", "ids", 5)


def test_special_tokens_spelled_out_in_a_text_stay_letters(models: Path, tmp_path: Path) -> None:
    spelled = " ".join(special_ids("gemma4"))
    rows: list[dict[str, object]] = [{"text": f"Look at {spelled} here.\n\nThen {spelled} again, please."}] * 40
    path = write_lines(tmp_path / "spelled.jsonl", rows)
    prose = load(path, models / "gemma4-base")
    assert not set(special_ids("gemma4").values()) & set(torch.cat([ids[1:] for ids in prose.samples]).tolist())
    chat = load(path, models / "gemma4", samples=2, sequence_length=400)
    seen = torch.cat([ids[1:] for ids in chat.samples]).tolist()
    markers = special_ids("gemma4")
    by_template = {markers[name] for name in ("<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>")}
    assert set(markers.values()) & set(seen) <= by_template
    # Turns alternate with their ends, so none comes from the text.
    turns = [index for index in chat.samples[0].tolist() if index in (markers["<|turn>"], markers["<turn|>"])]
    assert all(a != b for a, b in pairwise(turns))


def test_only_as_much_is_tokenized_as_is_needed(models: Path, tmp_path: Path) -> None:
    good = [{"text": text} for text in split_text(stdlib_text(), 1500)[:200]]
    whole = load(write_lines(tmp_path / "good.jsonl", list(good)), models / "llama-base", samples=4)
    lines = (tmp_path / "good.jsonl").read_text().splitlines()
    # Damage every line in turn: most may be anything, because they are never parsed.
    unread = 0
    for number in range(0, 200, 20):
        damaged = [*lines[:number], "{", *lines[number + 1 :]]
        (tmp_path / "damaged.jsonl").write_text("\n".join(damaged))
        try:
            unread += load(tmp_path / "damaged.jsonl", models / "llama-base", samples=4).sha256 == whole.sha256
        except InputError:
            continue
    assert unread >= 8


def test_too_few_samples_names_how_many_there_are(models: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(stdlib_text()[:1000], encoding="utf-8")
    with pytest.raises(InputError) as error:
        load(tmp_path / "short.txt", models / "llama-base", samples=50)
    available = int(re.search(r"has only (\d+) samples of 64 tokens, not 50", str(error.value))[1])
    assert f"--samples {available}" in str(error.value)
    assert len(load(tmp_path / "short.txt", models / "llama-base", samples=available).samples) == available
    with pytest.raises(InputError, match="too little text for one sample of 4096 tokens"):
        load(tmp_path / "short.txt", models / "llama-base", samples=1, sequence_length=4096)


def test_chats_of_a_small_file_are_shorter_than_a_sequence(models: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "few.jsonl", [{"messages": DIALOGUES[0]}, {"messages": DIALOGUES[1]}])
    result = load(path, models / "gemma4", samples=1, sequence_length=4096)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "gemma4")
    text = tokenizer.decode(result.samples[0])
    assert 2 < len(result.samples[0]) < 4096
    assert "Question 0" in text and "Question 1" in text and text.endswith("<turn|>\n")


def test_a_model_without_tokenizer_is_refused_and_named(tmp_path: Path, texts: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match=rf"{tmp_path / 'model'} has no tokenizer .*token ids"):
        load(texts, tmp_path / "model")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(models: Path, texts: Path) -> None:
    with pytest.raises(InputError, match=r"token id \d+, but the model's vocabulary has 100 entries"):
        load_calibration(
            str(texts),
            model_folder=models / "gemma4",
            config={"vocab_size": 9, "text_config": {"vocab_size": 100}},
            samples=2,
            sequence_length=64,
            seed=0,
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-set", "no-such-set is not a shipped set"),
        ("missing.jsonl", "missing.jsonl is not a file"),
        ("missing.safetensors", "missing.safetensors is not a file"),
        ("missing.yaml", "missing.yaml is not a file"),
        ("missing.txt", "missing.txt is not a file"),
        (".", "is a folder"),
        (__file__, "no known suffix"),
    ],
)
def test_a_name_that_is_nothing_is_refused(name: str, message: str, models: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load(name, models / "llama")


@pytest.mark.parametrize(("samples", "length", "option"), [(0, 64, "--samples 0"), (1, 1, "--sequence-length 1")])
def test_an_empty_request_is_refused(samples: int, length: int, option: str, models: Path, texts: Path) -> None:
    with pytest.raises(InputError, match=option):
        load(texts, models / "llama", samples=samples, sequence_length=length)


def test_a_broken_template_is_one_sentence(models: Path, texts: Path, tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path / "broken", "llama", vocab_size=VOCABULARY)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('Tools only.') }}")
    with pytest.raises(InputError, match=r"chat template cannot render a question and an answer \(Tools only\.\)"):
        load(texts, folder)


@pytest.mark.parametrize("model", ["gemma4", "gemma4-base"])
def test_the_bundled_set_needs_neither_network_nor_options(model: str, models: Path) -> None:
    result = load("offline", models / model, samples=16, sequence_length=512)
    assert result.name == "offline" and result.tokens == 16 * 512


def test_the_real_smollm2_tokenizer_frames_chats_as_its_model_knows_them(
    smollm2: Path, texts: Path, tmp_path: Path
) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    request = {"config": config, "samples": 3, "sequence_length": 128, "seed": 0}
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    for ids in load_calibration(str(texts), model_folder=smollm2, **request).samples:
        assert ids[:2].tolist() == [1, 9690]  # <|im_start|>, system
        assert tokenizer.decode(ids).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    for ids in load_calibration(str(texts), model_folder=tmp_path, **request).samples:
        assert int(ids[0]) == 1 and not {0, 1, 2} & set(ids[1:].tolist())
