"""A vLLM server on a checkpoint: started, awaited, and ended whatever happens."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.config_values import config_int
from ..checkpoint.source import read_json
from ..errors import CheckFailed, InputError
from ..format.declared import ALGORITHMS
from ..format.schemes import NVFP4_A16
from ..plan.forecast import kv_cache_bytes
from ..quoting import shell_without_secrets
from ..recipe.roles import share_of_experts, text_config
from .causes import root_cause
from .client import Client
from .command import VllmCommand, find_vllm, has_gpu
from .environment import CPU_FLAGS, own_settings, server_environment
from .faults import LOAD_CHECK_REFUSES_WEIGHT_ONLY, hint_for
from .http import ServerError, ServerGone
from .log import LogFacts, parse_log, phase_of
from .process import ServerProcess

Progress = Callable[[str], None]

LOG_NAME = "vllm.log"
HOST = "127.0.0.1"
# Enough for a proof, and little enough for the KV cache beside any model that fits at all.
DEFAULT_CONTEXT = 4096
READY_SECONDS = 1800.0
POLL_SECONDS = 0.25
PORT_ATTEMPTS = 3
DYING_SECONDS = 10.0  # an engine that died takes its server down with it, but not at once
# Without it vLLM serves a checkpoint that lacks a tensor, from uninitialised memory and without a word.
LOAD_CHECK = '--model-loader-extra-config={"enable_weights_track": true}'
NO_LOAD_CHECK = (
    "vLLM's check for tensors that were not loaded is off: it refuses every weight-only checkpoint in the modelopt "
    "layout, and weight-only experts in both, because it expects an input scale there (the stage structure finds "
    "missing tensors instead)"
)
# What nvquant itself decides.
_OWN_FLAGS = {
    "--model": "nvquant passes the checkpoint",
    "--host": "the server listens only on this machine",
    "--port": "nvquant takes a free port",
    "--served-model-name": "nvquant uses the checkpoint's name",
    "--tensor-parallel-size": "nvquant's own --tensor-parallel sets it",
    "-tp": "nvquant's own --tensor-parallel sets it",
    "--max-model-len": "nvquant's own --max-model-len sets it",
    "--kv-cache-dtype": "nvquant's own --kv-cache-dtype sets it",
    "--model-loader-extra-config": "the check for tensors that were not loaded is always on",
}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "tokenizer_config.json")


@dataclass(frozen=True)
class ServeOptions:
    """The options of a server.

    Attributes:
        vllm: a command line. None for the one that `find_vllm` finds.
        url: of a running server. Nothing is started then.
        tensor_parallel: GPUs that share the weights.
        max_model_len: tokens of the longest request. None for 4096, or the model's own limit where it is less.
        kv_cache_dtype: vLLM's name.
        flags: further ones, as `--name=value`, or name and value as two words.
        ready_seconds: to wait for the server, at most.
        request_seconds: to wait for one answer, at most.
        port: a fixed one instead of a free one.
    Raises:
        InputError: `url` together with `vllm` or `flags`.
    """

    vllm: str | None = None
    url: str | None = None
    tensor_parallel: int = 1
    max_model_len: int | None = None
    kv_cache_dtype: str = "auto"
    flags: tuple[str, ...] = ()
    ready_seconds: float = READY_SECONDS
    request_seconds: float = 600.0
    port: int | None = None

    def __post_init__(self) -> None:
        """Refuse options for starting a server beside the address of a running one."""
        if self.url is not None and (self.vllm is not None or self.flags):
            raise InputError(
                "--url uses a running server, so --vllm and --vllm-flag have no effect",
                where="--url",
                hint="Drop one of them",
            )


class ServerDied(CheckFailed):
    """A server that ended before it was ready, or was not ready in time. The message names the cause and the way out.

    Attributes:
        cause: the line of its log that reports the cause.
        known_hint: the way out as a phrase, where one is known.
        log: the complete log.
    """

    def __init__(self, doing: str, cause: str, hint: str | None, log: Path) -> None:
        super().__init__(
            f"{cause.rstrip('.')}.", where=f"vLLM {doing}", hint=_capital(hint) if hint else f"The log is {log}"
        )
        self.cause, self.known_hint, self.log = cause, hint, log


@dataclass
class Server:
    """A server that answers, and lives as long as the `serving` block around it.

    Attributes:
        client: for requests to it.
        url: its address.
        model: the name under which it serves.
        command: the shell command that started it, settings first. Empty for one that ran already.
        log: of a server that was started here.
        process: likewise.
        ready_seconds: from the start until it answered, or 0 for one that ran already.
        is_cpu: whether it computes on a CPU. None where that is unknown.
        notes: for the reader of the results.
    """

    client: Client
    url: str
    model: str
    command: str = ""
    log: Path | None = None
    process: ServerProcess | None = None
    ready_seconds: float = 0.0
    is_cpu: bool | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def facts(self) -> LogFacts:
        """The facts in the log so far, or for a server that ran already, those that it reports on request."""
        if self.log is not None:
            return parse_log(self.log.read_text(errors="replace"))
        limit = next((model.max_model_len for model in self.client.models()), None)
        return LogFacts(
            version=self.client.version(),
            kv_tokens=self.client.kv_cache_tokens(),
            max_model_len=limit,
        )

    def explain(self, error: ServerError) -> CheckFailed:
        """The error to report for a failed request: the cause of the server's end, if it ended."""
        if self.process is None:
            return error
        deadline = time.monotonic() + DYING_SECONDS
        while self.process.exit_code is None:
            if time.monotonic() > deadline or (self.client.is_healthy() and not isinstance(error, ServerGone)):
                return error
            time.sleep(POLL_SECONDS)
        return _death("ended during a request", self.process)


@contextmanager
def serving(checkpoint: Path, options: ServeOptions, folder: Path, progress: Progress) -> Iterator[Server]:
    """Run a server for a checkpoint folder, ready for requests, until the block ends.

    All its processes end with the block, by an error or a signal too, and even if nvquant is killed.

    Args:
        folder: for its log, `vllm.log`. Created if it does not exist.
        progress: called with the server's phase, in words.
    Raises:
        InputError: a flag that nvquant sets itself, no such program, an address where nobody answers, a port in use.
        EnvironmentLack: no vLLM.
        ServerDied: it ended, or was not ready in time.
    """
    if options.url is not None:
        yield _running(options)
        return
    _refuse_own_flags(options.flags)
    vllm = find_vllm(options.vllm)
    folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, PORT_ATTEMPTS + 1):
        server = _start(checkpoint.resolve(), vllm, options, folder.resolve())
        assert server.process is not None
        try:
            try:
                _wait(server, server.process, options, progress)
            except _PortTaken as taken:
                if attempt == PORT_ATTEMPTS or options.port is not None:
                    raise taken.death from None
                continue
            yield server
            return
        finally:
            server.process.end()


class _PortTaken(Exception):
    """Another program took the port between our choosing it and the server's."""

    def __init__(self, death: ServerDied) -> None:
        self.death = death


def _running(options: ServeOptions) -> Server:
    assert options.url is not None
    client = Client(options.url, "", options.request_seconds)
    try:
        models = client.models()
    except ServerGone as error:
        raise InputError(f"--url {options.url}: no server answers there ({error})") from error
    if not models:
        raise InputError("the server there serves no model", where=f"--url {options.url}", hint="name another one")
    client.model = models[0].id
    return Server(client, client.url, client.model)


def _start(checkpoint: Path, vllm: VllmCommand, options: ServeOptions, folder: Path) -> Server:
    config = read_json(checkpoint / "config.json", "every checkpoint has one")
    is_cpu = vllm.is_cpu_build or not has_gpu()
    context = options.max_model_len or min(DEFAULT_CONTEXT, _own_limit(config))
    port = options.port or _free_port()
    if options.port is not None:
        _refuse_taken(options.port)
    name = checkpoint.name
    flags = [
        f"--host={HOST}",
        f"--port={port}",
        *("--served-model-name", name, _mark(port)),
        f"--max-model-len={context}",
        f"--kv-cache-dtype={options.kv_cache_dtype}",
    ]
    flags += [f"--tensor-parallel-size={options.tensor_parallel}"] if options.tensor_parallel > 1 else []
    flags += [] if any((checkpoint / file).is_file() for file in _TOKENIZERS) else ["--skip-tokenizer-init"]
    flags += CPU_FLAGS if is_cpu else ()
    skips_check = LOAD_CHECK_REFUSES_WEIGHT_ONLY and _expects_input_scales(checkpoint, config)
    flags += [*options.flags, *([] if skips_check else [LOAD_CHECK])]
    settings = own_settings(
        is_cpu, kv_cache_bytes(config, context), options.tensor_parallel, options.ready_seconds
    )  # fmt: skip
    words = vllm.serve(str(checkpoint), flags)
    environment = server_environment(settings, words[0])
    shown = [*(f"{key}={environment[key]}" for key in settings), *words]
    client = Client(f"http://{HOST}:{port}", name, options.request_seconds)
    process = ServerProcess(words, environment, folder / LOG_NAME)
    notes = [NO_LOAD_CHECK] if skips_check else []
    return Server(client, client.url, name, shell_without_secrets(shown), process.log, process, 0.0, is_cpu, notes)


def _wait(server: Server, process: ServerProcess, options: ServeOptions, progress: Progress) -> None:
    """Until the server answers, telling what it does meanwhile."""
    started = time.monotonic()
    watch = _LogWatch(process.log, progress)
    progress("starting vLLM")
    while not server.client.is_healthy():
        watch.look()
        if process.exit_code is not None:
            death = _death(f"stopped while {watch.phase}", process)
            raise _PortTaken(death) if "ddress already in use" in death.cause else death
        if time.monotonic() - started > options.ready_seconds:
            cause = f"it was still {watch.phase} after {options.ready_seconds:.0f} s"
            raise ServerDied("was not ready in time", cause, "give it more time with --ready-seconds", process.log)
        time.sleep(POLL_SECONDS)
    server.ready_seconds = time.monotonic() - started
    if _mark(int(server.url.rpartition(":")[2])) not in {model.id for model in server.client.models()}:
        cause = f"another program answers on port {server.url.rpartition(':')[2]}"
        raise _PortTaken(ServerDied("could not listen", cause, "run the command again", process.log))


class _LogWatch:
    """Reads what a log gained, and tells each new phase."""

    def __init__(self, log: Path, progress: Progress) -> None:
        self._log, self._progress = log, progress
        self._at = 0
        self._part = ""
        self.phase = "starting"

    def look(self) -> None:
        with self._log.open("rb") as file:
            file.seek(self._at)
            content = file.read()
        self._at += len(content)
        lines = (self._part + content.decode(errors="replace")).replace("\r", "\n").split("\n")
        self._part = lines.pop()
        for line in lines:
            phase = phase_of(line)
            if phase is not None and phase != self.phase:
                self.phase = phase
                self._progress(f"vLLM: {phase}")


def _death(doing: str, process: ServerProcess) -> ServerDied:
    log = process.read_log()
    cause = root_cause(log)
    if cause is None and (name := process.signal_name):
        cause = f"ended by {name}"
    if cause is None:
        last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "nothing was logged")
        cause = f"it exited with code {process.exit_code}, its log ends with: {last[:300]}"
    known = hint_for(cause)
    return ServerDied(doing, cause, known.hint if known else None, process.log)


def _refuse_own_flags(flags: tuple[str, ...]) -> None:
    for flag in flags:
        name = flag.partition("=")[0].replace("_", "-")
        if name in _OWN_FLAGS:
            raise InputError(f"{_OWN_FLAGS[name]}", where=f"--vllm-flag {name}", hint="Drop the flag")


def _expects_input_scales(checkpoint: Path, config: Mapping[str, Any]) -> bool:
    """Whether vLLM would wait for input scales of weight-only matrices: all in the modelopt layout, and experts in the
    other. Weight-only matrices may stand beside others."""
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping) and (checkpoint / "hf_quant_config.json").is_file():
        stored = {
            "quant_method": "modelopt",
            **(read_json(checkpoint / "hf_quant_config.json", "").get("quantization") or {}),
        }
    if not isinstance(stored, Mapping):
        return False
    if stored.get("quant_method") != "modelopt" and not share_of_experts(text_config(config)):
        return False
    groups = stored.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    layers = stored.get("quantized_layers")
    entries = [stored, *(layers.values() if isinstance(layers, Mapping) else ())]
    named = {str(entry.get("quant_algo")).upper() for entry in entries if isinstance(entry, Mapping)}
    return ALGORITHMS[NVFP4_A16.name] in named or any(group.get("input_activations") is None for group in groups)


def _own_limit(config: Mapping[str, Any]) -> int:
    return config_int(text_config(config), "max_position_embeddings", DEFAULT_CONTEXT)


def _mark(port: int) -> str:
    """A second name for the model, which distinguishes our server from another that has our port."""
    return f"nvquant-{port}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(
                f"Port {port} is in use by another program", hint="choose another port, or end that program"
            ) from error


def _capital(text: str) -> str:
    """A hint as a sentence. Names such as vLLM and config.json keep their letters."""
    first = text.split(maxsplit=1)[0]
    return text[:1].upper() + text[1:] if first.isalpha() and first.islower() else text
