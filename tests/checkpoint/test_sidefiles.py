"""Which files travel with the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvquant.checkpoint.sidefiles import side_files

COPIED = [
    "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "added_tokens.json", "additional_chat_templates/tool.jinja",
    "chat_template.jinja", "chat_template.json", "generation_config.json", "image_processor_config.json", "merges.txt",
    "preprocessor_config.json", "processor_config.json", "qwen.tiktoken", "sentencepiece.bpe.model",
    "special_tokens_map.json", "spiece.model", "tekken.json", "tokenizer.json", "tokenizer.model",
    "tokenizer.model.v3", "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json", "vocab.txt",
]  # fmt: skip
LEFT = [
    "README.md", "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "consolidated.safetensors",
    "consolidated.00.pth", "params.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf",
    "model.safetensors.index.json", "hf_quant_config.json", "recipe.yaml", "modeling_custom.py", "tf_model.h5",
    "flax_model.msgpack", "training_args.bin", ".gitattributes", "original/tokenizer.model",
    "original/consolidated.00.pth", "additional_chat_templates/notes.txt", "nvquant_manifest.json",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*COPIED, *LEFT):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_tokenizer_templates_settings_and_licence_travel_and_nothing_else(folder: Path) -> None:
    assert side_files(folder) == sorted(COPIED)


def test_a_folder_of_a_side_files_name_is_not_a_side_file(tmp_path: Path) -> None:
    (tmp_path / "LICENSES").mkdir()
    (tmp_path / "tokenizer.json").mkdir()
    assert side_files(tmp_path) == []


def test_links_into_a_cache_are_side_files(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "blob")
    assert side_files(tmp_path) == ["tokenizer.json"]
