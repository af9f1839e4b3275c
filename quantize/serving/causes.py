"""The cause of a failed start: the one line of a log that reports it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .log import Line, read_log

MOST_CHARACTERS = 400
# Each of these is what another process says of an error that was told before.
_DERIVED = re.compile(
    r"Engine core initialization failed|WorkerProc initialization failed|EngineDeadError|Engine core proc|"
    r"See root cause above|cancelled by|died unexpectedly"
)
_UNTELLING = ("KeyboardInterrupt", "SystemExit", "CancelledError", "BrokenPipeError", "ConnectionResetError")
# The last line of a traceback, a failed argument, or what the system says of a process.
_ERROR = re.compile(
    r"^(?:[A-Za-z_][\w.]*\.)?(?P<kind>[A-Z]\w*(?:Error|Exception|Interrupt|Exit|NotFound))(?::|$)|"
    r"^\S+: error: |^(?:Segmentation fault|Killed|Aborted|Fatal Python error)|"
    r"^\S+: (?:No such file or directory|Permission denied|command not found)$|^terminate called after"
)
_END_OF_MESSAGE = re.compile(r"^\s*$|^\s*For further information|^Traceback|^\s+File \"|^During handling|^The above")
_FRAME = re.compile(r'^\s+File "[^"]*", line \d+, in (\w+)')
MOST_LINES = 8


def root_cause(text: str) -> str | None:
    """The line of a failed start's log that reports the cause, with its further lines. None where no line does.

    The process that loads the model knows the cause. Its last error counts, then the engine's, then any. The server's
    own last error, "Engine core initialization failed", is never the cause.
    """
    lines = read_log(text)
    found = [at for at, line in enumerate(lines) if _tells(line)]
    for process in ("Worker", "EngineCore"):
        if own := [at for at in found if lines[at].process == process]:
            return _message(lines, own[-1])
    return _message(lines, found[-1]) if found else None


def _tells(line: Line) -> bool:
    match = _ERROR.search(line.text)
    if match is None or _DERIVED.search(line.text):
        return False
    return match["kind"] not in _UNTELLING


def _message(lines: Sequence[Line], at: int) -> str:
    """An error with its further lines, on one line and short enough to read."""
    parts = [lines[at].text.strip()]
    if match := re.fullmatch(r"[\w.]+:?", parts[0]):  # an error without words: the function that raised it tells more
        frames = (_FRAME.search(line.text) for line in reversed(lines[:at]))
        parts[0] = match[0].rstrip(":") + next((f" in {frame[1]}" for frame in frames if frame), "")
    for line in lines[at + 1 : at + MOST_LINES]:
        if line.process != lines[at].process or line.level != lines[at].level or _END_OF_MESSAGE.search(line.text):
            break
        parts.append(line.text.strip())
    whole = re.sub(r"^(?:\w+\.)+(?=\w+(?:Error|Exception))", "", " ".join(" ".join(parts).split()))
    return whole if len(whole) <= MOST_CHARACTERS else f"{whole[:MOST_CHARACTERS].rstrip()} …"
