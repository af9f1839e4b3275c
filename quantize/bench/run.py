"""The benchmark: one server after the other, one point after the other, each on disk as soon as it is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckFailed, InputError
from ..plan.ceiling import Ceiling
from ..serving.address import is_local
from ..serving.answers import Meta
from ..serving.client import Client
from ..serving.faults import known_faults
from ..serving.http import ServerError
from ..serving.machine import Gpu, used_bytes
from ..serving.server import ServeOptions, Server, ServerDied, serving
from .document import Results
from .grid import Grid, Point, Target
from .load import Load, LoadFailed, LoadGenerator, Measured
from .subject import Subject

Progress = Callable[[str], None]
AS_SERVED = "as served"
WARM_UP_TOKENS = 8
# A prompt that the server has seen before costs it nothing, which is not what is to be measured.
NO_PREFIX_CACHE = "--no-enable-prefix-caching"


@dataclass(frozen=True)
class Setting:
    """The settings that all servers have in common.

    Attributes:
        options: for starting them. The KV cache's dtype and the longest request come from `kv_cache_dtypes` and the
            grid.
        kv_cache_dtypes: each checkpoint is served once for each of them.
        gpus: on which they compute.
        bandwidth: bytes a second of all of these. None where it is unknown.
    """

    options: ServeOptions
    kv_cache_dtypes: tuple[str, ...]
    grid: Grid
    generator: LoadGenerator
    gpus: Sequence[Gpu]
    bandwidth: float | None


class Bench:
    """One run of a benchmark.

    Args:
        targets: the first is the checkpoint whose tokenizer counts for servers without a checkpoint here.
        folder: for results and logs.
        head: of the document.
    Raises:
        InputError: a point is too long, nobody answers at an address, or the folder already contains results.
    """

    def __init__(
        self, targets: Sequence[Target], setting: Setting, folder: Path, head: Mapping[str, Any], progress: Progress
    ) -> None:
        self._targets, self._setting, self._folder, self._progress = targets, setting, folder, progress
        self._seed = 0
        self._refuse_too_long()
        self.results = self._results = Results(folder, head)

    def _refuse_too_long(self) -> None:
        grid, options = self._setting.grid, self._setting.options
        for target in self._targets:
            if target.url is not None:
                grid.refuse_longer_than(_served_limit(target.url), f"the limit of the server at {target.url},")
            elif target.subject is not None:
                grid.refuse_longer_than(options.max_model_len, "--max-model-len, the limit")
                grid.refuse_longer_than(target.subject.longest_context, f"the limit of {target.name},")

    def run(self) -> None:
        """Measure everything. A server that does not start fails its points, and the others go on.

        Raises:
            InputError, EnvironmentLack: there is nothing to start servers or loads with.
        """
        for target in self._targets:
            for dtype in self._setting.kv_cache_dtypes if target.url is None else (AS_SERVED,):
                self._measure(target, dtype)
        self._results.finish()

    def _measure(self, target: Target, dtype: str) -> None:
        served = _Served(target, dtype, self._targets[0], self._setting)
        shown = target.name if dtype in ("auto", AS_SERVED) else f"{target.name}, {dtype} KV cache"
        folder = self._folder / "servers" / served.slug
        folder.mkdir(parents=True, exist_ok=True)
        record = self._results.add_server(served.facts())
        try:
            with serving(served.checkpoint, served.options(), folder, lambda words: self._say(shown, words)) as server:
                self._results.update(record, served.seen(server))
                self._points(served, server, folder, record, shown)
                self._results.update(record, served.seen(server))
        except ServerDied as death:
            self._results.update(record, {"failed": str(death)})
            for point in self._setting.grid.points[self._results.measured_of(record) :]:
                self._results.add_point(record, _row(served, point) | {"failed": str(death)})

    def _points(self, served: _Served, server: Server, folder: Path, record: int, shown: str) -> None:
        warm: int | None = None
        for number, point in enumerate(self._setting.grid.points, 1):
            words = f"{point.users} user{'s' * (point.users > 1)}" + (
                f", context {point.context}" * bool(point.context)
            )
            self._say(shown, f"{words} ({number} of {len(self._setting.grid.points)})")
            load = served.load(server, point)
            try:
                if number == 1 or warm != point.context:
                    self._warm_up(load, folder / "warm-up", number == 1)
                    warm = point.context
                own = folder / f"context-{point.context or 'any'}-users-{point.users}"
                answers = self._one(load, own / "answers")
                prompts = self._one(load.changed(output_tokens=1), own / "prompts")
            except LoadFailed as failure:
                reason = server.explain(ServerError(str(failure)))
                if isinstance(reason, ServerDied):
                    raise reason from failure
                self._results.add_point(record, _row(served, point) | {"failed": str(failure)})
                continue
            self._results.add_point(record, _row(served, point) | served.figures(server, load, answers, prompts))

    def _warm_up(self, load: Load, folder: Path, is_first: bool) -> None:
        """Send the first requests of a kind, which wait for kernels to compile or tune, and are not measured."""
        users = max(self._setting.grid.users) if is_first else 1
        self._one(load.changed(users=users, requests=users, output_tokens=WARM_UP_TOKENS), folder)

    def _one(self, load: Load, folder: Path) -> Measured:
        self._seed += 1
        folder.mkdir(parents=True, exist_ok=True)
        return self._setting.generator.run(load.changed(seed=self._seed), folder)

    def _say(self, shown: str, words: str) -> None:
        self._progress(f"{shown}: {words}")


class _Served:
    """One server of the run: its facts, and the reader of its figures."""

    def __init__(self, target: Target, dtype: str, first: Target, setting: Setting) -> None:
        self.target, self.dtype, self._setting = target, dtype, setting
        assert first.subject is not None
        self._tokenizer: Subject = target.subject or first.subject
        self._subject = target.subject
        self._is_local = target.url is None or is_local(target.url)
        self._is_vllm = True
        self._ceiling: Ceiling | None = None
        if self._subject is not None:
            self._ceiling = self._subject.ceiling("auto" if dtype == AS_SERVED else dtype)

    @property
    def slug(self) -> str:
        """Name of its folder for logs."""
        words = f"{self.target.name}-{self.dtype}"
        return "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in words).strip(".")

    @property
    def checkpoint(self) -> Path:
        """The served folder."""
        return self._tokenizer.folder

    def options(self) -> ServeOptions:
        """The options of its start."""
        options = self._setting.options
        if self.target.url is not None:
            return replace(options, url=self.target.url, vllm=None, flags=())
        own = () if any("prefix-caching" in flag for flag in options.flags) else (NO_PREFIX_CACHE,)
        length = options.max_model_len or self._setting.grid.model_len(self._tokenizer)
        return replace(
            options, url=None, max_model_len=length, kv_cache_dtype=self.dtype, flags=(*options.flags, *own)
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """The facts before its start."""
        subject = self._subject
        return {
            "name": self.target.name,
            "kv_cache": self.dtype,
            "scheme": subject.scheme if subject else None,
            "checkpoint_bytes": subject.weights_bytes if subject else None,
            "read_bytes_per_token": self._ceiling.weight_bytes if self._ceiling else None,
        }

    def seen(self, server: Server) -> dict[str, Any]:
        """The facts that it reports once it runs."""
        facts = server.facts
        self._is_vllm = facts.version is not None
        file = Meta() if self._is_vllm else _meta(server.client)
        if self._ceiling is None and file.size:  # its KV cache is taken for 16 bits
            self._ceiling = Ceiling(self._tokenizer.config, file.size)
        on_gpu = self._is_local and not server.is_cpu and bool(self._setting.gpus)
        hints = []
        if self._subject is not None and (facts.version or server.process is not None):
            capability = self._setting.gpus[0].capability if self._setting.gpus else None
            situation = self._subject.situation(
                facts.version, capability, bool(server.is_cpu), self.dtype, self._setting.options.tensor_parallel
            )
            hints = [f"{fault.hint} ({fault.source})" for fault in known_faults(situation)]
        told = {"scheme": f"GGUF {file.ftype or ''}".strip(), "checkpoint_bytes": file.size} if file.size else {}
        return told | {
            "vllm": facts.version,
            "command": server.command,
            "url": self.target.url,
            "ready_seconds": round(server.ready_seconds, 1) if server.process else None,
            "kernel": ", ".join(kernel.words for kernel in facts.kernels) or None,
            "kernel_class": ", ".join(kernel.name for kernel in facts.kernels) or None,
            "attention": facts.attention,
            "weights_bytes": facts.weights_bytes,
            "kv_cache_tokens": facts.kv_tokens,
            "max_model_len": facts.max_model_len or file.n_ctx,
            "gpu_memory_bytes": used_bytes(self._setting.gpus) if on_gpu else None,
            "process_memory_bytes": server.process.memory_bytes() if server.process else None,
            "read_bytes_per_token": self._ceiling.weight_bytes if self._ceiling else None,
            "hints": [*server.notes, *hints],
        }

    def load(self, server: Server, point: Point) -> Load:
        """The load of a point."""
        grid = self._setting.grid
        return Load(
            server.url, server.model, self.checkpoint, point.context, grid.output_tokens, point.users,
            grid.requests_for(point.users), 0, grid.dataset, grid.dataset_path, self._is_vllm,
        )  # fmt: skip

    def figures(self, server: Server, load: Load, answers: Measured, prompts: Measured) -> dict[str, Any]:
        """The row of a point.

        Args:
            answers: of the load itself.
            prompts: of the same load with one token for an answer.
        """
        length, made = answers.input_tokens / answers.requests, answers.output_tokens / answers.requests
        decode = load.users * 1000 / answers.tpot_mean_ms if answers.tpot_mean_ms > 0 else None
        ceiling = None
        if self._ceiling is not None and self._setting.bandwidth and self._is_local:
            ceiling = self._ceiling.tokens_per_second(
                self._setting.bandwidth, round(length + (made - 1) / 2), load.users
            )
        return {
            "context": load.context if load.context is not None else round(length),
            "decode_tokens_per_second": _rounded(decode),
            "ceiling_tokens_per_second": _rounded(ceiling),
            "share_of_ceiling": round(decode / ceiling, 3) if decode and ceiling else None,
            "prefill_tokens_per_second": _rounded(prompts.input_tokens_per_second),
            "output_tokens_per_second": _rounded(answers.output_tokens_per_second),
            "ttft_p50_ms": _rounded(answers.ttft_p50_ms),
            "ttft_p99_ms": _rounded(answers.ttft_p99_ms),
            "itl_p50_ms": _rounded(answers.itl_p50_ms),
            "itl_p99_ms": _rounded(answers.itl_p99_ms),
            "requests": answers.requests,
            "output_tokens": round(made, 1),
            "note": _note(server.facts.kv_tokens, load, length + made, made),
        }


def _row(served: _Served, point: Point) -> dict[str, Any]:
    return {
        "name": served.target.name,
        "kv_cache": served.dtype,
        "context": point.context,
        "users": point.users,
    }


def _note(kv_tokens: int | None, load: Load, length: float, made: float) -> str | None:
    """Notes that a reader of the row needs."""
    notes = []
    if kv_tokens is not None and kv_tokens < load.users * length:
        notes.append(f"the KV cache holds {kv_tokens / length:.1f} of {load.users} users at a time, the others wait")
    if round(made) < load.output_tokens:
        notes.append(f"answers of {made:.0f} tokens, not {load.output_tokens}")
    return ", ".join(notes) or None


def _rounded(value: float | None) -> float | None:
    """To four meaningful digits, or all before the point."""
    if value is None:
        return None
    return float(f"{value:.4g}") if abs(value) < 1000 else float(round(value))


def _served_limit(url: str) -> int | None:
    client = Client(url, "")
    try:
        model = next(iter(client.models()), None)
    except CheckFailed as error:
        raise InputError(f"{url}: no server answers there ({error})") from error
    return None if model is None else model.max_model_len or (model.meta or Meta()).n_ctx


def _meta(client: Client) -> Meta:
    """The description of its file by a llama.cpp server."""
    model = next(iter(client.models()), None)
    return (model and model.meta) or Meta()
