"""Checks of a server's answers: fixed prompts, and long answers that must stay text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.source import read_json
from ..errors import InputError
from ..serving.client import Answer, Client
from .degeneration import fault_of
from .report import Finding, counted, not_applicable
from .served_tokens import OwnTokenizer, framed
from .subject import Subject

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4, 5, 6,",
)
QUESTIONS = ("What is the capital of France? Answer in one sentence.", "Explain in a few words why the sky is blue.")
SHORT_TOKENS, CHAT_TOKENS = 16, 48
LONG_PROMPTS = (
    "The history of the lighthouse begins in the year 1874, when",
    "Once upon a time, in a small village at the foot of the mountains,",
    "To bake a good loaf of bread, one first has to",
    "In this article we explain how a computer stores numbers. A computer",
)
LONG_TOKENS = 256
# Where a server is too slow for that, as vLLM's own emulation is on a CPU, as many as it makes in two minutes.
LONG_SECONDS, LEAST_LONG_TOKENS = 120.0, 32
SEED = 1
# Sampling as the model's authors set it, since a small healthy model loops when it may not choose.
DEFAULT_SAMPLING: Mapping[str, float] = {"temperature": 0.7}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# A healthy model degenerated in one answer of seventy (docs/serving.md), so hardly in two of four. A destroyed one does
# so in each.
MOST_DEGENERATE = 0.5


@dataclass
class Answers:
    """The prompts for one server, and its answers.

    Attributes:
        context: tokens of the longest request.
        knows_text: False where not even the source models text, so that answers need not be text.
        document: one entry an answer, for the stage's document.
        tokens_per_second: decoding for one user. None before it was measured.
    """

    subject: Subject
    tokenizer: OwnTokenizer
    client: Client
    context: int | None
    knows_text: bool = True
    document: list[dict[str, Any]] = field(default_factory=list)
    tokens_per_second: float | None = None

    def check_answers(self) -> Finding:
        """Check that every fixed prompt, by completions and by chat where there is a template, gets a non-empty answer.

        The content of the answers is not checked. A small model in W4A4 gives another one in each layout.
        """
        faults = []
        for prompt in PROMPTS:
            asked = framed(self.tokenizer, self.subject, prompt) if self.tokenizer.is_there else self._as_ids(prompt)
            answer = self.client.complete(asked, SHORT_TOKENS)
            faults += self._judge(prompt, "completions", answer, self._empty(answer))
            self._time(answer)
        chats = QUESTIONS if self.tokenizer.has_chat_template else ()
        for question in chats:
            answer = self.client.chat([{"role": "user", "content": question}], CHAT_TOKENS)
            faults += self._judge(question, "chat", answer, self._empty(answer))
        said = counted(len(PROMPTS), "completion")
        said += f", {counted(len(chats), 'chat')}" if chats else ", no chat because there is no chat template"
        first = next((entry["text"] for entry in self.document), "")
        return Finding(f"{said}, {PROMPTS[0]!r} continues as {first[:60]!r}", faults)

    def check_degeneration(self) -> Finding:
        """Check that long sampled answers stay text: no loops, no endlessly repeated token, no broken characters."""
        if not self.tokenizer.is_there:
            return not_applicable("the checkpoint has no tokenizer that transformers can load")
        wanted = self._long_tokens()
        sampling = sampling_of(self.subject)
        prompts = [framed(self.tokenizer, self.subject, prompt) for prompt in LONG_PROMPTS]
        alone = self.client.complete(prompts[0], wanted, seed=SEED, **sampling)
        self._time(alone)
        answers = [alone, *self.client.complete_all(prompts[1:], wanted, seed=SEED, **sampling)]
        faults = []
        for prompt, answer in zip(LONG_PROMPTS, answers, strict=True):
            faults += self._judge(prompt, "completions", answer, fault_of(answer.text, answer.ids))
        tokens = sum(len(answer.ids) for answer in answers)
        looked_at = (
            f"{len(answers)} answers of up to {wanted} tokens, {tokens} in all, sampled with "
            f"{', '.join(f'{name} {value:g}' for name, value in sampling.items())} and seed {SEED}"
        )
        if faults and len(faults) < MOST_DEGENERATE * len(answers):
            # One in four may happen to a healthy model; the answer itself tells of it in the report.
            return Finding(f"{looked_at}, one degenerates, which can happen by chance: {faults[0]}")
        return Finding(looked_at, faults)

    def _judge(self, prompt: str, endpoint: str, answer: Answer, fault: str | None) -> list[str]:
        self.document.append(
            {
                "prompt": prompt,
                "endpoint": endpoint,
                "text": answer.text,
                "tokens": len(answer.ids),
                "finish_reason": answer.finish_reason,
                "fault": fault,
            }
        )
        return [] if fault is None else [f"{endpoint}, {prompt!r}: {fault}"]

    def _empty(self, answer: Answer) -> str | None:
        if not answer.ids and not answer.text:
            return "an empty answer"
        if not self.tokenizer.is_there or not self.knows_text:
            return None
        if not answer.text.strip():
            return f"an answer without a visible character ({counted(len(answer.ids), 'token')})"
        return fault_of(answer.text, ())

    def _time(self, answer: Answer) -> None:
        """The first token comes with the prompt. The longest answer so far gives the best measurement."""
        if len(answer.ids) > 1 and answer.seconds > 0:
            self.tokens_per_second = len(answer.ids) / answer.seconds

    def _long_tokens(self) -> int:
        wanted = LONG_TOKENS
        if self.tokens_per_second:
            wanted = max(LEAST_LONG_TOKENS, min(wanted, int(LONG_SECONDS * self.tokens_per_second / 2)))
        longest = max(len(self.tokenizer.encode(prompt)) for prompt in LONG_PROMPTS) + 1
        return wanted if self.context is None else max(1, min(wanted, self.context - longest - 1))

    def _as_ids(self, prompt: str) -> Sequence[int]:
        """Some tokens for a server without a tokenizer: any will do."""
        return [1 + byte for byte in prompt.encode()]


def sampling_of(subject: Subject) -> dict[str, float]:
    """The sampling that the model's authors set in generation_config.json, with temperature 0.7 by default."""
    try:
        settings = read_json(subject.folder / "generation_config.json", "")
    except InputError:
        settings = {}
    found = {
        name: settings[name]
        for name in _SAMPLING
        if isinstance(settings.get(name), int | float) and not isinstance(settings[name], bool)
    }
    return {**DEFAULT_SAMPLING, **found} if found.get("temperature", 1) else {**found, **DEFAULT_SAMPLING}
