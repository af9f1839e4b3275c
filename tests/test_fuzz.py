"""A small fuzz of the commands: files that strangers write, mutated by fixed seeds. Whatever a file holds, a command
ends in time, in a code of its own, and in one sentence that somebody wrote for the case: never in a traceback.

Each case runs in a forked child of this process, since imports take longer than a case.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.cli.main import main
from support.conversions import TinyModels, random_samples, write_ids

SECONDS, MEGABYTES = 50, 2000
CASES = 24  # of each kind
UNFORESEEN = "An unexpected error occurred"
ODD: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        3,
        2**31,
        10**9,
        2**63,
        10**30,
        0.5,
        1e308,
        "",
        "a",
        "0",
        "NaN",
        [],
        {},
        [[]],
        [None],
        {"": 0},
    ),
    *(
        "x" * 5000,
        "../../etc/passwd",
        "/dev/zero",
        "a\nError: b",
        "\x1b[31m",
        "\u202e",
        "re:(",
        "re:(([a-z_.]+)+[0-9]*)+!",
    ),
]
RAW = [b"NaN", b"1e999", b"9" * 5000, b'"\\ud800"', b"[" * 5000, b"[" * 150 + b"]" * 150, b'{"a":1,"a":2}']

Mutation = Callable[[random.Random, Path, Path], list[str]]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside of a document."""
    inner: Any = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    return [*([at] if at else []), *(place for key, item in inner for place in places(item, (*at, key)))]


def mutated(chance: random.Random, data: bytes) -> bytes:
    """A document with some values exchanged, dropped or renamed; or its bytes cut, flipped or doubled."""
    if chance.random() < 0.2:
        at = chance.randrange(len(data) or 1)
        return chance.choice(
            [data[:at], data[:at] + b"\xff\x00" + data[at:], data * 2, b"\xef\xbb\xbf" + data, b"", b"[]"]
        )
    value, raw = json.loads(data), chance.choice(RAW)
    for _ in range(chance.choice([1, 1, 2, 4])):
        ways = places(value)
        if not ways:
            break
        *way, key = chance.choice(ways)
        holder = value
        for step in way:
            holder = holder[step]
        what = chance.random()
        if what < 0.2:
            del holder[key]
        elif what < 0.3 and isinstance(holder, dict):
            holder[chance.choice(["", "x" * 3000, "a\nb", "\x1b[2J", f"{key}."])] = holder.pop(key)
        else:
            holder[key] = "@raw@" if what < 0.4 else chance.choice(ODD)
    return json.dumps(value).encode().replace(b'"@raw@"', raw, 1)


def edit(chance: random.Random, path: Path) -> None:
    path.write_bytes(mutated(chance, path.read_bytes()))


def a_header(chance: random.Random, given: Path, work: Path) -> list[str]:
    model = Path(shutil.copytree(given / "model", work / "m"))
    shard = chance.choice(sorted(model.glob("*.safetensors")))
    data = shard.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = mutated(chance, data[8 : 8 + length])
    shard.write_bytes(
        struct.pack("<Q", chance.choice([len(text)] * 6 + [0, 2**63, len(text) + 9])) + text + data[8 + length :]
    )
    return chance.choice([["plan", str(model)], ["convert", str(model), "--recipe", "nvfp4-a16", "-o", "out"]])


def an_index(chance: random.Random, given: Path, work: Path) -> list[str]:
    model = Path(shutil.copytree(given / "model", work / "m"))
    edit(chance, model / "model.safetensors.index.json")
    return ["plan", str(model), *chance.choice([[], ["--json"]])]


def a_config(chance: random.Random, given: Path, work: Path) -> list[str]:
    model = Path(shutil.copytree(given / "model", work / "m"))
    edit(chance, model / "config.json")
    ids = ["--calibration", str(given / "ids.jsonl"), "--samples", "2", "--sequence-length", "16", "--device", "cpu"]
    return chance.choice([["plan", str(model)], ["convert", str(model), "--recipe", "nvfp4-full", *ids, "-o", "out"]])


def a_recipe(chance: random.Random, given: Path, work: Path) -> list[str]:
    recipe = {
        "name": "mine",
        "quantize": [{"modules": ["mlp", "re:.*"], "scheme": "nvfp4"}],
        "activations": {"headroom": "auto"},
        "calibration": {"set": "offline", "samples": 2},
        "verify": {"max_kl": 0.1},
    }
    (work / "r.yaml").write_bytes(mutated(chance, json.dumps(recipe).encode()))
    return ["plan", str(given / "model"), "--recipe", str(work / "r.yaml")]


def a_calibration(chance: random.Random, given: Path, work: Path) -> list[str]:
    lines = (given / "ids.jsonl").read_bytes().splitlines()
    lines[0] = mutated(
        chance, chance.choice([lines[0], b'{"messages": [{"role": "user", "content": "a"}]}', b'{"text": "a"}'])
    )
    file = work / chance.choice(["c.jsonl", "c.json", "c.csv", "c.txt", "c.yaml", "c.jsonl.gz"])
    file.write_bytes(b"\n".join(lines))
    ids = ["--calibration", str(file), "--samples", "2", "--sequence-length", "16", "--device", "cpu"]
    return ["convert", str(given / "model"), "--recipe", "nvfp4-full", *ids, "-o", "out"]


def an_output(chance: random.Random, given: Path, work: Path) -> list[str]:
    made = Path(shutil.copytree(given / "made", work / "q"))
    edit(chance, made / chance.choice(["config.json", "nvquant_manifest.json"]))
    return chance.choice([["verify", str(made)], ["relayout", str(made), "--format", "modelopt", "-o", "out"]])


def a_link(chance: random.Random, given: Path, work: Path) -> list[str]:
    folder = Path(shutil.copytree(given / chance.choice(["model", "made"]), work / "m"))
    name = chance.choice(
        ["config.json", "LICENSE", "tokenizer.json", "generation_config.json", "model.safetensors.index.json"]
    )
    (folder / name).unlink(missing_ok=True)
    target = chance.choice(["/dev/zero", "/etc/hostname", "nowhere", name, ""])
    (folder / name).symlink_to(target) if target else os.mkfifo(folder / name)
    return [chance.choice(["plan", "verify"]), str(folder)]


KINDS: list[Mutation] = [a_header, an_index, a_config, a_recipe, a_calibration, an_output, a_link]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tiny: TinyModels) -> Path:
    """A model, ids for it, and what was made of it."""
    folder = tmp_path_factory.mktemp("given")
    shutil.copytree(tiny("llama"), folder / "model")
    write_ids(folder / "ids.jsonl", random_samples([20] * 4))
    ids = ["--calibration", str(folder / "ids.jsonl"), "--samples", "2", "--sequence-length", "16", "--device", "cpu"]
    for command in (
        ["convert", str(folder / "model"), "--recipe", "nvfp4-full", *ids, "-o", str(folder / "made")],
        ["verify", str(folder / "made")],
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0
    return folder


def run(arguments: list[str], work: Path) -> tuple[int, str]:
    """Exit code and stderr of a command in a child; a code of a signal is negative."""
    (work / "cwd").mkdir()
    child = os.fork()
    if not child:
        os.chdir(work / "cwd")
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(work / name, os.O_WRONLY | os.O_CREAT, 0o600), number)
        os.environ["HF_HUB_OFFLINE"] = "1"
        torch.set_num_threads(1)  # a pool of threads does not survive the fork, and its first use waits for ever
        code: Any = 99
        try:
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            main(arguments)
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
    until = time.monotonic() + SECONDS
    while True:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    assert used.ru_maxrss >> 10 < MEGABYTES + (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
    return os.waitstatus_to_exitcode(status), (work / "stderr").read_text(errors="replace")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.__name__))
def test_a_mutated_file_ends_in_one_sentence(kind: Mutation, given: Path, tmp_path: Path) -> None:
    for number in range(CASES):
        work = tmp_path / str(number)
        work.mkdir()
        arguments = kind(random.Random(f"{kind.__name__}:{number}"), given, work)
        code, said = run(arguments, work)
        case = f"{kind.__name__} {number}: {arguments}, exit {code}\n{said[-2000:]}"
        assert code in (0, 1, 2, 3), case
        assert "Traceback" not in said and UNFORESEEN not in said, case
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202e]", said), case
        if code in (2, 3):
            errors = [line for line in said.splitlines() if line.startswith("Error: ")]
            assert len(errors) == 1 and said.splitlines()[-1] == errors[0] and len(errors[0]) < 1500, case
            assert not list((work / "cwd").iterdir()), case
        shutil.rmtree(work)
