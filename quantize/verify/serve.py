"""The stage `serve`: a real server loads the checkpoint and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import EnvironmentLack, InputError
from ..format.schemes import FP8, NVFP4
from ..serving.http import ServerError
from ..serving.log import LogFacts, parse_log
from ..serving.server import ServeOptions, Server, ServerDied, serving
from .degeneration import LEAST_TOKENS
from .report import Check, Finding, not_applicable
from .served_answers import Answers
from .served_arithmetic import ServedArithmetic, stored_arithmetics
from .served_document import serve_document
from .served_logprobs import Emulate, SourceFigures, compare_logprobs, knows_text, too_few
from .served_memory import check_memory, forecast_weights
from .served_situation import hints_of
from .served_tokens import OwnTokenizer, check_tokens
from .subject import Subject

STAGE = "serve"


def serve_checks(
    subject: Subject,
    options: ServeOptions,
    emulate: Emulate | None,
    ids: Sequence[int] | None,
    folder: Path,
    progress: Callable[[str], None],
) -> Iterator[Check]:
    """Run every check of the stage, each yielded when it is done. See `ServeStage`."""
    yield from ServeStage(subject, options, emulate, ids, folder, progress).run()


class ServeStage:
    """One run of the stage.

    Args:
        subject: the checkpoint. Before `logprobs`, it need not be sound.
        emulate: returns the natural-log likelihood of each id but the first under an arithmetic, from the files alone.
            None where the numbers cannot be compared.
        ids: a reference text, framed as the model requires. None where there is none.
        folder: for the server's log.
        progress: called with the present step, in words.
        source: numbers of the source. If it does not model text, as with random weights, the checkpoint need not
            either. If its own tokens are noise in 16 bits, the checkpoint's tokens are not compared one by one.
        capability: compute capability of the GPU, for hints about known faults. None for this machine's own.
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
        """The results so far: the part `serve` of a report's document (docs/serving.md, "Document")."""
        return serve_document(
            self._server,
            self._options.url,
            self._facts,
            self._arithmetic,
            self._forecast,
            self._answers,
            self._logprobs,
            self._hints,
        )

    def run(self) -> Iterator[Check]:
        """Start the server, send it requests, and end it. Each check is yielded when it is done.

        After a request without any answer, no more requests follow. Likelihoods that it returned before are still
        compared.

        Raises:
            InputError, EnvironmentLack: see `serving`.
        """
        try:
            with serving(self._subject.folder, self._options, self._folder, self._progress) as server:
                self._server = server
                yield from self._ask(server)
        except ServerDied as death:
            self._facts = parse_log(death.log.read_text(errors="replace"))
            looked_at = f"vLLM {self._facts.version}" if self._facts.version else "vLLM"
            self._hints += [death.known_hint] if death.known_hint else []
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
        return Finding(f"{looked_at}, kernel: {self._kernel_words()}", self._facts.faults)

    def _kernel(self) -> Finding:
        arithmetic = self._arithmetic
        if self._options.url is not None:
            return not_applicable("a running server does not report its kernel, but logprobs finds its arithmetic")
        stored = {matrix.scheme.bits for matrix in self._subject.matrices.values()}
        logged = {FP8.bits if kernel.is_fp8 else NVFP4.bits for kernel in self._facts.kernels}
        if missing := [name for bits, name in ((NVFP4.bits, "NVFP4"), (FP8.bits, "FP8")) if bits in stored - logged]:
            return Finding(
                f"no kernel for {' and '.join(missing)}",
                [f"the server's log reports no {name} layer" for name in missing],
            )
        faults = [
            f"{kernel.name} rounds inputs, but the checkpoint is weight-only"
            for kernel in self._facts.kernels
            if kernel.arithmetic == "w4a4" and "w4a4" not in arithmetic.stored
        ]
        said = self._kernel_words()
        if "w4a4" in arithmetic.stored and arithmetic.reported not in ("w4a4", None):
            said += " (the checkpoint is W4A4, but this server ignores its input scales)"
        return Finding(said, faults)

    def _memory(self, server: Server) -> Finding:
        tree = server.process.memory_bytes() if server.process else 0
        return check_memory(self._subject, self._facts, self._forecast, server.is_cpu, tree)

    def _ask_logprobs(self, server: Server) -> Finding | None:
        """Keep the server's likelihoods, to compare them after its end. Returns a finding where there is nothing to
        compare."""
        ids, emulate = self._fitting_ids(), self._emulate
        nothing = too_few(ids, self._arithmetic.possible)
        if nothing is not None:
            return nothing
        if emulate is None:
            return not_applicable("the checkpoint's numbers cannot be computed here")
        assert ids is not None
        self._comparison = partial(self._compare, emulate, ids, server.client.prompt_logprobs(ids))
        return None

    def _compare(self, emulate: Emulate, ids: list[int], served: Sequence[float]) -> Finding:
        try:
            emulated = {arithmetic: emulate(ids, arithmetic) for arithmetic in self._arithmetic.possible}
        except (InputError, EnvironmentLack) as refusal:  # a model that cannot be walked may be served all the same
            return not_applicable(f"the checkpoint's numbers cannot be computed here ({refusal})")
        finding, self._logprobs = compare_logprobs(self._subject, served, emulated, self._source)
        return finding

    def _degeneration(self) -> Finding:
        assert self._answers is not None
        if self._source is not None and not knows_text(self._subject, self._source):
            return not_applicable(f"the source itself models no text ({self._source.nll:.2f} nats a token)")
        if self._facts.max_model_len is not None and self._facts.max_model_len < 2 * LEAST_TOKENS:
            return not_applicable(f"requests of {self._facts.max_model_len} tokens are too short to judge")
        return self._answers.check_degeneration()

    def _fitting_ids(self) -> list[int] | None:
        """As much of the reference text as fits the server's context with one more token."""
        limit = self._facts.max_model_len
        return self._ids if self._ids is None or limit is None else self._ids[: limit - 1]

    @property
    def _arithmetic(self) -> ServedArithmetic:
        return ServedArithmetic(
            stored_arithmetics(self._subject),
            frozenset(matrix.scheme for matrix in self._subject.matrices.values()),
            self._facts.kernels,
        )

    def _kernel_words(self) -> str:
        return self._arithmetic.words((self._logprobs or {}).get("arithmetic"))

    def _known_faults(self) -> list[str]:
        is_cpu = bool(self._server and self._server.is_cpu)
        return hints_of(self._subject, self._options, self._facts, is_cpu, self._capability)
