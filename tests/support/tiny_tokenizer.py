"""Small real tokenizers: byte-level BPE trained on the source of Python's own standard library, so without a network.

Four families copy how well-known checkpoints treat their special tokens, because that is where calibration goes wrong:

- `llama`: `<s>` and `</s>`; plain tokenization puts BOS first, and the chat template writes it too.
- `qwen`: no BOS at all; `<|im_start|>` and `<|im_end|>` mark turns, `<|endoftext|>` pads.
- `smollm2`: BOS is `<|im_start|>`, the turn marker itself; plain tokenization adds none.
- `gemma4`: `<pad>` 0, `<eos>` 1, `<bos>` 2; plain tokenization adds no BOS, the chat template writes it and can switch
  thinking on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS_MODULES = ("argparse", "ast", "datetime", "difflib", "doctest", "inspect", "statistics", "textwrap", "typing")

LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- elif message['role'] == 'system' %}
        {{- 'System: ' + message['content'] + '\\n' }}
    {%- else %}
        {{- 'User: ' + message['content'] + '\\nAssistant:' }}
    {%- endif %}
{%- endfor %}
"""

IM_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# A stand-in for the template of the larger Gemma 4 chat models: same order of markers, without tools and media.
GEMMA4_TEMPLATE = """\
{%- macro text_of(content) %}
    {%- if content is string %}
        {{- content | trim }}
    {%- else %}
        {%- for part in content if part['type'] == 'text' %}
            {{- part['text'] | trim }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- set thinking = enable_thinking | default(false) %}
{%- set has_system = messages[0]['role'] == 'system' %}
{{- bos_token }}
{%- if thinking or has_system %}
    {{- '<|turn>system\\n' }}
    {%- if thinking %}
        {{- '<|think|>' }}
    {%- endif %}
    {%- if has_system %}
        {{- text_of(messages[0]['content']) }}
    {%- endif %}
    {{- '<turn|>\\n' }}
{%- endif %}
{%- for message in messages[1 if has_system else 0:] %}
    {{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
    {{- text_of(message['content']) + '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|turn>model\\n' }}
    {%- if not thinking %}
        {{- '<|channel>thought\\n<channel|>' }}
    {%- endif %}
{%- endif %}
"""


@dataclass(frozen=True)
class Family:
    """Special tokens of one kind of checkpoint.

    `first` get the ids from 0 on, `last` the highest ids: Gemma's media tokens, which text must never produce.
    """

    first: tuple[str, ...]
    template: str
    bos: str | None
    eos: str
    pad: str | None
    turn_end: str
    adds_bos: bool = False
    last: tuple[str, ...] = field(default=())


GEMMA4_MEDIA = (
    "<|image|>",
    "<|video|>",
    "<|audio|>",
    "<|image>",
    "<image|>",
    "<|audio>",
    "<audio|>",
    *(f"<unused{i}>" for i in range(5)),
)
GEMMA4_TURNS = ("<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>")

FAMILIES = {
    "llama": Family(("<unk>", "<s>", "</s>"), LLAMA_TEMPLATE, "<s>", "</s>", None, "</s>", adds_bos=True),
    "qwen": Family(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), IM_TEMPLATE, None, "<|im_end|>", "<|endoftext|>", "<|im_end|>"
    ),
    "smollm2": Family(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        IM_TEMPLATE,
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|im_end|>",
    ),
    "gemma4": Family(
        ("<pad>", "<eos>", "<bos>", "<unk>", *GEMMA4_TURNS),
        GEMMA4_TEMPLATE,
        "<bos>",
        "<eos>",
        "<pad>",
        "<turn|>",
        last=GEMMA4_MEDIA,
    ),
}


@lru_cache(maxsize=1)
def stdlib_text() -> str:
    """Some 750 kB of English-like text that every Python carries: the source of a few standard modules."""
    folder = Path(json.__file__).parents[1]
    return "\n".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in CORPUS_MODULES)


@lru_cache(maxsize=16)
def _train(family_name: str, vocab_size: int) -> str:
    """Train once a process; the result as the JSON of tokenizer.json."""
    family = FAMILIES[family_name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if family_name == "qwen":
        # transformers puts these in place of what tokenizer.json says, so train with them.
        own = transformers.Qwen2Tokenizer().backend_tokenizer
        tokenizer.normalizer, tokenizer.pre_tokenizer = own.normalizer, own.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(family.last),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in family.first],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stdlib_text().split("\n\n"), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.last])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"vocab_size {vocab_size} is out of reach: training gave {tokenizer.get_vocab_size()} tokens.")
    if family.adds_bos:
        bos = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", pair=f"{family.bos} $A {family.bos} $B", special_tokens=[bos]
        )
    return str(tokenizer.to_str())


def special_ids(family_name: str, vocab_size: int = 512) -> dict[str, int]:
    """Ids of all special tokens of a family by their text."""
    family = FAMILIES[family_name]
    ids = {token: i for i, token in enumerate(family.first)}
    return ids | {token: vocab_size - len(family.last) + i for i, token in enumerate(family.last)}


def write_tiny_tokenizer(folder: Path, family_name: str, *, vocab_size: int = 512, base: bool = False) -> Path:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; a `base` model has no chat template."""
    family = FAMILIES[family_name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_train(family_name, vocab_size), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": family.bos,
        "eos_token": family.eos,
        "pad_token": family.pad,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    if not base:
        (folder / "chat_template.jinja").write_text(family.template, encoding="utf-8")
    return folder
