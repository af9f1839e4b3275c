"""A model on the Hub opened as a checkpoint: what is fetched for it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nvquant.checkpoint.hub.repository import find_model
from nvquant.checkpoint.hub.source import open_hub_checkpoint
from nvquant.checkpoint.source import open_checkpoint
from nvquant.errors import InputError
from support.hub_faults import Corrupt
from support.hub_server import HubServer

NAME = "Org/Tiny-Llama"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def test_opening_fetches_less_than_a_hundredth_of_the_model(hub: HubServer, folder: Path) -> None:
    remote, local = open_hub_checkpoint(find_model(NAME)), open_checkpoint(folder)
    assert remote.infos() == local.infos()
    assert (remote.config, remote.files) == (local.config, local.files)
    whole = sum(path.stat().st_size for path in folder.iterdir())
    assert hub.bytes_sent(NAME) < whole / 100
    assert hub.sent_twice(NAME) == []
    assert remote.name == NAME


@pytest.mark.parametrize("low_disk", [False, True])
def test_every_tensor_is_the_one_in_the_shard(hub: HubServer, folder: Path, low_disk: bool) -> None:
    remote, local = open_hub_checkpoint(find_model(NAME), low_disk), open_checkpoint(folder)
    for name in local.files:
        assert torch.equal(remote.read(name), local.read(name))
    rows = [3, 2, 90, 91, 400]
    assert torch.equal(
        remote.read_rows("model.embed_tokens.weight", rows), local.read_rows("model.embed_tokens.weight", rows)
    )


def test_side_files_come_and_other_files_do_not(hub: HubServer, folder: Path) -> None:
    others = {"pytorch_model.bin": b"pickle", "original/consolidated.safetensors": b"", "run.py": b"print()"}
    files = {path.name: path for path in folder.iterdir()} | {"additional_chat_templates/tool.jinja": b"{{ x }}"}
    hub.add("model", "Org/Full", {**files, **others, "README.md": b"---\nlicense: mit\n---\n"})
    opened = open_hub_checkpoint(find_model("Org/Full"))
    there = {path.relative_to(opened.folder).as_posix() for path in opened.folder.rglob("*") if path.is_file()}
    assert there == {*files, "README.md"} - {FIRST, SECOND}


def test_code_that_auto_map_names_comes_with_its_imports_alone(hub: HubServer, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    code = {"modeling_mine.py": b"from .helper import a", "helper.py": b"from .deep import b", "deep.py": b"b = 1"}
    code |= {"scripts/run.py": b"print()", "unrelated.py": b"print()"}
    files = {path.name: path for path in folder.iterdir()}
    hub.add("model", "Org/Custom", {**files, **code, "config.json": json.dumps(config).encode()})
    opened = open_hub_checkpoint(find_model("Org/Custom"))
    assert {path.name for path in opened.folder.rglob("*.py")} == {"modeling_mine.py", "helper.py", "deep.py"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"config.json": None}, "holds no config.json, which every Hugging Face model has: choose another repository"),
        ({INDEX: None}, f"holds {FIRST}, {SECOND}, but neither model.safetensors nor model.safetensors.index.json"),
        ({SECOND: None}, f"shard {SECOND} is missing, but the index names it"),
        ({INDEX: None, SECOND: None, FIRST: None, "m.gguf": b"GGUF"}, r"holds GGUF weights \(m.gguf\)"),
        ({SECOND: b"short"}, f"{SECOND} is too short for a safetensors file"),
        ({SECOND: b"\xff" * 64}, f"{SECOND} of Org/Broken is not a safetensors file"),
        ({SECOND: (64).to_bytes(8, "little") + b"{" * 64}, "has a header that is not JSON"),
        ({INDEX: b"[]"}, "is not a JSON object"),
        ({INDEX: json.dumps({"weight_map": {"a": FIRST}}).encode()}, "the index lists a in .*, which lacks it"),
        ({"config.json": b"{"}, "config.json is not readable JSON"),
    ],
)
def test_a_broken_repository_is_refused_in_one_sentence(
    hub: HubServer, folder: Path, change: dict[str, bytes | None], sentence: str
) -> None:
    files: dict[str, bytes | Path | None] = {path.name: path for path in folder.iterdir()}
    files |= change
    hub.add("model", "Org/Broken", {name: content for name, content in files.items() if content is not None})
    with pytest.raises(InputError, match=sentence):
        open_hub_checkpoint(find_model("Org/Broken"))


def test_a_config_that_came_damaged_is_fetched_again(hub: HubServer) -> None:
    hub.fail("*/config.json", Corrupt(at=3), method="GET")
    assert open_hub_checkpoint(find_model(NAME)).config["model_type"] == "llama"
