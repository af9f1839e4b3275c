"""Foreign strings stay data in every form that nvquant writes."""

from __future__ import annotations

import json
import subprocess

import pytest
from nvquant.errors import InputError
from nvquant.quoting import (
    code,
    fenced,
    json_text,
    lines,
    markdown,
    message,
    shell,
    shell_without_secrets,
    visible,
    workflow_command,
)

NASTY = [
    "\x1b[31mX\x1b]0;pwn\x07",
    "a\u202egnp.exe",
    "\x9b2J",
    "a\n::error title=x::pwned",
    "  ::stop-commands::x",
    "x ##[add-path]/tmp",
    "a\u2028b\x85c",
    "\ud800",
    "\U000e0041",
]
QUOTES = [message, lines, visible, markdown, code, fenced, lambda text: str(InputError(text))]
FORBIDDEN = [*map(chr, [*range(9), *range(11, 32)]), *"\x7f\x85\x9b\u202e\u2028\ud800\U000e0041"]


def test_nothing_invisible_is_written() -> None:
    written = [(quote.__name__, text, set(quote(text)) & set(FORBIDDEN)) for quote in QUOTES for text in NASTY]
    assert [case for case in written if case[-1]] == []


@pytest.mark.parametrize("text", NASTY)
def test_no_line_of_a_message_is_a_command_of_a_workflow(text: str) -> None:
    for found in (message(text), lines(text), str(InputError(text))):
        assert not any(line.lstrip().startswith("::") for line in found.splitlines())
        assert "##[" not in found
    assert len(message(text).splitlines()) == len(str(InputError(text)).splitlines()) == 1


def test_plain_text_stays_as_it_is() -> None:
    for text in ("model-00001.safetensors holds 3 tensors: 0.5, -1", "größer als 日本語", "a::b", "C:\\x"):
        assert message(text) == lines(text) == text
    assert markdown("-0.5 and 1.5") == "-0.5 and 1.5"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("a *b* `c` [d](e) | f", "a \\*b\\* \\`c\\` \\[d\\](e) \\| f"),
        ("<img src=x> & more", "&lt;img src=x&gt; &amp; more"),
        ("- item", "\\- item"),
        ("1. item", "1\\. item"),
        ("# head", "\\# head"),
        ("see http://evil.example and @somebody", "see http&#58;//evil.example and &#64;somebody"),
    ],
)
def test_markdown_takes_text_for_text(given: str, shown: str) -> None:
    assert markdown(given) == shown


@pytest.mark.parametrize("text", ["```\nrm -rf /\n```", "`````", "~~~\n", "a```b"])
def test_a_fence_is_longer_than_any_run_in_it(text: str) -> None:
    first, *_, last = fenced(text, "sh").split("\n")
    assert first == f"{last}sh" and set(last) == {"`"}
    assert last not in text


@pytest.mark.parametrize("word", ["a b", "$(id)", "a;b", "`id`", "-rf", "a\nb", "x'y", "\x1b[31m", "", "é", "\\n'\n"])
def test_a_shell_gets_back_each_word(word: str) -> None:
    command = shell(["printf", "%s", word])
    assert "\n" not in command and "\x1b" not in command
    done = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode() == word


@pytest.mark.parametrize(
    "words",
    [
        ["vllm", "serve", "--api-key", "SECRET"],
        ["vllm", "serve", "--api-key=SECRET"],
        ["env", "VLLM_API_KEY=SECRET", "vllm"],
        ["env", "HF_TOKEN=SECRET", "vllm"],
        ["vllm", "--hf-token", "SECRET"],
        ["bash", "-c", "vllm serve --api-key SECRET"],
        ["curl", "-H", "Authorization: Bearer SECRET"],
        ["x", "http://user:SECRET@host/"],
        ["x", "https://host/file?Signature=SECRET"],
        ["x", '--flag={"api_key": "SECRET"}'],
        ["x", "hf_SECRETsecret"],
    ],
)
def test_a_command_is_shown_without_its_secrets(words: list[str]) -> None:
    shown = shell_without_secrets(words)
    assert "SECRET" not in shown and words[0] in shown


def test_other_options_are_shown_with_their_values() -> None:
    words = ["vllm", "--max-num-batched-tokens", "8192", "--max-tokens=5", "--tokenizer", "x", "--ssl-keyfile=/k"]
    assert shell_without_secrets(words) == shell(words)


def test_messages_hold_no_secret() -> None:
    assert str(InputError("http://u:pw@h/x?sig=1 with hf_abcdefghijk")) == "http://…@h/x?… with hf_…"


def test_json_can_be_read_and_means_the_same() -> None:
    value = {"a\u202e": ["\x1b", "\ud800", "\U000e0041", "é"]}
    text = json_text(value)
    assert json.loads(text) == value
    assert "é" in text and not set(text) & set(FORBIDDEN)


def test_a_workflow_command_is_escaped_as_githubs_toolkit_does() -> None:
    command = workflow_command("error", {"title": "a:b,c%\n"}, "50 %\r\n::error::x\x1b")
    assert command == "::error title=a%3Ab%2Cc%25%0A::50 %25%0D%0A::error::x\\x1b"
