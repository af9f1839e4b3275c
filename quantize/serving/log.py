"""The reader of vLLM's log: the facts of a start, its phase, and its faults.

Source of the lines: vLLM 0.24.0 and 0.32.0, seen in real starts. Those of GPUs were also seen in its code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .kernels import Kernel, kernel_named

GIB = 1 << 30
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PROCESS = re.compile(r"^\((?P<name>[A-Za-z]\w*?)(?:[-_]\w+)* pid=\d+\) ?")
_STAMP = re.compile(r"^(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?")


@dataclass(frozen=True)
class Line:
    """A line without its prefixes.

    Attributes:
        process: `APIServer`, `EngineCore`, `Worker`. Empty where the line names none.
        level: `INFO`, `ERROR`, … Empty where the line names none.
    """

    process: str
    level: str
    text: str


@dataclass(frozen=True)
class LogFacts:
    """The facts about the server in a log. Missing facts are None or empty.

    Attributes:
        kernels: of quantized linear layers, in the order in which they were chosen.
        weights_bytes: of one worker, of the heaviest where there are several.
        kv_bytes: of one worker's KV cache.
        kv_tokens: that fit into the KV cache.
        warnings: known to matter to the reader of a verification, in words.
        faults: words for warnings after which the server's results do not match the files.
    """

    version: str | None = None
    kernels: tuple[Kernel, ...] = ()
    weights_bytes: int | None = None
    kv_bytes: int | None = None
    kv_tokens: int | None = None
    max_model_len: int | None = None
    attention: str | None = None
    warnings: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


# Phases that a user understands, each by a line with which it begins. The last that matches is the current one.
PHASES: tuple[tuple[str, str], ...] = (
    (r"non-default args", "reading the configuration"),
    (r"Initializing a V1 LLM engine", "starting the engine"),
    (r"Starting to load model", "building the model"),
    (r"Loading [\w ]*shards?:\s*(\d+)%", "loading weights"),
    (r"Loading weights took", "preparing weights"),
    (r"Dynamo bytecode|Compiling a graph|torch\.compile takes|Start compiling", "compiling"),
    (r"Initial profiling|Memory profiling|Profiling|Available KV cache memory|KV cache size", "measuring memory"),
    (r"Capturing CUDA graphs?[^:]*:\s*(\d+)%|Capturing CUDA graphs?", "capturing CUDA graphs"),
    (r"Starting vLLM (API )?server|Application startup", "opening the port"),
)
_PHASES = tuple((re.compile(pattern), words) for pattern, words in PHASES)

FAULTS: tuple[tuple[str, str], ...] = (
    (
        r"weight global scale is different",
        "the matrices of a fused group have different weight global scales: vLLM uses one for all, and decodes the "
        "others wrongly",
    ),
    (
        r"input global scale is different",
        "the matrices of a fused group have different input global scales: vLLM uses one for all",
    ),
)
WARNINGS: tuple[tuple[str, str], ...] = (
    (
        r"Marlin requires thread-tile padding",
        "Marlin pads weights whose shapes are not multiples of its tiles: they take more memory than on disk",
    ),
    (
        r"falling back to the slow and unoptimized emulation",
        "vLLM found no kernel for this GPU and emulates FP4 in software, which is slow",
    ),
    (
        r"has no kernel for this linear layer type; using automatic selection",
        "the requested linear backend has no NVFP4 kernel here: vLLM chose another",
    ),
    (
        r"Using KV cache scaling factor 1\.0",
        "the FP8 KV cache has no calibrated scales: vLLM uses 1.0",
    ),
)


def read_line(raw: str) -> Line:
    """A line of a log without colours, process and time."""
    text = _ESCAPE.sub("", raw.rstrip("\r\n")).rpartition("\r")[2]
    process = ""
    if match := _PROCESS.match(text):
        process, text = match["name"], text[match.end() :]
    process = "Worker" if "Worker" in process else process
    level = ""
    if match := _STAMP.match(text):
        level, text = match["level"], text[match.end() :]
    return Line(process, level, text)


def read_log(text: str) -> list[Line]:
    """Every line of a log. Of a progress bar, which overwrites each state, it is the last state."""
    return [read_line(raw) for raw in text.split("\n")]


def parse_log(text: str) -> LogFacts:
    """The facts in a log, complete or not."""
    lines = [line.text for line in read_log(text)]
    kernels = dict.fromkeys(_all(lines, r"Using (\w+) for NVFP4 GEMM|Selected (\w*FP8\w*|\w*Fp8\w*) for \w+"))
    weights = _all(lines, r"Model loading took ([\d.,]+) GiB")
    return LogFacts(
        version=_first(lines, r"version (\d+\.\d+\S*)$") or _first(lines, r"LLM engine \(v([^)\s]+)\)"),
        kernels=tuple(kernel_named(name) for name in kernels),
        weights_bytes=max((_gib(value) for value in weights), default=None),
        kv_bytes=_optional_gib(_first(lines, r"Available KV cache memory: ([\d.,]+) GiB")),
        kv_tokens=_integer(_first(lines, r"KV cache size: ([\d,]+) tokens")),
        max_model_len=_integer(
            _first(lines, r"Auto-fit max_model_len: reduced from [\d,]+ to ([\d,]+)")
            or _first(lines, r"Using max model len ([\d,]+)")
        ),
        attention=_attention(lines),
        warnings=_said(lines, WARNINGS),
        faults=_said(lines, FAULTS),
    )


def phase_of(line: str) -> str | None:
    """The phase that a raw line announces, such as `loading weights 42 %`. None for any other line."""
    text = read_line(line).text
    found = None
    for pattern, words in _PHASES:
        if match := pattern.search(text):
            percent = next((group for group in match.groups() if group and group.isdigit()), None)
            found = f"{words} {percent} %" if percent else words
    return found


def _attention(lines: Iterable[str]) -> str | None:
    lines = list(lines)
    return (
        _first(lines, r"Using (\w+) (?:attention )?backend(?: |\.|$)")
        or _first(lines, r"Using AttentionBackendEnum\.(\w+) backend")
        or _first(lines, r"forcing (\w+) backend")
    )


def _said(lines: list[str], known: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(words for pattern, words in known if _first(lines, f"({pattern})") is not None)


def _all(lines: Iterable[str], pattern: str) -> list[str]:
    search = re.compile(pattern).search
    return [match[match.lastindex or 0] for line in lines if (match := search(line))]


def _first(lines: Iterable[str], pattern: str) -> str | None:
    return next(iter(_all(lines, pattern)), None)


def _integer(text: str | None) -> int | None:
    return None if text is None else int(text.replace(",", ""))


def _gib(text: str) -> int:
    return round(float(text.replace(",", "")) * GIB)


def _optional_gib(text: str | None) -> int | None:
    return None if text is None else _gib(text)
