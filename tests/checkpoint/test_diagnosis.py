"""A folder that is no model, or no complete one, is refused in a sentence that names what it holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from nvquant.checkpoint.source import INDEX_NAME, SINGLE_NAME, open_checkpoint
from nvquant.errors import InputError
from support.conversions import TinyModels


@pytest.fixture
def folder(tiny: TinyModels, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def without_weights(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), *folder.glob(INDEX_NAME)):
        path.unlink()


def gguf(folder: Path) -> None:
    without_weights(folder)
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")


def gguf_alone(folder: Path) -> None:
    gguf(folder)
    (folder / "config.json").unlink()


def adapter(folder: Path) -> None:
    without_weights(folder)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def shards_without_index(folder: Path) -> None:
    first = sorted(folder.glob("*.safetensors"))[0]
    content = first.read_bytes()
    without_weights(folder)
    (folder / "model-00001-of-00002.safetensors").write_bytes(content)


def stale_index(folder: Path) -> None:
    first = sorted(folder.glob("*.safetensors"))[0]
    content = first.read_bytes()
    without_weights(folder)
    (folder / SINGLE_NAME).write_bytes(content)
    weight_map = {"model.norm.weight": "model-00001-of-00013.safetensors"}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (gguf, "holds GGUF weights (model-Q4_K_M.gguf)"),
        (gguf_alone, "holds GGUF weights (model-Q4_K_M.gguf)"),
        (adapter, "is a LoRA (PEFT) adapter, not a model"),
        (shards_without_index, f"holds model-00001-of-00002.safetensors, but neither {SINGLE_NAME} nor {INDEX_NAME}"),
        (stale_index, "does not fit the files that are there (model.safetensors)"),
        (without_weights, f"holds no {SINGLE_NAME} and no {INDEX_NAME}"),
    ],
)
def test_a_refusal_names_what_the_folder_holds(make: Callable[[Path], None], words: str, folder: Path) -> None:
    make(folder)
    with pytest.raises(InputError) as refused:
        open_checkpoint(folder)
    assert words in str(refused.value)
