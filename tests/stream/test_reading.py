"""Layers on their way from the shards: in order, with the right bytes, never more than two, and no thread left."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nvquant.checkpoint.source import MOST_READERS, Checkpoint
from nvquant.errors import InputError
from nvquant.plan.plan import Plan
from nvquant.stream import reading
from nvquant.stream.reading import LayerReader, layer_digest
from nvquant.stream.trace import Trace
from support.conversions import TinyModels, planned, raw, recipe_for, tensors_in
from support.raw_safetensors import read_raw, write_raw
from support.tiny_models import WRITERS

CPU = torch.device("cpu")


def plan_of(tiny: TinyModels, name: str) -> Plan:
    return planned(tiny(name), recipe_for(name, "nvfp4-full"))


def reader_of(
    plan: Plan, layers: list[int], is_hashed: Callable[[int], bool] = lambda layer: True, device: torch.device = CPU
) -> LayerReader:
    return LayerReader(plan.source, plan.tensors_by_layer(), layers, device, is_hashed, Trace())


def threads() -> set[str]:
    """Names of this process's threads that belong to a reader."""
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(("reader", "read_"))}


def until(is_so: Callable[[], bool]) -> None:
    """Wait for what other threads will do; a test that waits in vain fails."""
    for _ in range(2000):
        if is_so():
            return
        time.sleep(0.005)
    raise AssertionError("never came about")


def digest_of(folder: Path, plan: Plan, layer: int) -> str:
    """The hash of a layer, from the files alone."""
    stored = tensors_in(folder)
    mine = sorted(name for name in stored if name.startswith(f"{plan.prefix}.{layer}."))
    lines = [f"{name} {hashlib.sha256(raw(stored[name])).hexdigest()}\n" for name in mine]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("name", WRITERS)
def test_layers_arrive_in_order_with_the_bytes_dtypes_and_shapes_of_the_files(tiny: TinyModels, name: str) -> None:
    plan, stored = plan_of(tiny, name), tensors_in(tiny(name))
    seen = []
    with reader_of(plan, plan.layers) as reader:
        for loaded in reader:
            seen.append(loaded.layer)
            assert set(loaded.tensors) == {key for key in stored if key.startswith(f"{plan.prefix}.{loaded.layer}.")}
            for key, tensor in loaded.tensors.items():
                assert (tensor.dtype, tensor.shape) == (stored[key].dtype, stored[key].shape)
                assert raw(tensor) == raw(stored[key])
            assert loaded.sha256 == digest_of(tiny(name), plan, loaded.layer)
            loaded.release()
    assert seen == plan.layers
    of_layers = [key for names in plan.tensors_by_layer().values() for key in names]
    assert reader.bytes_read == sum(stored[key].nbytes for key in of_layers)
    assert threads() == set()


def test_any_layers_may_be_asked_for_and_only_some_hashed(tiny: TinyModels) -> None:
    plan = plan_of(tiny, "gemma4")
    hashes = {}
    with reader_of(plan, [4, 1, 3], lambda layer: layer != 1) as reader:
        for loaded in reader:
            hashes[loaded.layer] = loaded.sha256
            loaded.release()
    folder = tiny("gemma4")
    assert hashes == {4: digest_of(folder, plan, 4), 1: None, 3: digest_of(folder, plan, 3)}
    assert list(hashes) == [4, 1, 3]


def test_no_layer_is_no_trouble(tiny: TinyModels) -> None:
    with reader_of(plan_of(tiny, "llama"), []) as reader:
        assert list(reader) == []
    assert threads() == set()


def test_the_hash_of_a_layer_is_of_names_and_contents_in_the_order_of_the_names() -> None:
    lines = "a 01\nb 02\n"
    assert layer_digest({"b": "02", "a": "01"}) == hashlib.sha256(lines.encode()).hexdigest()
    assert layer_digest({"a": "02", "b": "01"}) != layer_digest({"a": "01", "b": "02"})


@pytest.mark.parametrize("size", [1, 7, 1000, 16 << 20])
def test_pieces_of_any_size_make_the_same_layer(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", size)
    plan = plan_of(tiny, "llama")
    with reader_of(plan, [1]) as reader:
        (loaded,) = reader
        assert loaded.sha256 == digest_of(tiny("llama"), plan, 1)
        stored = tensors_in(tiny("llama"))
        assert all(raw(tensor) == raw(stored[key]) for key, tensor in loaded.tensors.items())


class Watched(Checkpoint):
    """Notes of which tensor each piece was read."""

    def read_into(self, name: str, buffer: memoryview, begin: int = 0) -> None:
        self.seen().append(name)
        super().read_into(name, buffer, begin)

    def seen(self) -> list[str]:
        found: list[str] = vars(self).setdefault("_seen", [])
        return found

    def layers(self, plan: Plan) -> set[int]:
        return {layer for layer, names in plan.tensors_by_layer().items() if set(self.seen()) & set(names)}


class Told(threading.Event):
    """An event that sets another one with itself."""

    def __init__(self, other: threading.Event) -> None:
        super().__init__()
        self._other = other

    def set(self) -> None:
        super().set()
        self._other.set()


def watched(plan: Plan) -> tuple[Plan, Watched]:
    source = plan.source
    new = Watched(source.folder, source.config, source.shards, source.files)
    values = {field: getattr(plan, field) for field in Plan.__dataclass_fields__}
    return Plan(**(values | {"source": new})), new


def test_at_most_two_layers_are_held_and_a_buffer_given_back_is_filled_again(tiny: TinyModels) -> None:
    plan, source = watched(plan_of(tiny, "gemma4"))
    with reader_of(plan, plan.layers) as reader:
        layers = iter(reader)
        first, second = next(layers), next(layers)
        reader.wait_until_idle(60)
        time.sleep(0.05)  # what would be read too early would be read now
        assert source.layers(plan) == {0, 1}
        before = {key: raw(tensor) for key, tensor in first.tensors.items()}
        places = {tensor.untyped_storage().data_ptr() for tensor in (*first.tensors.values(), *second.tensors.values())}
        assert len(places) == 2
        first.release()
        third = next(layers)
        assert source.layers(plan) == {0, 1, 2}
        storage = next(iter(third.tensors.values())).untyped_storage().data_ptr()
        assert storage == next(iter(first.tensors.values())).untyped_storage().data_ptr()
        assert {key: raw(tensor) for key, tensor in first.tensors.items()} != before
        stored = tensors_in(tiny("gemma4"))
        for loaded in (second, third):
            assert all(raw(tensor) == raw(stored[key]) for key, tensor in loaded.tensors.items())


def test_one_layer_is_read_ahead_while_another_is_in_use(tiny: TinyModels) -> None:
    plan, source = watched(plan_of(tiny, "gemma4"))
    with reader_of(plan, plan.layers) as reader:
        first = next(iter(reader))
        until(lambda: source.layers(plan) == {0, 1})
        assert first.layer == 0


def test_tensors_begin_where_every_processor_likes_it(tiny: TinyModels) -> None:
    plan = plan_of(tiny, "gemma4_e2b")
    with reader_of(plan, plan.layers) as reader:
        for loaded in reader:
            assert all(tensor.storage_offset() * tensor.itemsize % 512 == 0 for tensor in loaded.tensors.values())
            loaded.release()


def broken_copy(tiny: TinyModels, folder: Path) -> tuple[Plan, Path]:
    """A plan of a model of its own, and the shard that holds its layer 2."""
    shutil.copytree(tiny("llama"), folder)
    plan = planned(folder)
    return plan, plan.source.path(plan.tensors_by_layer()[2][0])


def vanish(path: Path) -> None:
    path.unlink()


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [vanish, shrink, become_a_folder])
def test_an_error_reaches_who_waits_for_the_layer_with_the_file_named(
    tiny: TinyModels, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    plan, path = broken_copy(tiny, tmp_path / "model")
    by_layer = plan.tensors_by_layer()
    first = [layer for layer, names in by_layer.items() if path not in map(plan.source.path, names)]
    damage(path)
    seen = []
    with pytest.raises(InputError) as caught, reader_of(plan, [*first, 2]) as reader:
        for loaded in reader:
            seen.append(loaded.layer)
            loaded.release()
    assert seen == first
    assert path.name in str(caught.value)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert threads() == set()


def test_a_shard_that_changes_between_two_layers_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    plan, path = broken_copy(tiny, tmp_path / "model")
    mine = [layer for layer, names in plan.tensors_by_layer().items() if plan.source.path(names[0]) == path]
    layers = [mine[0]] * 2 + mine
    with pytest.raises(InputError, match="changed while it was being read"), reader_of(plan, layers) as reader:
        arriving = iter(reader)
        first = next(arriving)
        next(arriving)  # both buffers are taken: nothing is being read
        entries, data = read_raw(path)
        write_raw(path, entries, data[::-1])
        os.utime(path, ns=(1, 1))
        first.release()
        next(arriving)


@pytest.mark.parametrize("taken", [0, 1, 2, 3])
@pytest.mark.parametrize("is_released", [True, False])
def test_leaving_early_ends_all_threads(tiny: TinyModels, taken: int, is_released: bool) -> None:
    plan, source = watched(plan_of(tiny, "gemma4"))
    with pytest.raises(InterruptedError), reader_of(plan, plan.layers) as reader:
        assert "reader" in threads()
        layers = iter(reader)
        for _ in range(taken if is_released else min(taken, 2)):
            loaded = next(layers)
            if is_released:
                loaded.release()
        raise InterruptedError
    assert threads() == set()
    assert len(source.layers(plan)) <= taken + 2


def test_what_is_left_of_a_layer_is_not_read_when_nobody_wants_it(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 8)  # thousands of pieces a layer
    plan, source = watched(plan_of(tiny, "gemma4"))
    is_left = threading.Event()
    real = source.read_into

    def hold_the_eleventh(name: str, buffer: memoryview, begin: int = 0) -> None:
        real(name, buffer, begin)
        if len(source.seen()) > 10:
            assert is_left.wait(60)

    monkeypatch.setattr(Watched, "read_into", lambda _source, *arguments: hold_the_eleventh(*arguments))
    with reader_of(plan, plan.layers) as reader:
        until(lambda: len(source.seen()) > 10)
        monkeypatch.setattr(reader, "_has_left", Told(is_left))
    assert threads() == set()
    assert len(source.seen()) <= 10 + MOST_READERS


def test_an_error_that_nobody_waited_for_ends_the_threads_too(tiny: TinyModels, tmp_path: Path) -> None:
    plan, path = broken_copy(tiny, tmp_path / "model")
    path.unlink()
    with reader_of(plan, [2]) as reader:
        until(lambda: "reader" not in threads())
        reader.wait_until_idle(60)
    assert threads() == set()


def test_it_is_idle_when_all_buffers_are_full_and_at_the_end(tiny: TinyModels) -> None:
    plan = plan_of(tiny, "llama")
    with reader_of(plan, plan.layers) as reader:
        layers = iter(reader)
        held = [next(layers), next(layers)]
        until(reader._idle.is_set)
        for loaded in held:
            loaded.release()
        assert next(layers).layer == 2
        until(reader._idle.is_set)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("size", [1000, 16 << 20])
@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4_e2b", "gemma4_moe"])
def test_a_gpu_gets_the_bytes_of_the_files_also_into_a_buffer_still_in_use(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", size)
    plan, stored = plan_of(tiny, name), tensors_in(tiny(name))
    copies = {}
    with reader_of(plan, plan.layers, device=torch.device("cuda")) as reader:
        for loaded in reader:
            assert loaded.sha256 == digest_of(tiny(name), plan, loaded.layer)
            torch.cuda._sleep(20_000_000)  # the copies come long after the buffer was given back
            copies |= {key: tensor.clone() for key, tensor in loaded.tensors.items()}
            loaded.release()
    for key, tensor in copies.items():
        assert tensor.is_cuda and raw(tensor.cpu()) == raw(stored[key])
