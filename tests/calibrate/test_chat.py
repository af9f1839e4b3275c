from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from nvquant.calibrate import tokenizer as tokenizer_module
from nvquant.calibrate.chat import (
    PROBE,
    Chats,
    as_turns,
    join_turns,
    render_answered,
    thinking_switch,
    with_bos,
)
from nvquant.calibrate.text import Document, Turn
from nvquant.calibrate.tokenizer import ChatTemplateError, ModelTokenizer
from support.tiny_tokenizer import FAMILIES, special_ids, write_tiny_tokenizer

Decode = Callable[[str, list[int]], str]


def chats_of(tokenizer: ModelTokenizer, documents: Iterable[Document], sequence_length: int) -> Chats:
    """The chats of documents, their thinking switched as the template has it."""
    return Chats(tokenizer, documents, sequence_length=sequence_length, switch=thinking_switch(tokenizer))


def chat_samples(
    tokenizer: ModelTokenizer, documents: Iterable[Document], *, samples: int, sequence_length: int
) -> list[list[int]]:
    """The first chats of documents."""
    return list(islice(chats_of(tokenizer, documents, sequence_length), samples))


# Strict like Gemma 2's: no system role, user and assistant by turns, nothing else.
STRICT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate.') }}
    {%- endif %}
    {{- '<|turn>' + message['role'] + '\\n' + message['content'] + '<turn|>\\n' }}
{%- endfor %}
"""
# Thinks unless told not to, and shows it nowhere but in the generation prompt, as Qwen3's does.
PROMPT_ONLY_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# Ends the whole, not each answer, and knows no generation prompt: no prompt is how the whole begins.
ENDING_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '[' + message['role'] + ']' + message['content'] + (eos_token if loop.last else '') }}
{%- endfor %}
"""
DATED_TEMPLATE = "{{ bos_token }}Today is {{ strftime_now('%d %B %Y') }}.{{ messages[0]['content'] }}"


def turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def dialogue(*contents: str, kind: str = "dialogue") -> Document:
    return Document(
        kind, turns=tuple(turn("assistant" if index % 2 else "user", text) for index, text in enumerate(contents))
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def tokenizers(folder: Path) -> dict[str, ModelTokenizer]:
    made = {family: ModelTokenizer(write_tiny_tokenizer(folder / family, family)) for family in FAMILIES}
    for name, family, template in (
        ("strict", "gemma4", STRICT_TEMPLATE),
        ("prompt-only", "qwen", PROMPT_ONLY_TEMPLATE),
        ("ending", "llama", ENDING_TEMPLATE),
        ("dated", "llama", DATED_TEMPLATE),
    ):
        path = write_tiny_tokenizer(folder / name, family)
        (path / "chat_template.jinja").write_text(template)
        made[name] = ModelTokenizer(path)
    return made


@pytest.fixture(scope="module")
def decode(folder: Path) -> Decode:
    from transformers import AutoTokenizer

    return lambda family, ids: AutoTokenizer.from_pretrained(folder / family).decode(ids)


def test_the_thinking_switch_is_found_by_its_effect(tokenizers: dict[str, ModelTokenizer]) -> None:
    found = {name: thinking_switch(tokenizer) for name, tokenizer in tokenizers.items() if name != "dated"}
    assert found == {
        "llama": None,
        "qwen": None,
        "smollm2": None,
        "strict": None,
        "ending": None,
        "gemma4": "enable_thinking",
        "prompt-only": "enable_thinking",
    }


@pytest.mark.parametrize(("samples", "thinking"), [(1, 0), (4, 2), (7, 3)])
def test_half_of_the_chats_think(samples: int, thinking: int, tokenizers: dict[str, ModelTokenizer]) -> None:
    documents = (dialogue(f"Why {index}?", "Because of it. " * 40) for index in range(10))
    made = chat_samples(tokenizers["gemma4"], documents, samples=samples, sequence_length=50)
    think = special_ids("gemma4")["<|think|>"]
    assert [think in ids for ids in made] == [index % 2 == 1 for index in range(samples)]
    assert sum(think in ids for ids in made) == thinking


def test_an_answer_begins_where_the_generation_prompt_ends(tokenizers: dict[str, ModelTokenizer]) -> None:
    turns = [turn("user", "One?"), turn("assistant", "First."), turn("user", "Two?"), turn("assistant", " Second. ")]
    head = "<turn|>\n<|turn>user\nTwo?<turn|>\n<|turn>model\n"
    without = render_answered(tokenizers["gemma4"], turns, enable_thinking=False)
    # As the model is asked: the empty thought channel opens the last answer only.
    assert without == (
        f"<bos><|turn>user\nOne?<turn|>\n<|turn>model\nFirst.{head}<|channel>thought\n<channel|>Second.<turn|>\n"
    )
    thinking = render_answered(tokenizers["gemma4"], turns, enable_thinking=True)
    assert thinking.endswith(f"{head}Second.<turn|>\n") and "<|think|>" in thinking
    quick = render_answered(tokenizers["prompt-only"], turns[2:], enable_thinking=False)
    assert quick.endswith("assistant\n<think>\n\n</think>\n\nSecond. <|im_end|>\n")


@pytest.mark.parametrize("family", ["llama", "qwen", "smollm2", "strict", "ending"])
def test_templates_that_write_every_answer_alike_render_a_dialogue_as_it_is(
    family: str, tokenizers: dict[str, ModelTokenizer]
) -> None:
    tokenizer = tokenizers[family]
    assert render_answered(tokenizer, PROBE) == tokenizer.render(PROBE)
    assert render_answered(tokenizer, PROBE[:1]) == tokenizer.render(PROBE[:1])


@pytest.mark.parametrize("family", ["llama", "gemma4", "smollm2"])
def test_bos_comes_once_and_first(family: str, tokenizers: dict[str, ModelTokenizer]) -> None:
    tokenizer = tokenizers[family]
    (ids,) = chat_samples(tokenizer, [dialogue("One?", "Two.")], samples=1, sequence_length=99)
    assert ids[0] == tokenizer.bos_id != ids[1]
    assert ids == tokenizer.encode_rendered(render_answered(tokenizer, dialogue("One?", "Two.").turns))


@pytest.mark.parametrize("written", ["", "{{ bos_token }}{{ bos_token }}"])
def test_a_template_that_forgets_or_doubles_bos_is_put_right(written: str, folder: Path) -> None:
    path = write_tiny_tokenizer(folder / f"bos{len(written)}", "llama")
    (path / "chat_template.jinja").write_text(written + "{{ messages[0]['content'] }}")
    tokenizer = ModelTokenizer(path)
    (ids,) = chat_samples(tokenizer, [dialogue("One?", "Two.")], samples=1, sequence_length=99)
    assert ids == [tokenizer.bos_id, *tokenizer.encode_text("One?")]


@pytest.mark.parametrize(
    ("ids", "bos", "expected"),
    [
        ([5, 6], 1, [1, 5, 6]),
        ([1, 5, 6], 1, [1, 5, 6]),
        ([1, 1, 5, 1], 1, [1, 5, 1]),
        ([5, 6], None, [5, 6]),
        ([], 1, [1]),
        ([1, 1], 1, [1]),
    ],
)
def test_with_bos(ids: list[int], bos: int | None, expected: list[int]) -> None:
    assert with_bos(ids, bos) == expected


def test_short_documents_of_one_kind_become_turns_of_one_chat(
    tokenizers: dict[str, ModelTokenizer], decode: Decode
) -> None:
    documents = [dialogue("Apples?", "Red."), Document("code", "import this"), dialogue("Pears?", "Green.")]
    chats = chat_samples(tokenizers["qwen"], documents, samples=9, sequence_length=500)
    texts = [decode("qwen", ids) for ids in chats]
    assert texts == [
        "<|im_start|>user\nApples?<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n"
        "<|im_start|>user\nPears?<|im_end|>\n<|im_start|>assistant\nGreen.<|im_end|>\n",
        "<|im_start|>user\nimpor<|im_end|>\n<|im_start|>assistant\nt this<|im_end|>\n",
    ]


def test_a_full_chat_is_cut_and_the_next_begins_anew(tokenizers: dict[str, ModelTokenizer], decode: Decode) -> None:
    documents = [dialogue(f"Why {index}?", "Because of it. " * 9) for index in range(12)]
    made = chat_samples(tokenizers["llama"], documents, samples=3, sequence_length=90)
    bos = tokenizers["llama"].bos_id
    assert [len(ids) for ids in made] == [90, 90, 90]
    assert [ids.count(bos) for ids in made] == [1, 1, 1]
    questions = [set(re.findall(r"Why (\d+)", decode("llama", ids))) for ids in made]
    assert all(questions) and questions[0].isdisjoint(questions[1] | questions[2])


def test_documents_are_read_only_as_far_as_needed(tokenizers: dict[str, ModelTokenizer]) -> None:
    def documents() -> Iterator[Document]:
        yield from (dialogue(f"Why {index}?", "Because of it. " * 40) for index in range(3))
        raise AssertionError("one document too many was asked for")

    assert len(chat_samples(tokenizers["llama"], documents(), samples=3, sequence_length=50)) == 3


def test_a_system_turn_unknown_to_the_template_moves_into_the_first_question(
    tokenizers: dict[str, ModelTokenizer], decode: Decode
) -> None:
    document = Document("dialogue", turns=(turn("system", "Be brief."), turn("user", "Why?"), turn("assistant", "So.")))
    chats = chats_of(tokenizers["strict"], [document], 99)
    assert decode("strict", next(chats)).startswith("<bos><|turn>user\nBe brief.\n\nWhy?<turn|>")
    assert chats.refused == 0


def test_refused_documents_are_counted_with_the_reason(tokenizers: dict[str, ModelTokenizer]) -> None:
    wrong = Document("dialogue", turns=(turn("assistant", "So."), turn("user", "Why? " * 30)))
    chats = chats_of(tokenizers["strict"], [wrong, wrong, dialogue("Why?", "So.")], 20)
    assert (len(list(chats)), chats.refused, chats.reason) == (1, 2, "Roles must alternate.")


def test_joined_dialogues_alternate() -> None:
    first = [turn("system", "S"), turn("user", "1"), turn("assistant", "2"), turn("user", "unanswered")]
    second = [turn("system", "T"), turn("user", "3"), turn("assistant", "4")]
    assert [part["content"] for part in join_turns(first, second)] == ["S", "1", "2", "3", "4"]
    assert join_turns([], second) == second
    assert join_turns([turn("user", "1")], [turn("assistant", "2")]) == []


def test_a_chat_of_nothing_is_no_sample(tokenizers: dict[str, ModelTokenizer]) -> None:
    documents = [Document("a", turns=(turn("user", "1"),)), Document("a", turns=(turn("assistant", "2"),))]
    assert chat_samples(tokenizers["llama"], documents, samples=1, sequence_length=9) == []
    assert chat_samples(tokenizers["llama"], [Document("a", "x")], samples=1, sequence_length=9) == []


def test_template_dates_do_not_depend_on_the_day(tokenizers: dict[str, ModelTokenizer]) -> None:
    text = tokenizers["dated"].render(PROBE)
    assert f"Today is {tokenizer_module.TODAY.strftime('%d %B %Y')}." in text


def test_a_template_that_fails_is_reported_as_such(folder: Path) -> None:
    path = write_tiny_tokenizer(folder / "failing", "llama")
    for template, reason in (
        ("{{ 1 // 0 }}", "division"),
        ("{{ nothing.at.all }}", "nothing"),
        ("{% if %}", "Expected an expression"),
    ):
        (path / "chat_template.jinja").write_text(template)
        with pytest.raises(ChatTemplateError, match=reason):
            thinking_switch(ModelTokenizer(path))


@pytest.mark.parametrize(
    ("text", "request_text"),
    [
        ("A short title\n\nThe rest of it, which is longer.", "A short title"),
        ("First sentence. Second sentence. " * 30, ("First sentence. Second sentence. " * 6).strip()),
        ("nospaces" * 100, "nospaces" * 25),
        ("零一二。" * 10, "零一二。" * 5),
        ("ab", "a"),
        ("word " * 4 + "\n\n" + "x", "word word"),
    ],
)
def test_a_text_becomes_a_request_and_the_rest(text: str, request_text: str) -> None:
    request, answer = as_turns(text)
    assert (request["role"], answer["role"]) == ("user", "assistant")
    assert request["content"] == request_text
    assert "".join((request["content"] + answer["content"]).split()) == "".join(text.split())


@pytest.mark.parametrize("text", ["", " ", "x", " x\n"])
def test_a_text_too_short_for_two_turns_is_left_out(text: str) -> None:
    assert as_turns(text) == ()
