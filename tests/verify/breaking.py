"""What faults are made with: a checkpoint's tensors and JSON files, open for change.

A fault takes a copy of a good checkpoint and breaks it in one way, as a tool with that fault would have written it: the
index and the manifest's hashes are brought up to date, unless the fault lies there. `fails` names the checks that must
fail, and no other may; there is more than one only where the fault shows in more than one way, as the comment says. The
first of them is the one that sees it first: alone where that is possible, else against the source. What no structure
tells is in numerics/test_broken.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nvquant.checkpoint.source import open_checkpoint
from nvquant.verify.structure import ALONE
from support.raw_safetensors import read_raw, write_index, write_raw

MANIFEST = "nvquant_manifest.json"
HF_QUANT_CONFIG = "hf_quant_config.json"
LAYER = "model.layers.1"  # of the tiny Llama
GEMMA = "model.language_model.layers"
FULL_LAYER = f"{GEMMA}.5"  # the tiny Gemma 4's layer without v_proj


@dataclass
class Stored:
    """A tensor of a checkpoint as stored."""

    file: str
    dtype: str
    shape: list[int]
    data: bytearray

    def scalar(self) -> float:
        """The value of a float32 scalar."""
        return float(torch.frombuffer(self.data, dtype=torch.float32)[0])

    def set_scalar(self, value: float) -> None:
        """Store another value of a float32 scalar."""
        self.data[:] = torch.tensor([value]).view(torch.uint8).numpy().tobytes()


Tensors = dict[str, Stored]


@dataclass(frozen=True)
class Fault:
    """A way to be wrong.

    Attributes:
        on: name of the good checkpoint that it is done to.
        fails: the checks that must fail with `--against`; without it, those of them that need no source.
        apply: breaks the copy in the given folder; returns words that the first failing check must say.
    """

    on: str
    fails: tuple[str, ...]
    apply: Callable[[Path], str]

    @property
    def name(self) -> str:
        return f"{self.apply.__name__}-{self.on}"

    @property
    def fails_alone(self) -> set[str]:
        """The checks that fail without a source."""
        return set(self.fails) & {"headers", *ALONE}

    @property
    def first(self) -> str:
        """Where it is seen first: in the checkpoint alone, or against its source."""
        return "alone" if self.fails_alone else "source"


def listing(faults: list[Fault]) -> Callable[..., Callable[[Callable[[Path], str]], Callable[[Path], str]]]:
    """A decorator `fault(*fails, on=...)` that appends to a list."""

    def fault(*fails: str, on: str = "llama-ct") -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
        def register(function: Callable[[Path], str]) -> Callable[[Path], str]:
            faults.append(Fault(on, fails, function))
            return function

        return register

    return fault


@contextmanager
def edit_tensors(folder: Path) -> Iterator[Tensors]:
    """All tensors of a checkpoint, to be changed, added or removed; the shards, index and hashes follow."""
    tensors: Tensors = {}
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    for file in files:
        entries, data = read_raw(folder / file)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            tensors[name] = Stored(file, entry["dtype"], entry["shape"], bytearray(data[begin:end]))
    yield tensors
    for file in files:
        entries, pieces, at = {}, [], 0
        for name, stored in tensors.items():
            if stored.file == file:
                end = at + len(stored.data)
                entries[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [at, end]}
                pieces.append(bytes(stored.data))
                at = end
        write_raw(folder / file, entries, b"".join(pieces))
    total = sum(len(stored.data) for stored in tensors.values())
    write_index(folder, {name: stored.file for name, stored in tensors.items()}, total)
    sign(folder)


@contextmanager
def edit_json(path: Path) -> Iterator[dict[str, Any]]:
    """The content of a JSON file, to be changed."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content, indent=2))


def sign(folder: Path) -> None:
    """Bring the manifest's hashes up to date."""
    if (folder / MANIFEST).exists():
        with edit_json(folder / MANIFEST) as manifest:
            for name in manifest["files"]:
                manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()


def flip_last_byte(path: Path) -> None:
    """Change a file by one bit."""
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)


def source_bytes(folder: Path, name: str) -> bytearray:
    """A tensor of the model that the copy was made from, which lies beside it."""
    return bytes_of(open_checkpoint(folder.parent / "source").read(name))


def bytes_of(tensor: torch.Tensor) -> bytearray:
    """The bytes of a tensor."""
    return bytearray(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def edit_ct(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the `quantization_config` of a checkpoint."""
    with edit_json(folder / "config.json") as config:
        edit(config["quantization_config"])


def change_scalar(folder: Path, names: list[str], change: Callable[[float], float]) -> str:
    """Change global scales; returns the first name."""
    with edit_tensors(folder) as tensors:
        for name in names:
            tensors[name].set_scalar(change(tensors[name].scalar()))
    return names[0]


def recorded_group(manifest: dict[str, Any], leaf: str) -> dict[str, Any]:
    """What the manifest records of a group of layer 1."""
    record: dict[str, Any] = manifest["layers"][1]["groups"][f"{LAYER}.{leaf}"]
    return record
