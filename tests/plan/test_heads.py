"""A head that is stored although the config ties it: an equal copy is no matter, another one is refused at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nvquant.checkpoint.source import open_checkpoint
from nvquant.cli.main import main
from nvquant.errors import InputError
from nvquant.plan.heads import SPAN_BYTES, equal_tensors
from safetensors.torch import load_file, save_file
from support.conversions import edit_config, planned
from support.tiny_models import tiny_llama
from torch import Tensor

Change = Callable[[Tensor], Tensor]


def one_value(embedding: Tensor) -> Tensor:
    head = embedding.clone()
    head[300, 5] += 1
    return head


def with_head(folder: Path, change: Change, name: str = "lm_head.weight") -> Path:
    """A tied Llama that stores a head all the same."""
    tiny_llama(folder, shards=1)
    tensors = load_file(folder / "model.safetensors")
    head = change(tensors["model.embed_tokens.weight"]).clone()
    save_file({**tensors, name: head}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("change", [Tensor.clone, Tensor.float], ids=["same-dtype", "float32"])
def test_an_equal_copy_is_planned(change: Change, tmp_path: Path) -> None:
    assert "lm_head.weight" in planned(with_head(tmp_path / "model", change)).origins


@pytest.mark.parametrize("name", ["lm_head.weight", "output.weight"])
@pytest.mark.parametrize("change", [one_value, lambda embedding: embedding[:500]], ids=["a-value", "fewer-rows"])
def test_another_head_is_refused_with_both_ways_out(change: Change, name: str, tmp_path: Path) -> None:
    folder = with_head(tmp_path / "model", change, name)
    words = rf"{name} from the weights"
    with pytest.raises(InputError, match=rf"stores {name}, which differs from model\.embed_tokens\.weight.*{words}"):
        planned(folder)


def test_where_the_config_says_that_they_are_two_it_is_converted(tmp_path: Path) -> None:
    folder = with_head(tmp_path / "model", one_value)
    assert "lm_head.weight" in planned(edit_config(folder, tie_word_embeddings=False)).origins


def test_a_classifiers_head_is_tied_to_nothing(tmp_path: Path) -> None:
    folder = with_head(tmp_path / "model", lambda embedding: embedding[:3], "score.weight")
    assert "score.weight" in planned(folder).origins


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_both_commands_refuse_before_any_work(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_head(tmp_path / "model", one_value)
    output = ["-o", str(tmp_path / "out"), "--device", "cpu"] if command == "convert" else []
    with pytest.raises(SystemExit) as stop:
        main([command, str(folder), "--recipe", "nvfp4", *output])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.splitlines()[-1].startswith(
        f"Error: {folder} stores lm_head.weight, which differs from model.embed_tokens.weight"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(("at", "is_seen"), [(0, True), (2 * SPAN_BYTES, False), (8 * SPAN_BYTES - 1, True)])
def test_a_sample_sees_the_beginning_and_the_end(at: int, is_seen: bool, tmp_path: Path) -> None:
    count = 8 * SPAN_BYTES
    one = torch.zeros(count, dtype=torch.uint8)
    other = one.clone()
    other[at] = 1
    save_file({"one": one, "other": other}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    checkpoint = open_checkpoint(tmp_path)
    assert equal_tensors(checkpoint, "one", "other", is_sampled=True) is not is_seen
    assert not equal_tensors(checkpoint, "one", "other")
