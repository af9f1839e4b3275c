"""Golden outputs: sha256 of every file of a set of conversions, kept in tests/data/golden.json.

A change of the code's structure must leave every sum as it is. After a change that is meant to alter an output, write
the sums anew and explain the change in the commit: `python tests/support/golden.py`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nvquant.checkpoint.source import open_checkpoint
from nvquant.convert.relayout import relayout
from nvquant.format.layouts import LAYOUTS
from support.conversions import COMPRESSED_TENSORS, MODELOPT, TinyModels, converted, recipe_for

FILE = Path(__file__).parents[1] / "data" / "golden.json"
# Values that differ between installations and copies of a source, and have no effect on a tensor.
_UNSTABLE = frozenset({"config_sha256", "mtime_ns", "nvquant", "transformers_version", "version", "versions"})


@dataclass(frozen=True)
class Golden:
    """A conversion, and perhaps the relayout of its output.

    Attributes:
        model: name of a tiny model.
        then: the layout of the relayout.
    """

    model: str
    recipe: str
    layout: str
    quantizer: str
    batch_size: int = 1
    then: str | None = None

    @property
    def name(self) -> str:
        """Its key in the file."""
        parts = [self.model, self.recipe, self.layout, self.quantizer]
        parts += [f"batch-{self.batch_size}"] if self.batch_size > 1 else []
        return "/".join(parts + ([f"then-{self.then}"] if self.then else []))

    @property
    def is_calibrated(self) -> bool:
        """Whether it depends on products of the model's forward, whose last bits differ between processors."""
        return self.recipe != "nvfp4-a16"

    def make(self, source: Path, output: Path) -> Path:
        """Convert. Returns the output."""
        output.parent.mkdir(exist_ok=True)
        first = output if self.then is None else output.with_name("first")
        with one_thread():
            converted(
                *(source, first, recipe_for(self.model, self.recipe), self.layout, self.quantizer),
                batch_size=self.batch_size,
            )
            if self.then is not None:
                relayout(open_checkpoint(first), LAYOUTS[self.then], output)
        return output


SET = (
    Golden("llama", "nvfp4-full", COMPRESSED_TENSORS, "rtn"),
    Golden("llama", "nvfp4-full", MODELOPT, "mse", batch_size=2),
    Golden("llama", "nvfp4-a16", COMPRESSED_TENSORS, "mse"),
    Golden("qwen2", "nvfp4", MODELOPT, "mse"),  # biases
    Golden("qwen3", "nvfp4-full", COMPRESSED_TENSORS, "mse", then=MODELOPT),
    Golden("phi3", "nvfp4-a16", MODELOPT, "rtn", then=COMPRESSED_TENSORS),  # stored as fused
    Golden("gemma3_text", "nvfp4-a16", MODELOPT, "mse"),
    Golden("gemma4", "nvfp4", COMPRESSED_TENSORS, "mse"),  # K is V in full-attention layers, a vision tower, tied
    Golden("gemma4", "nvfp4-full", MODELOPT, "rtn"),
    Golden("gemma4_text", "nvfp4-a16", COMPRESSED_TENSORS, "mse"),
    Golden("gemma4_e2b", "nvfp4-full", COMPRESSED_TENSORS, "mse"),  # per-layer inputs, shared keys and values
    Golden("gemma4_moe", "nvfp4", COMPRESSED_TENSORS, "mse"),
    Golden("gemma4_moe", "nvfp4-a16", MODELOPT, "rtn"),
    Golden("gemma4_unified", "nvfp4-full", MODELOPT, "mse"),
)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread: the number of threads may change the last bits of a product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sums_of(folder: Path) -> dict[str, str]:
    """sha256 of every file, JSON files without what differs between installations."""
    return {path.name: _sum_of(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _sum_of(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".json":
        content = json.dumps(_stable(json.loads(content))).encode()
    return hashlib.sha256(content).hexdigest()


def _stable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _stable(item) for key, item in value.items() if key not in _UNSTABLE}
    return [_stable(item) for item in value] if isinstance(value, list) else value


def processor() -> str:
    """The kind of processor and the version of torch, on which the last bits of products depend."""
    known = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        known.setdefault(key.strip(), value.strip())
    parts = [known.get(key, "") for key in ("vendor_id", "cpu family", "model")]
    return " ".join([*parts, torch.backends.cpu.get_cpu_capability(), torch.__version__.partition("+")[0]])


def write() -> None:
    """Write the file anew."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = TinyModels(Path(folder) / "tiny")
        outputs = {
            golden.name: golden.make(tiny(golden.model), Path(folder) / str(at) / "out")
            for at, golden in enumerate(SET)
        }
        found = {"processor": processor(), "sums": {name: sums_of(output) for name, output in outputs.items()}}
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    write()
