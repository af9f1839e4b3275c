"""A chat template is a stranger's program: it ends within bounds of time, memory and text, or in one sentence."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from nvquant.calibrate import template as template_module
from nvquant.calibrate.template import ChatTemplateError
from nvquant.calibrate.tokenizer import ModelTokenizer
from nvquant.errors import InputError
from support.tiny_tokenizer import write_tiny_tokenizer

TURNS = [{"role": "user", "content": "Good morning."}]
MEMORY = "takes more than 1 GB of memory"


def tokenizer(folder: Path, template: str) -> ModelTokenizer:
    write_tiny_tokenizer(folder, "llama")
    (folder / "chat_template.jinja").write_text(template)
    return ModelTokenizer(folder)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'x' * 10**10 }}", MEMORY),
        ("{{ 'a'.ljust(10**11) }}", MEMORY),
        ("{{ '%10000000000d' % 1 }}", MEMORY),
        ("{% set x = 'x' * 10**7 %}{% for i in range(40) %}{% set x = x + x %}{{ x }}{% endfor %}", "more than"),
        ("{{ 'x' * 10**8 }}", "makes 100,000,000 characters of a conversation of"),
    ],
    ids=["repeat", "pad", "format", "double", "long text"],
)
def test_what_takes_all_memory_or_writes_without_end_is_refused(tmp_path: Path, template: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        tokenizer(tmp_path, template).render(TURNS)
    assert words in str(caught.value) and str(tmp_path) in str(caught.value)
    assert str(caught.value).endswith("repair it, or give token ids, which need none.")


@pytest.mark.parametrize(
    "template",
    ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 9**(9**9) }}"],
    ids=["loops", "power"],
)
def test_what_does_not_end_is_ended(tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MOST_SECONDS", 1)
    made = tokenizer(tmp_path, template)
    began = time.monotonic()
    with pytest.raises(InputError, match="takes more than 1 s for one conversation"):
        made.render(TURNS)
    assert time.monotonic() - began < 60
    with pytest.raises(InputError, match="takes more than 1 s for one conversation"):
        made.render(TURNS)  # a process of its own again


@pytest.mark.parametrize("template", ["{% if", "{{ 1/0 }}", "{{ messages[9].x.y }}", "{{" * 5000, "{{ ''.__class__ }}"])
def test_what_the_template_raises_is_a_refusal(tmp_path: Path, template: str) -> None:
    if "__class__" in template:
        assert tokenizer(tmp_path, template).render(TURNS) == ""  # the sandbox shows nothing of Python
        return
    with pytest.raises(ChatTemplateError) as caught:
        tokenizer(tmp_path, template).render(TURNS)
    assert 0 < len(str(caught.value)) <= 300


def test_turns_switches_and_special_tokens_reach_the_template(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, "{{ eos_token }}|{{ messages | tojson }}|{{ deep }}|{{ add_generation_prompt }}")
    turns = [{"role": "user", "content": "a\u2028\U0001f600", "more": [1, {"b": None}]}]
    end, said, deep, prompt = made.render(turns, generation_prompt=True, deep=True).split("|")
    assert end and json.loads(said) == turns and (deep, prompt) == ("True", "True")


def test_the_process_sees_no_secret_and_ends_with_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    made = tokenizer(tmp_path, "{{ messages[0].content }}")
    assert made.render(TURNS) == "Good morning."
    process = made._template._process
    assert process is not None
    assert b"hf_secret" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    del made
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
