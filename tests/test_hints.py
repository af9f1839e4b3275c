"""Every error names the way out in its field `hint`, so that programs get it too."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import nvquant
import pytest
from nvquant import errors
from nvquant.errors import NvquantError

ROOT = Path(nvquant.__file__).parent
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
OURS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, NvquantError)}
OURS |= {"HubError", "LoadFailed", "MissingFile", "RankLost", "ServerError", "ServerGone", "SlowPattern"}
# How many errors of a module may have no hint, by the reason.
ENDED = "another thread's error ended the run, and the user reads that one"
POINT = "a point of the benchmark fails, and its table shows the reason"
ANSWER = "a server answered wrongly, and its log or its own words are the explanation"
ENGINE = "llm-compressor is at fault, and the user can do nothing"
WRAPPED = "the sentence ends with that of another error"
STATED = "the sentence itself states the requirement or the contradiction"
FEW: dict[str, tuple[int, str]] = {
    "api/inputs.py": (2, f"{WRAPPED}, or {STATED}"),
    "bench/grid.py": (1, STATED),
    "bench/guidellm_load.py": (3, POINT),
    "bench/load.py": (2, POINT),
    "bench/run.py": (1, WRAPPED),
    "bench/vllm_load.py": (3, POINT),
    "calibrate/ids.py": (2, STATED),
    "calibrate/statistics/key_value.py": (1, STATED),
    "calibrate/statistics/moments.py": (1, STATED),
    "calibrate/statistics/ranges.py": (1, STATED),
    "checkpoint/hub/patience.py": (1, ENDED),
    "checkpoint/hub/ranges.py": (1, ENDED),
    "checkpoint/hub/shards.py": (1, ENDED),
    "checkpoint/hub/source.py": (1, STATED),
    "checkpoint/writer.py": (1, "a fault of nvquant itself"),
    "cli/bench.py": (2, STATED),
    "cli/main.py": (2, "click's own words, and the word for Ctrl-C"),
    "convert/copying.py": (1, ENDED),
    "convert/relayout.py": (2, STATED),
    "convert/second_opinion.py": (4, ENGINE),
    "publish/files.py": (1, "the system's own words"),
    "publish/refusals.py": (1, "the Hub's own words"),
    "recipe/load.py": (3, "the schema's own words"),
    "serving/client.py": (2, ANSWER),
    "serving/http.py": (4, ANSWER),
    "serving/server.py": (1, WRAPPED),
    "stream/manifest.py": (1, "the schema's own words"),
    "stream/reading.py": (1, ENDED),
    "verify/numerics/head.py": (1, STATED),
    "verify/subject.py": (1, STATED),
}


def without_hint(source: str) -> list[int]:
    """The lines of errors whose sentence is written there, without a hint.

    An error of a function's result (`InputError(no_folder(folder))`) gets a sentence that is complete.
    """
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in OURS
        and node.args
        and isinstance(node.args[0], (ast.Constant, ast.JoinedStr))
        and "hint" not in {keyword.arg for keyword in node.keywords}
    ]


@pytest.mark.parametrize("module", MODULES)
def test_every_error_gives_a_hint(module: str) -> None:
    found = without_hint((ROOT / module).read_text(encoding="utf-8"))
    most, _ = FEW.get(module, (0, ""))
    assert len(found) <= most, f"{module}: lines {found} raise without hint="


def test_the_list_of_exceptions_is_short_and_current() -> None:
    assert set(FEW) <= set(MODULES)
    assert sum(most for most, _ in FEW.values()) < 50
    assert max(Counter(reason for _, reason in FEW.values()).values()) < 12


def test_an_error_without_a_hint_would_be_found() -> None:
    source = 'raise InputError("a: b: c.")\nraise InputError("a", hint="b")\nraise InputError(made(x))\nFoo("a")\n'
    assert without_hint(source) == [1]
