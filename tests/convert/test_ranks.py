"""Several processes on one conversion: the bytes of one process, one sentence for all where it fails, no hang."""

from __future__ import annotations

import fcntl
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.convert.journal import STATE_FOLDER
from nvquant.convert.output import partial_folder
from nvquant.convert.ranks import Ranks, join_ranks
from nvquant.errors import EnvironmentLack
from safetensors.torch import load_file, save_file
from support.conversions import MODELOPT, Conversions, TinyModels, contents, converted, random_samples, write_ids
from support.launching import RankEnded, WarmRanks
from support.states import Kept, plain
from support.tiny_models import tiny_llama

OTHER_SAMPLES = random_samples((40, 24), seed=1)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmRanks]:
    """Runs a job on several ranks."""
    with WarmRanks(tmp_path_factory.mktemp("ranks")) as warm:
        yield warm


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """The sequences that `converted` takes where none are given, under the name that it gives them."""
    return write_ids(tmp_path / "expected.jsonl", random_samples())


def job(source: Path, tmp_path: Path, ids: Path | None = None, **more: Any) -> dict[str, Any]:
    return {"source": source, "output": tmp_path / "out", "ids": ids} | more


def codes(ended: list[RankEnded]) -> list[int]:
    return [rank.code for rank in ended]


def expected(source: Path, tmp_path: Path, **options: Any) -> dict[str, str]:
    """What one process makes."""
    return contents(converted(source, tmp_path / "expected", **options))


def written_layers(output: Path) -> list[str]:
    return sorted(path.name for path in (partial_folder(output) / STATE_FOLDER).glob("model-*.json"))


@pytest.mark.parametrize(
    ("size", "name", "options"),
    [
        (2, "llama", {"quantizer": "rtn"}),
        (3, "llama", {"quantizer": "mse"}),
        (3, "gemma4", {"quantizer": "rtn"}),
        (2, "gemma4", {"quantizer": "mse"}),
        (2, "gemma4_e2b", {"quantizer": "mse"}),  # layers that share keys and values
        (2, "llama", {"recipe": "nvfp4-a16", "quantizer": "mse"}),
        (3, "gemma4", {"recipe": "nvfp4-a16", "quantizer": "rtn", "layout": MODELOPT}),
        (2, "llama", {"quantizer": "rtn", "fold": True}),
        (3, "gemma4", {"quantizer": "gptq", "fold": True}),
        (2, "llama", {"quantizer": "mse", "batch_size": 2}),
        (3, "gemma4", {"quantizer": "rtn", "batch_size": 2, "layout": MODELOPT}),
        (2, "llama", {"quantizer": "gptq"}),
        (3, "gemma4", {"quantizer": "gptq", "layout": MODELOPT}),
        (2, "gemma4_e2b", {"quantizer": "gptq", "batch_size": 2}),
        (3, "llama", {"recipe": "nvfp4-a16", "quantizer": "gptq"}),
    ],
)
def test_every_byte_is_that_of_one_process(
    launch: WarmRanks, tiny: TinyModels, tmp_path: Path, size: int, name: str, options: dict[str, Any]
) -> None:
    alone = converted(tiny(name), tmp_path / "expected", **options)
    ids = write_ids(tmp_path / "expected.jsonl", random_samples())
    ended = launch(size, **job(tiny(name), tmp_path, ids, **options))
    assert codes(ended) == [0] * size, ended
    assert contents(tmp_path / "out") == contents(alone)
    assert not partial_folder(tmp_path / "out").exists()


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_the_state_of_any_statistic_from_all_bit_for_bit(launch: WarmRanks, size: int) -> None:
    ended = launch(size, merges=True)
    assert codes(ended) == [0] * size, ended
    wanted = [plain(Kept(rank).state()) for rank in range(size)]
    assert [rank.told["states"] for rank in ended] == [wanted] * size


def test_one_rank_keeps_its_own_statistic() -> None:
    kept = Kept(0)
    assert Ranks().merged(kept) is kept


@pytest.mark.parametrize(
    ("quantizer", "fold"), [("rtn", False), ("mse", False), ("mse", True), ("gptq", False), ("gptq", True)]
)
def test_ranks_without_a_sequence_of_their_own_do_no_harm(
    launch: WarmRanks, tiny: TinyModels, tmp_path: Path, quantizer: str, fold: bool
) -> None:
    alone = converted(tiny("llama"), tmp_path / "expected", quantizer=quantizer, samples=OTHER_SAMPLES, fold=fold)
    ids = write_ids(tmp_path / "expected.jsonl", OTHER_SAMPLES)
    ended = launch(3, **job(tiny("llama"), tmp_path, ids, quantizer=quantizer, fold=fold))
    assert codes(ended) == [0] * 3, ended
    assert contents(tmp_path / "out") == contents(alone)


@pytest.mark.parametrize(
    ("size", "killed", "asked", "next_size"),
    [(2, 1, 21, 1), (2, 1, 21, 3), (2, 0, 21, 2), (3, 1, 16, 1), (3, 1, 16, 3), (3, 2, 1, 2)],
)
def test_a_killed_rank_ends_all_and_the_next_run_finishes(
    launch: WarmRanks, done: Conversions, tiny: TinyModels, tmp_path: Path, size: int, killed: int, asked: int,
    next_size: int,
) -> None:  # fmt: skip
    source, output = tiny("gemma4"), tmp_path / "out"
    ids = write_ids(tmp_path / "gemma4-nvfp4-full-compressed-tensors-rtn.jsonl", random_samples())
    ended = launch(size, **job(source, tmp_path, ids, at_rank=killed, asked=asked, signal=signal.SIGKILL))
    assert ended[killed].code == -signal.SIGKILL
    for rank, other in enumerate(ended):
        if rank != killed:
            assert other.code == 3, ended
            assert f"one of the {size} ranks ended (rank {rank} lost its connection)" in other.error
            assert "To resume, run the same command again." in other.error
    assert not output.exists()
    assert partial_folder(output).is_dir()
    kept = len(written_layers(output))
    assert kept >= 1 or asked == 1
    if next_size == 1:
        converted_again(source, output, ids)
    else:
        again = launch(next_size, **job(source, tmp_path, ids))
        assert codes(again) == [0] * next_size, again
        assert len({rank.told["resumed"] for rank in again}) == 1
        assert again[0].told["resumed"] <= kept
    assert contents(output) == contents(done("gemma4"))


def converted_again(source: Path, output: Path, ids: Path) -> None:
    """Go on in this process."""
    from nvquant.convert.options import ConvertOptions
    from nvquant.convert.pipeline import convert
    from support.conversions import calibration_of, planned

    convert(planned(source), ConvertOptions(output, "rtn"), calibration_of(source, ids))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_killed_without_calibration_leaves_the_others_layers(
    launch: WarmRanks, tiny: TinyModels, tmp_path: Path, killed: int
) -> None:
    task = job(tiny("gemma4"), tmp_path, recipe="nvfp4-a16")
    ended = launch(2, **task, at_rank=killed, asked=2, signal=signal.SIGKILL)
    assert codes(ended)[1 - killed] == 3, ended
    layers = [name for name in written_layers(tmp_path / "out") if name < "model-00007"]
    assert len(layers) >= 3  # all of the other's own
    again = launch(3, **task)
    assert codes(again) == [0] * 3, again
    assert again[0].told["resumed"] == len(layers)
    assert contents(tmp_path / "out") == expected(tiny("gemma4"), tmp_path, recipe="nvfp4-a16")


def test_a_run_is_begun_by_one_process_and_finished_by_three(
    launch: WarmRanks, done: Conversions, tiny: TinyModels, tmp_path: Path
) -> None:
    ids = write_ids(tmp_path / "gemma4-nvfp4-full-compressed-tensors-rtn.jsonl", random_samples())
    first = launch(1, **job(tiny("gemma4"), tmp_path, ids, at_rank=0, asked=35, signal=signal.SIGTERM))
    assert codes(first) == [128 + signal.SIGTERM]
    again = launch(3, **job(tiny("gemma4"), tmp_path, ids))
    assert codes(again) == [0] * 3, again
    assert again[0].told["resumed"] >= 1
    assert contents(tmp_path / "out") == contents(done("gemma4"))


def test_a_signal_to_one_rank_ends_all_in_order(launch: WarmRanks, tiny: TinyModels, tmp_path: Path, ids: Path) -> None:
    ended = launch(2, **job(tiny("gemma4"), tmp_path, ids, at_rank=1, asked=21, signal=signal.SIGTERM))
    assert codes(ended) == [128 + signal.SIGTERM] * 2, ended
    assert ended[1].error.startswith("Stopped after layer ")
    assert ended[0].error == f"rank 1: {ended[1].error}"
    again = launch(2, **job(tiny("gemma4"), tmp_path, ids))
    assert codes(again) == [0, 0], again
    assert contents(tmp_path / "out") == expected(tiny("gemma4"), tmp_path)


def with_a_nan(folder: Path, tensor: str, row: int = 3) -> Path:
    """A tiny Llama with one element that is not a number."""
    source = tiny_llama(folder, shards=1)
    tensors = load_file(source / "model.safetensors")
    tensors[tensor][row, 5] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.mark.parametrize("recipe", ["nvfp4-full", "nvfp4-a16"])
@pytest.mark.parametrize("module", ["mlp.down_proj", "mlp.gate_proj", "self_attn.o_proj"])
def test_a_nan_in_a_weight_that_one_rank_quantizes_ends_all_with_its_sentence(
    launch: WarmRanks, tmp_path: Path, ids: Path, recipe: str, module: str
) -> None:
    name = f"model.layers.1.{module}.weight"
    ended = launch(2, **job(with_a_nan(tmp_path / "source", name), tmp_path, ids, recipe=recipe))
    assert len(set(codes(ended))) == 1 and ended[0].code in (1, 2), ended
    (sentence,) = {re.sub(r"^rank \d: | \d of 3 layers are complete and kept.*$", "", rank.error) for rank in ended}
    assert "NaN or an infinity" in sentence and "model.layers.1." in sentence
    assert not (tmp_path / "out").exists()


def test_a_nan_that_only_one_ranks_sequences_meet_ends_all_with_the_same_sentence(
    launch: WarmRanks, tmp_path: Path
) -> None:
    source = with_a_nan(tmp_path / "source", "model.embed_tokens.weight", row=500)
    samples = random_samples((20, 20, 20, 20))  # of ids below 490
    samples[3][7] = 500
    ended = launch(2, **job(source, tmp_path, write_ids(tmp_path / "ids.jsonl", samples)))
    assert codes(ended) == [2, 2], ended
    assert ended[0].error == ended[1].error
    assert "model.embed_tokens.weight holds a NaN or an infinity at row 500" in ended[0].error


def test_ranks_that_are_not_alike_are_told(launch: WarmRanks, tiny: TinyModels, tmp_path: Path, ids: Path) -> None:
    ended = launch(3, **job(tiny("llama"), tmp_path, ids, quantizer="rtn", others={"quantizer": "mse"}))
    assert codes(ended) == [2, 2, 2], ended
    assert "the ranks differ (quantizer is rtn there, mse here)" in ended[1].error
    assert ended[0].error == ended[2].error == f"rank 1: {ended[1].error}"


def test_a_rank_that_does_not_see_the_folder_is_named(
    launch: WarmRanks, tiny: TinyModels, tmp_path: Path, ids: Path
) -> None:
    elsewhere = tmp_path / "elsewhere" / "out"
    ended = launch(2, **job(tiny("llama"), tmp_path, ids, others={"output": elsewhere}))
    assert codes(ended) == [2, 2], ended
    assert ended[1].error.startswith(f"rank 1 cannot see {elsewhere}.partial: ")
    assert ended[0].error == f"rank 1: {ended[1].error}"


def test_a_folder_that_another_run_fills_is_refused_on_all_ranks(
    launch: WarmRanks, tiny: TinyModels, tmp_path: Path, ids: Path
) -> None:
    partial = partial_folder(tmp_path / "out")
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        ended = launch(2, **job(tiny("llama"), tmp_path, ids))
    finally:
        os.close(descriptor)
    assert codes(ended) == [2, 2], ended
    assert "another run is writing to " in ended[0].error
    assert ended[1].error == f"rank 0: {ended[0].error}"


def test_a_damaged_shard_of_an_earlier_run_ends_all_as_a_failed_check(
    launch: WarmRanks, tiny: TinyModels, tmp_path: Path, ids: Path
) -> None:
    launch(2, **job(tiny("gemma4"), tmp_path, ids, at_rank=1, asked=21, signal=signal.SIGKILL))
    shard = partial_folder(tmp_path / "out") / written_layers(tmp_path / "out")[0].removesuffix(".json")
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    ended = launch(2, **job(tiny("gemma4"), tmp_path, ids))
    assert codes(ended) == [1, 1], ended
    assert f"{shard} is damaged" in ended[0].error
    shard.unlink()
    assert codes(launch(2, **job(tiny("gemma4"), tmp_path, ids))) == [0, 0]
    assert contents(tmp_path / "out") == expected(tiny("gemma4"), tmp_path)


def test_an_equal_run_finds_its_output_whole_on_all_ranks(
    launch: WarmRanks, tiny: TinyModels, tmp_path: Path, ids: Path
) -> None:
    assert [rank.told["finished"] for rank in launch(2, **job(tiny("llama"), tmp_path, ids))] == [False, False]
    assert [rank.told["finished"] for rank in launch(3, **job(tiny("llama"), tmp_path, ids))] == [True, True, True]


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_never_comes_is_not_waited_for_without_end(
    launch: WarmRanks, tiny: TinyModels, tmp_path: Path, ids: Path, absent: int
) -> None:
    ended = launch(2, **job(tiny("llama"), tmp_path, ids, absent=absent, meeting_seconds=1))
    assert ended[1 - absent].code == 3, ended
    assert ended[1 - absent].error.startswith("the ranks cannot connect (")
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_batches_are_split_in_order_and_evenly(size: int) -> None:
    batches = [torch.tensor([[at]]) for at in range(5)]
    parts = Ranks(0, size).split(batches)
    assert [int(batch) for part in parts for batch in part] == [0, 1, 2, 3, 4]
    lengths = [len(part) for part in parts]
    assert len(parts) == size and max(lengths) - min(lengths) <= 1


def test_groups_are_shared_out_by_size_and_alike_on_all_ranks() -> None:
    sizes = {"qkv": 30, "o": 20, "gate_up": 100, "down": 50}
    assert Ranks(0, 2).share_out(sizes) == {"gate_up": 0, "down": 1, "qkv": 1, "o": 1}
    assert Ranks(0, 1).share_out(sizes) == dict.fromkeys(sizes, 0)
    turned = dict(reversed(list(sizes.items())))
    assert Ranks(1, 3).share_out(sizes) == Ranks(2, 3).share_out(turned)
    assert set(Ranks(0, 3).share_out({"a": 1, "b": 1, "c": 1}).values()) == {0, 1, 2}
    assert Ranks(0, 2).share_out({}) == {}


def test_every_layer_has_one_owner() -> None:
    for size in (1, 2, 3):
        owners = [[rank for rank in range(size) if Ranks(rank, size).owns(layer)] for layer in range(7)]
        assert all(len(owner) == 1 for owner in owners)
        assert {owner[0] for owner in owners} == set(range(size))


def test_without_a_launcher_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    device, ranks = join_ranks("cpu")
    assert (device, ranks.rank, ranks.size) == ("cpu", 0, 1)
    assert ranks.exchange("word") == ["word"]
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert join_ranks("cpu")[1].size == 1


def test_a_number_of_ranks_that_is_none_is_a_fault_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentLack, match="WORLD_SIZE is 'two', which is not a number"):
        join_ranks("cpu")
