"""A folder that is no model, or no complete one, is refused in a sentence that names what it holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from nvquant.checkpoint.diagnosis import adapter_beside, names_in
from nvquant.checkpoint.source import INDEX_NAME, SINGLE_NAME, open_checkpoint
from nvquant.errors import InputError
from support.conversions import TinyModels


@pytest.fixture
def folder(tiny: TinyModels, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as refused:
        open_checkpoint(folder)
    return str(refused.value)


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
        (adapter, "is a LoRA (PEFT) adapter (adapter_config.json), not a model"),
        (shards_without_index, f"holds model-00001-of-00002.safetensors, but neither {SINGLE_NAME} nor {INDEX_NAME}"),
        (stale_index, "does not fit the files that are there (model.safetensors)"),
        (without_weights, f"holds no {SINGLE_NAME} and no {INDEX_NAME}"),
    ],
)
def test_a_refusal_names_the_files_of_the_folder(make: Callable[[Path], None], words: str, folder: Path) -> None:
    make(folder)
    assert words in refusal(folder)


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "holds only pickle weights (pytorch_model.bin), which can run code when loaded: convert"),
        ("model_index.json", "holds a diffusers pipeline (model_index.json): nvquant converts decoder models."),
        ("consolidated.00.pth", "holds only pickle weights (consolidated.00.pth)"),
        ("consolidated.safetensors", "holds weights in Mistral's own format (consolidated.safetensors): download"),
        ("tf_model.h5", "holds weights of TensorFlow or Flax (tf_model.h5)"),
        ("flax_model.msgpack", "holds weights of TensorFlow or Flax (flax_model.msgpack)"),
        ("model.onnx", "holds ONNX weights (model.onnx)"),
        ("model.nemo", "holds a NeMo archive (model.nemo)"),
    ],
)
def test_weights_of_another_format_are_named(folder: Path, name: str, words: str, has_config: bool) -> None:
    without_weights(folder)
    (folder / name).write_bytes(b"")
    if not has_config:
        (folder / "config.json").unlink()
    assert words in refusal(folder)


def test_an_unfinished_download_is_named(folder: Path) -> None:
    without_weights(folder)
    (folder / "model-00001-of-00002.safetensors.incomplete").write_bytes(b"")
    assert "holds an unfinished download (model-00001-of-00002.safetensors.incomplete)" in refusal(folder)


def test_several_missing_shards_are_counted(folder: Path) -> None:
    without_weights(folder)
    weight_map = {f"{name}.weight": f"model-0000{name}-of-00002.safetensors" for name in (1, 2)}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    assert "shard model-00001-of-00002.safetensors is missing (2 of 2 shards are), but the index" in refusal(folder)


def test_a_model_in_a_folder_inside_is_named(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "inner")
    (tmp_path / "outer").mkdir()
    (tmp_path / "inner").rename(tmp_path / "outer" / "inner")
    assert refusal(tmp_path / "outer").endswith("give the path of its folder inner, which holds a model.")


def test_a_file_in_place_of_a_folder_is_named_by_its_kind(folder: Path) -> None:
    (folder / "m.gguf").write_bytes(b"GGUF")
    assert "is a GGUF file" in refusal(folder / "m.gguf")
    assert "give the folder around it" in refusal(next(folder.glob("*.safetensors")))


def test_an_adapter_is_found_beside_a_model(folder: Path) -> None:
    assert adapter_beside(names_in(folder)) is None
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert adapter_beside(names_in(folder)) == "adapter_model.safetensors"
