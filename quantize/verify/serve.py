"""The stage `serve`: a real server loads the checkpoint, and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import EnvironmentLack, InputError
from ..recipe.heads import is_tied
from ..recipe.roles import Role, text_config
from ..serving.faults import Situation, known_faults
from ..serving.http import ServerError
from ..serving.kernels import Arithmetic
from ..serving.log import LogFacts, parse_log
from ..serving.machine import gpus
from ..serving.server import ServeOptions, Server, ServerDied, serving
from .degeneration import LEAST_TOKENS
from .report import Check, Finding, not_applicable
from .served_answers import Answers
from .served_logprobs import Emulate, SourceFigures, compare_logprobs, knows_text, too_few
from .served_memory import check_memory, forecast_weights
from .served_tokens import OwnTokenizer, check_tokens
from .subject import Subject

STAGE = "serve"
_SAID = {"w4a4": "W4A4", "weight_only": "weights only"}


def serve_checks(
    subject: Subject,
    options: ServeOptions,
    emulate: Emulate | None,
    ids: Sequence[int] | None,
    folder: Path,
    progress: Callable[[str], None],
) -> Iterator[Check]:
    """Every check of the stage, each yielded when it is done; see `ServeStage`."""
    yield from ServeStage(subject, options, emulate, ids, folder, progress).run()


class ServeStage:
    """One run of the stage.

    Args:
        subject: the checkpoint; whether it can be read for what it is does not matter before `logprobs`.
        emulate: gives the natural-log likelihood of each id but the first under an arithmetic, from the files alone;
            None where the numbers cannot be compared.
        ids: a reference text, framed as the model wants it; None where there is none.
        folder: where the server's log is kept.
        progress: called with what is going on, in words.
        source: what was measured of the source: where it knows no text, as with random weights, none is asked of the
            checkpoint, and where its own tokens are noise in 16 bits, none is held.
        capability: compute capability of the GPU, for hints about known faults; None for this machine's own.
    """

    def __init__(
        self,
        subject: Subject,
        options: ServeOptions,
        emulate: Emulate | None,
        ids: Sequence[int] | None,
        folder: Path,
        progress: Callable[[str], None],
        source: SourceFigures | None = None,
        capability: tuple[int, int] | None = None,
    ) -> None:
        self._subject, self._options, self._emulate = subject, options, emulate
        self._ids = None if ids is None else list(ids)
        self._folder, self._progress = folder, progress
        self._source, self._capability = source, capability
        self._hints: list[str] = []
        self._tokenizer = OwnTokenizer(subject.folder)
        self._facts = LogFacts()
        self._forecast = forecast_weights(subject, options.tensor_parallel)
        self._answers: Answers | None = None
        self._comparison: Callable[[], Finding] | None = None
        self._logprobs: dict[str, Any] | None = None
        self._server: Server | None = None

    @property
    def document(self) -> dict[str, Any]:
        """What was seen so far: the part `serve` of a report's document (docs/serving.md, "Document")."""
        server, facts, answers = self._server, self._facts, self._answers
        arithmetic = self._arithmetic() or (self._logprobs or {}).get("arithmetic")
        kernel = None
        if facts.kernels or arithmetic:
            kernel = {
                "class": ", ".join(kernel.name for kernel in facts.kernels) or None,
                "arithmetic": arithmetic,
                "words": self._kernel_words(),
            }
        return {
            "server": {
                "vllm": facts.version,
                "command": server.command if server else "",
                "url": self._options.url,
                "ready_seconds": round(server.ready_seconds, 1) if server and server.process else None,
            },
            "kernel": kernel,
            "attention": facts.attention,
            "memory": {
                "reported_bytes": facts.weights_bytes,
                "forecast_bytes": self._forecast,
                "kv_tokens": facts.kv_tokens,
                "kv_bytes": facts.kv_bytes,
                "max_model_len": facts.max_model_len,
            },
            "answers": answers.document if answers else [],
            "logprobs": self._logprobs,
            "decode_tokens_per_second": answers.tokens_per_second if answers else None,
            "hints": list(dict.fromkeys(self._hints)),
        }

    def run(self) -> Iterator[Check]:
        """Start the server, ask it, end it; each check is yielded when it is done.

        After a failure to answer at all it is asked nothing more; likelihoods that it gave before are still compared.

        Raises:
            InputError, EnvironmentLack: see `serving`.
        """
        try:
            with serving(self._subject.folder, self._options, self._folder, self._progress) as server:
                self._server = server
                yield from self._ask(server)
        except ServerDied as death:
            self._read_log(death.log)
            looked_at = f"vLLM {self._facts.version}" if self._facts.version else "vLLM"
            self._hints += [death.hint] if death.hint else []
            self._hints += self._known_faults()
            # vLLM does not say which file is damaged.
            yield Check(
                STAGE, "start", Finding(f"{looked_at} did not become ready", [str(death), *self._subject.damaged])
            )
        if self._comparison is not None:
            # Only now, with the server ended, is its memory free for the emulation: vLLM takes nearly all of a GPU.
            self._progress("serve: comparing likelihoods")
            yield Check(STAGE, "logprobs", self._comparison())

    def _ask(self, server: Server) -> Iterator[Check]:
        self._facts = server.facts
        self._hints += server.notes + list(self._facts.warnings) + self._known_faults()
        is_literate = knows_text(self._subject, self._source)
        self._answers = Answers(self._subject, self._tokenizer, server.client, self._facts.max_model_len, is_literate)
        checks: dict[str, Callable[[], Finding | None]] = {
            "start": lambda: self._start(server),
            "kernel": self._kernel,
            "memory": lambda: self._memory(server),
            "tokens": lambda: check_tokens(
                self._subject, self._tokenizer, server.client, self._fitting_ids(), self._hints
            ),
            "answers": self._answers.check_answers,
            "logprobs": lambda: self._ask_logprobs(server),
            "degeneration": self._degeneration,
        }
        for name, check in checks.items():
            self._progress(f"serve: {name}")
            try:
                finding = check()
            except ServerError as error:
                told = server.explain(error)
                yield Check(STAGE, name, Finding("the server did not answer", [str(told)]))
                if told is not error:
                    return
                continue
            if finding is not None:
                yield Check(STAGE, name, finding)

    def _start(self, server: Server) -> Finding:
        version = f"vLLM {self._facts.version or 'of unknown version'}"
        if server.process is None:
            return Finding(f"{version} answers at {server.url} as {server.model}")
        looked_at = f"{version}, ready after {server.ready_seconds:.0f} s"
        if self._facts.max_model_len is not None:
            looked_at += f", requests of up to {self._facts.max_model_len:,} tokens"
        if self._facts.kv_tokens is not None:
            looked_at += f", KV cache for {self._facts.kv_tokens:,}"
        return Finding(f"{looked_at}; {self._kernel_words()}", self._facts.faults)

    def _kernel(self) -> Finding:
        asked = self._asked()
        if self._options.url is not None:
            return not_applicable("a server that ran already does not say what it computes with; logprobs tells")
        if not self._facts.kernels:
            return Finding("no kernel for NVFP4", ["the server took no layer for NVFP4, as its log has it"])
        faults = [
            f"{kernel.name} rounds inputs, but the checkpoint is for weights only"
            for kernel in self._facts.kernels
            if kernel.arithmetic == "w4a4" and "w4a4" not in asked
        ]
        said = self._kernel_words()
        if "w4a4" in asked and self._arithmetic() == "weight_only":
            said += "; the checkpoint is W4A4, but this server uses its weights alone, not its input scales"
        return Finding(said, faults)

    def _memory(self, server: Server) -> Finding:
        tree = server.process.memory_bytes() if server.process else 0
        return check_memory(self._subject, self._facts, self._forecast, server.is_cpu, tree)

    def _ask_logprobs(self, server: Server) -> Finding | None:
        """Keep what the server says, to be compared when it has ended; why not, where nothing is to compare."""
        ids, emulate = self._fitting_ids(), self._emulate
        nothing = too_few(ids, self._arithmetics())
        if nothing is not None:
            return nothing
        if emulate is None:
            return not_applicable("the checkpoint's numbers cannot be computed here")
        assert ids is not None
        self._comparison = partial(self._compare, emulate, ids, server.client.prompt_logprobs(ids))
        return None

    def _compare(self, emulate: Emulate, ids: list[int], served: Sequence[float]) -> Finding:
        try:
            emulated = {arithmetic: emulate(ids, arithmetic) for arithmetic in self._arithmetics()}
        except (InputError, EnvironmentLack) as refusal:  # a model that cannot be walked may be served all the same
            return not_applicable(f"the checkpoint's numbers cannot be computed here ({refusal})")
        finding, self._logprobs = compare_logprobs(self._subject, served, emulated, self._source)
        return finding

    def _arithmetics(self) -> list[Arithmetic]:
        """What the server may compute: what it said, or whatever the checkpoint allows."""
        said = self._arithmetic()
        if said is not None:
            return [said]
        return ["w4a4", "weight_only"] if "w4a4" in self._asked() else ["weight_only"]

    def _degeneration(self) -> Finding:
        assert self._answers is not None
        if self._source is not None and not knows_text(self._subject, self._source):
            return not_applicable(
                f"the source itself knows no text ({self._source.nll:.2f} nats a token), so none is asked for"
            )
        if self._facts.max_model_len is not None and self._facts.max_model_len < 2 * LEAST_TOKENS:
            return not_applicable(f"requests of {self._facts.max_model_len} tokens are too short to judge")
        return self._answers.check_degeneration()

    def _fitting_ids(self) -> list[int] | None:
        """As much of the reference text as the server takes; a request makes one token besides."""
        limit = self._facts.max_model_len
        return self._ids if self._ids is None or limit is None else self._ids[: limit - 1]

    def _asked(self) -> frozenset[Arithmetic]:
        """What the checkpoint's layers are for."""
        matrices = self._subject.matrices.values()
        return frozenset("w4a4" if matrix.has_input_scale else "weight_only" for matrix in matrices)

    def _arithmetic(self) -> Arithmetic | None:
        """What the server computes; None where it does not say, or names a kernel that is not known."""
        found = {kernel.arithmetic for kernel in self._facts.kernels}
        if not found or None in found:
            return None
        return "w4a4" if "w4a4" in found else "weight_only"

    def _kernel_words(self) -> str:
        if self._facts.kernels:
            return "; ".join(kernel.words for kernel in self._facts.kernels)
        if self._logprobs is not None:
            return f"unknown; its likelihoods are those of {_SAID[self._logprobs['arithmetic']]}"
        return "unknown"

    def _read_log(self, log: Path) -> None:
        self._facts = parse_log(log.read_text(errors="replace"))

    def _gpu_capability(self) -> tuple[int, int] | None:
        if self._capability is not None or self._options.url is not None or (self._server and self._server.is_cpu):
            return self._capability
        return next((gpu.capability for gpu in gpus()), None)

    def _known_faults(self) -> list[str]:
        subject, options = self._subject, self._options
        roles = set(subject.roles.values())
        situation = Situation(
            vllm=self._facts.version,
            capability=self._gpu_capability(),
            is_cpu=bool(self._server and self._server.is_cpu),
            model_type=str(text_config(subject.config).get("model_type") or ""),
            layout=subject.layout.name,
            arithmetics=self._asked(),
            is_tied=is_tied(subject.config),
            has_experts=Role.EXPERT in roles,
            kv_cache_dtype=options.kv_cache_dtype,
            columns_per_rank=frozenset(
                matrix.cols // (options.tensor_parallel if module.endswith(("o_proj", "down_proj")) else 1)
                for module, matrix in subject.sound.items()
            ),
            kernel=self._facts.kernels[0].name if self._facts.kernels else None,
        )
        return [f"{fault.hint} ({fault.source})" for fault in known_faults(situation)]
