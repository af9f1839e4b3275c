"""`plan` says what a quantized head costs in files and memory, and what it saves at each token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from nvquant.checkpoint.source import Checkpoint, open_checkpoint
from nvquant.format.layouts import LAYOUTS
from nvquant.plan.forecast import HEAD_STRIP_BYTES, Memory, census, fixed_memory
from nvquant.plan.head_cost import head_cost
from nvquant.plan.plan import Plan, compute_plan
from nvquant.recipe.load import load_recipe
from nvquant.recipe.schema import Recipe
from safetensors.torch import load_file, save_file
from support.conversions import COMPRESSED_TENSORS, MODELOPT, as_recipe
from support.synthetic_gemma4 import write_synthetic_gemma4
from support.tiny_models import tiny_llama

Tiny = Callable[[str], Checkpoint]
ROWS, COLS = 512, 64
BF16, FP8, NVFP4 = 2 * ROWS * COLS, ROWS * COLS + 4 * ROWS, ROWS * COLS * 9 // 16 + 4
ROWS_31B, COLS_31B = 262144, 5376


def with_head(head: str, recipe: str = "nvfp4-a16") -> Recipe:
    return load_recipe(recipe).model_copy(update={"head": head})


def planned(source: Checkpoint | Path, recipe: str | Recipe, layout: str = COMPRESSED_TENSORS) -> Plan:
    opened = open_checkpoint(source) if isinstance(source, Path) else source
    return compute_plan(opened, as_recipe(recipe), LAYOUTS[layout], "model")


@pytest.mark.parametrize(("head", "size"), [("fp8", FP8), ("nvfp4", NVFP4)])
def test_a_tied_model_gets_a_head_beside_its_embedding(tiny: Tiny, head: str, size: int) -> None:
    plan = planned(tiny("llama"), with_head(head))
    cost = head_cost(plan)
    assert cost is not None
    assert (cost.was_tied, cost.file_bytes, cost.memory_bytes, cost.token_bytes) == (True, size, size, size - BF16)
    assert plan.tensor_bytes == planned(tiny("llama"), "nvfp4-a16").tensor_bytes + size
    assert "because the embedding stays beside it" in cost.words


@pytest.mark.parametrize(("head", "size"), [("fp8", FP8), ("nvfp4", NVFP4)])
def test_an_untied_head_becomes_smaller(tmp_path: Path, head: str, size: int) -> None:
    plan = planned(tiny_llama(tmp_path / "model", tied=False), with_head(head))
    cost = head_cost(plan)
    assert cost is not None
    less = size - BF16
    assert (cost.was_tied, cost.file_bytes, cost.memory_bytes, cost.token_bytes) == (False, less, less, less)
    assert "because" not in cost.words and " less in the files" in cost.words


def test_an_equal_copy_of_a_tied_head_costs_memory_but_no_file(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "model", shards=1)
    tensors = load_file(source / "model.safetensors")
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file({**tensors, **copy}, source / "model.safetensors", {"format": "pt"})
    cost = head_cost(planned(source, with_head("fp8")))
    assert cost is not None
    assert (cost.was_tied, cost.file_bytes, cost.memory_bytes) == (True, FP8 - BF16, FP8)


def test_an_unquantized_head_costs_nothing(tiny: Tiny) -> None:
    assert head_cost(planned(tiny("llama"), "nvfp4")) is None


def test_the_embedding_stays_in_the_table_and_the_head_is_new(tiny: Tiny) -> None:
    found = {group.name: group for group in census(planned(tiny("gemma4"), with_head("fp8"), MODELOPT))}
    assert (found["embedding"].bytes_in, found["embedding"].bytes_out) == (BF16, BF16)
    assert (found["head"].bytes_in, found["head"].bytes_out, found["head"].tensors) == (0, ROWS * COLS + 8, 3)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_gemma4(tmp_path_factory.mktemp("models") / "gemma-4-31b")


@pytest.mark.parametrize(
    ("head", "size"),
    [
        ("fp8", ROWS_31B * COLS_31B + 4 * ROWS_31B),
        ("nvfp4", ROWS_31B * COLS_31B * 9 // 16 + 4),
    ],
)
def test_the_head_of_the_31b_is_never_in_memory_as_a_whole(large: Path, head: str, size: int) -> None:
    plan = planned(large, with_head(head))
    cost = head_cost(plan)
    assert cost is not None
    assert (cost.file_bytes, cost.token_bytes) == (size, size - 2 * ROWS_31B * COLS_31B)
    assert next(shard.file_bytes - shard.tensor_bytes for shard in plan.shards if shard.is_head) < 1000
    for tokens, gpu in ((0, False), (2048, False), (2048, True)):
        before, after = (fixed_memory(planned(large, one), tokens, gpu) for one in ("nvfp4-a16", with_head(head)))
        more = Memory(after.host_bytes - before.host_bytes, after.gpu_bytes - before.gpu_bytes)
        scales = ROWS_31B * COLS_31B // 16 if head == "nvfp4" else 4 * ROWS_31B
        assert scales + HEAD_STRIP_BYTES < more.host_bytes < scales + 800_000_000
        assert more.gpu_bytes == (6 * HEAD_STRIP_BYTES if gpu else 0)
