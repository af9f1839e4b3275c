"""Tokenizer files are checked before transformers reads them: required packages, token ids, and lines on the screen."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from nvquant.calibrate.tokenizer import load_tokenizer
from nvquant.calibrate.tokenizer_files import MOST_TOKEN_ID, missing_packages, refuse_large_ids
from nvquant.errors import InputError
from support.tiny_tokenizer import write_tiny_tokenizer

SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0c\n\x03<s>"  # how such files begin
TIKTOKEN = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("nvquant.calibrate.tokenizer_files.metadata.version", version)


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize(
    ("name", "content", "packages"),
    [
        ("tokenizer.model", SENTENCEPIECE, ("sentencepiece", "protobuf")),
        ("spiece.model", SENTENCEPIECE, ("sentencepiece", "protobuf")),
        ("sentencepiece.bpe.model", SENTENCEPIECE, ("sentencepiece", "protobuf")),
        ("tokenizer.model", TIKTOKEN, ("tiktoken",)),
        ("qwen.tiktoken", TIKTOKEN, ("tiktoken",)),
        ("tekken.json", b"{}", ("mistral-common",)),
    ],
)
def test_the_package_that_a_file_requires_is_named(
    tmp_path: Path, name: str, content: bytes, packages: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert missing_packages(tmp_path) == (name, packages)
    with pytest.raises(InputError, match=rf"{re.escape(name)} requires .*`pip install {' '.join(packages)}`"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")  # which no other package reads
    assert missing_packages(tmp_path) is None


def test_nothing_is_required_where_no_such_file_is_there(tmp_path: Path) -> None:
    assert missing_packages(tmp_path) is None
    assert missing_packages(write_tiny_tokenizer(tmp_path / "gemma4", "gemma4")) is None


@pytest.mark.parametrize("number", [MOST_TOKEN_ID + 1, 1_360_000_000, -1, 10**30])
@pytest.mark.parametrize("place", ["vocabulary", "added", "settings", "vocab.json", "added_tokens.json"])
def test_an_id_that_would_take_gigabytes_is_refused(tmp_path: Path, place: str, number: int) -> None:
    folder = write_tiny_tokenizer(tmp_path / "gemma4", "gemma4")

    def edit(document: dict[str, Any]) -> None:
        if place == "vocabulary":
            document["model"]["vocab"]["odd"] = number
        else:
            document["added_tokens"].append({"id": number, "content": "odd", "special": True})

    if place in ("vocabulary", "added"):
        edit_json(folder / "tokenizer.json", edit)
    elif place == "settings":
        edit_json(
            folder / "tokenizer_config.json",
            lambda document: document.update(added_tokens_decoder={str(number): {"content": "odd"}}),
        )
    else:
        (folder / place).write_text(json.dumps({"odd": number}))
    if place == "settings" and number < 0:
        return  # no decimal number, so transformers refuses it
    with pytest.raises(InputError, match=rf"gives the token 'odd' the id {number}, and ids end at"):
        refuse_large_ids(folder)


def test_ids_of_an_ordinary_tokenizer_pass(tmp_path: Path) -> None:
    refuse_large_ids(write_tiny_tokenizer(tmp_path / "qwen", "qwen"))


def test_a_setting_that_the_library_does_not_know_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_tokenizer(tmp_path / "gemma4", "gemma4")
    edit_json(
        folder / "tokenizer_config.json",
        lambda document: document.update(
            added_tokens_decoder={"5": {"content": "odd", "special": True, "\x1b[2J": False}}
        ),
    )
    with suppress(InputError):
        load_tokenizer(folder)
    assert capfd.readouterr() == ("", "")


def test_lines_of_python_and_of_compiled_code_are_discarded_and_later_ones_are_not() -> None:
    program = """
import os
from nvquant.calibrate.quiet import quiet_descriptors
print("before")
try:
    with quiet_descriptors():
        print("python")
        os.write(1, b"compiled")
        os.write(2, b"compiled")
        with quiet_descriptors():
            os.write(2, b"nested")
        raise OSError("passed on")
except OSError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("before\npassed on\n", "")
    closed = f"import os; os.close(2)\n{program}"  # a stream that was closed stays closed
    assert subprocess.check_output([sys.executable, "-c", closed], text=True) == "before\npassed on\n"
