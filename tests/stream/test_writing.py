"""Shards on their way to the disk: exact bytes under their final names, told only when durable, and errors that reach
the run."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from nvquant.checkpoint.writer import TensorEntry, build_header
from nvquant.errors import InputError
from nvquant.plan.plan import Plan, PlannedShard
from nvquant.stream import staging, writing
from nvquant.stream.trace import Trace
from nvquant.stream.writing import ShardWriter, copy_shard
from safetensors.torch import load_file
from support.conversions import TinyModels, planned, raw, recipe_for, tensors_in
from torch import Tensor

CPU = torch.device("cpu")
DTYPES = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32, "BF16": torch.bfloat16}
FULL = r"00001-of-\d+\.safetensors cannot be written \(.+\): free space or choose another folder with -o\.$"


def plan_of(tiny: TinyModels, name: str = "gemma4") -> Plan:
    return planned(tiny(name), recipe_for(name, "nvfp4-full"))


def layer_shards(plan: Plan) -> list[PlannedShard]:
    return [shard for shard in plan.shards if shard.layer is not None]


def random_tensors(shard: PlannedShard, seed: int = 0) -> dict[str, Tensor]:
    """Any bytes in the planned shapes; not in the order of the file."""
    generator = torch.Generator().manual_seed(seed)

    def one(entry: TensorEntry) -> Tensor:
        data = torch.randint(0, 256, (entry.nbytes,), generator=generator, dtype=torch.uint8)
        return data.view(DTYPES[entry.dtype]).view(entry.shape)

    return {entry.name: one(entry) for entry in sorted(shard.entries, key=lambda entry: entry.name)}


def file_of(shard: PlannedShard, tensors: dict[str, Tensor]) -> bytes:
    return build_header(shard.entries) + b"".join(raw(tensors[entry.name]) for entry in shard.entries)


def apart(shard: PlannedShard, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As a conversion hands them over: what is made for the shard, and what is kept as it lies in the source."""
    is_made = {entry.name: entry.dtype in ("U8", "F8_E4M3") or "global_scale" in entry.name for entry in shard.entries}
    made = {name: tensor for name, tensor in tensors.items() if is_made[name]}
    kept = {name: tensor for name, tensor in tensors.items() if not is_made[name]}
    assert made and kept
    return made, kept


def writer_of(folder: Path) -> ShardWriter:
    return ShardWriter(folder, CPU, Trace())


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("write", "hash"))]


@pytest.mark.parametrize("size", [100, 16 << 20])
@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4_e2b", "gemma4_moe"])
def test_every_shard_has_exactly_the_planned_bytes(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    monkeypatch.setattr(staging, "PIECE_BYTES", size)
    plan = plan_of(tiny, name)
    digests: dict[str, str] = {}
    wanted: dict[str, bytes] = {}
    with writer_of(tmp_path) as writer:
        for shard in layer_shards(plan):
            tensors = random_tensors(shard, shard.layer or 0)
            wanted[shard.file] = file_of(shard, tensors)
            made, kept = apart(shard, tensors)
            writer.submit(shard, made, kept, lambda digest, file=shard.file: digests.update({file: digest}))
            for tensor in kept.values():  # they may be overwritten at once
                tensor.view(torch.uint8).fill_(255) if tensor.ndim else tensor.fill_(255)
        writer.finish()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == wanted
    assert digests == {file: hashlib.sha256(data).hexdigest() for file, data in wanted.items()}
    assert writer.bytes_written == sum(shard.tensor_bytes for shard in layer_shards(plan))
    assert threads() == []


def test_views_and_other_strides_are_written_as_their_values(tiny: TinyModels, tmp_path: Path) -> None:
    plan = plan_of(tiny, "llama")
    shard = layer_shards(plan)[0]
    tensors = random_tensors(shard)
    strided = {key: value.mT.contiguous().mT if value.ndim == 2 else value for key, value in tensors.items()}
    assert any(not value.is_contiguous() for value in strided.values())
    packed = next(entry for entry in shard.entries if entry.name.endswith("weight_scale"))
    strided[packed.name] = strided[packed.name].view(torch.uint8)  # of the quantizer: bytes
    with writer_of(tmp_path) as writer:
        writer.submit(shard, *apart(shard, strided), lambda digest: None)
        writer.finish()
    assert (tmp_path / shard.file).read_bytes() == file_of(shard, tensors)
    read = load_file(tmp_path / shard.file)
    assert all(raw(read[key]) == raw(value) for key, value in tensors.items())


def test_done_is_called_when_the_file_is_durable_under_its_name(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tiny)
    shard = layer_shards(plan)[0]
    order: list[tuple[str, list[str]]] = []
    real = os.fsync

    def recording(descriptor: int) -> None:
        real(descriptor)
        order.append(("fsync", sorted(path.name for path in tmp_path.iterdir())))

    monkeypatch.setattr(os, "fsync", recording)

    def done(digest: str) -> None:
        data = (tmp_path / shard.file).read_bytes()
        order.append(("done", sorted(path.name for path in tmp_path.iterdir())))
        assert digest == hashlib.sha256(data).hexdigest()

    with writer_of(tmp_path) as writer:
        writer.submit(shard, *apart(shard, random_tensors(shard)), done)
        writer.finish()
    assert order == [("fsync", [f"{shard.file}.tmp"]), ("fsync", [shard.file]), ("done", [shard.file])]


def test_two_shards_are_under_way_at_most_and_a_third_waits(tiny: TinyModels, tmp_path: Path) -> None:
    plan = plan_of(tiny)
    shards = layer_shards(plan)
    go_on, told = threading.Event(), []
    taken: list[int] = []

    def hold(digest: str) -> None:
        assert go_on.wait(60)
        told.append(digest)

    with writer_of(tmp_path) as writer:

        def submit_three() -> None:
            for at in range(3):
                writer.submit(shards[at], *apart(shards[at], random_tensors(shards[at], at)), hold)
                taken.append(at)

        thread = threading.Thread(target=submit_three)
        thread.start()
        while len(taken) < 2:
            time.sleep(0.005)
        time.sleep(0.05)  # what would be taken too early would be taken now
        assert taken == [0, 1] and told == []
        go_on.set()
        thread.join()
        writer.finish()
    assert taken == [0, 1, 2] and len(told) == 3
    for at in range(3):
        assert (tmp_path / shards[at].file).read_bytes() == file_of(shards[at], random_tensors(shards[at], at))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a full disk, a write beyond `size` fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def in_the_end(writer: ShardWriter, submit: Callable[[int], None]) -> None:
    writer.finish()


def by_check(writer: ShardWriter, submit: Callable[[int], None]) -> None:
    while True:
        writer.check()
        time.sleep(0.005)


def by_the_next(writer: ShardWriter, submit: Callable[[int], None]) -> None:
    for at in range(1, 6):
        submit(at)
        time.sleep(0.05)


@pytest.mark.parametrize("notice", [in_the_end, by_check, by_the_next])
def test_a_write_that_failed_is_raised_to_the_run_and_nothing_is_left(
    tiny: TinyModels, tmp_path: Path, notice: Callable[[ShardWriter, Callable[[int], None]], None]
) -> None:
    plan = plan_of(tiny)
    shards = layer_shards(plan)
    told: list[str] = []
    with largest_file(1000), pytest.raises(InputError, match=FULL), writer_of(tmp_path) as writer:

        def submit(at: int) -> None:
            writer.submit(shards[at], *apart(shards[at], random_tensors(shards[at], at)), told.append)

        submit(0)
        notice(writer, submit)
    assert told == []
    assert list(tmp_path.iterdir()) == []
    assert threads() == []


def test_an_error_of_done_is_raised_too_and_the_file_stays(tiny: TinyModels, tmp_path: Path) -> None:
    plan = plan_of(tiny)
    shard = layer_shards(plan)[0]

    def fail(_digest: str) -> None:
        raise InputError("the journal cannot be written.")

    with pytest.raises(InputError, match="the journal"), writer_of(tmp_path) as writer:
        writer.submit(shard, *apart(shard, random_tensors(shard)), fail)
        writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == [shard.file]


def test_after_an_error_elsewhere_what_was_taken_is_still_written_and_told(tiny: TinyModels, tmp_path: Path) -> None:
    plan = plan_of(tiny)
    told: list[str] = []
    with pytest.raises(InterruptedError), writer_of(tmp_path) as writer:
        for shard in layer_shards(plan)[:2]:
            writer.submit(shard, *apart(shard, random_tensors(shard)), told.append)
        raise InterruptedError
    assert sorted(path.name for path in tmp_path.iterdir()) == [shard.file for shard in layer_shards(plan)[:2]]
    assert len(told) == 2
    assert threads() == []


def test_nothing_to_write_is_no_trouble(tmp_path: Path) -> None:
    with writer_of(tmp_path) as writer:
        writer.check()
        writer.finish()
    assert list(tmp_path.iterdir()) == [] and threads() == []


@pytest.mark.parametrize("size", [1000, 16 << 20])
@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4_unified"])
def test_a_shard_of_the_rest_is_copied_byte_for_byte(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    monkeypatch.setattr("nvquant.checkpoint.source.COPY_CHUNK_BYTES", size)
    plan, before = plan_of(tiny, name), tensors_in(tiny(name))
    yielded: list[float] = []
    for shard in plan.shards:
        if shard.layer is None:
            digest = copy_shard(plan.source, plan, tmp_path, shard, yielded.append)
            data = (tmp_path / shard.file).read_bytes()
            assert data == file_of(shard, before)
            assert digest == hashlib.sha256(data).hexdigest()
    rest = [entry for shard in plan.shards if shard.layer is None for entry in shard.entries]
    assert rest and len(yielded) == sum(-(-entry.nbytes // size) for entry in rest)
    assert set(yielded) == {writing.YIELD_SECONDS}


def test_a_copy_that_is_told_to_end_leaves_nothing(tiny: TinyModels, tmp_path: Path) -> None:
    def end(_seconds: float) -> None:
        raise InputError("the run has ended.")

    plan = plan_of(tiny)
    with pytest.raises(InputError, match="the run has ended"):
        copy_shard(plan.source, plan, tmp_path, plan.shards[-1], end)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_what_changed_or_onto_a_full_disk_is_told_with_the_file_named(
    tiny: TinyModels, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("llama"), source)
    plan, out = planned(source), tmp_path / "out"
    out.mkdir()
    shard = plan.shards[-1]
    with largest_file(1000), pytest.raises(InputError, match=rf"{shard.file} cannot be written \("):
        copy_shard(plan.source, plan, out, shard, lambda seconds: None)
    origin = plan.source.path(shard.entries[0].name)
    os.utime(origin, ns=(1, 1))
    with pytest.raises(InputError, match=rf"{origin.name} changed while it was being read"):
        copy_shard(plan.source, plan, out, shard, lambda seconds: None)
    assert list(out.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("size", [100, 16 << 20])
def test_a_gpus_tensors_are_written_as_they_were_when_they_were_handed_over(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(staging, "PIECE_BYTES", size)
    plan, cuda = plan_of(tiny), torch.device("cuda")
    wanted = {}
    with ShardWriter(tmp_path, cuda, Trace()) as writer:
        for shard in layer_shards(plan):
            tensors = random_tensors(shard, shard.layer or 0)
            wanted[shard.file] = file_of(shard, tensors)
            on_gpu = {key: value.to(cuda) if value.numel() > 1 else value for key, value in tensors.items()}
            torch.cuda._sleep(20_000_000)  # the bytes leave long after they were handed over
            made, kept = apart(shard, on_gpu)
            strided = {key: value.mT.contiguous().mT if value.ndim == 2 else value for key, value in made.items()}
            writer.submit(shard, strided, kept, lambda digest: None)
            for value in kept.values():
                value.view(torch.uint8).fill_(255) if value.ndim else value.fill_(255)
        writer.finish()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == wanted
