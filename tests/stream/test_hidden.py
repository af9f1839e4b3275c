"""Hidden states between layers: the same bits wherever they wait, in whatever order they are asked for."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvquant.calibrate.walk import make_batches
from nvquant.errors import InputError
from nvquant.stream.hidden import HiddenBudget, HiddenStates
from support.conversions import TinyModels, random_samples, raw, skeleton_of
from support.walking import OneLane
from torch import Tensor

CPU = torch.device("cpu")
PLENTY = 1 << 30
SHAPE = (2, 3, 16)
SIZE = 2 * 3 * 16 * 4
DESCRIPTORS = Path("/proc/self/fd")
SAYS = r"^hidden states cannot be stored in .+: free space, use fewer --samples, or give a larger --memory-budget\.$"


def numbered(number: float) -> Tensor:
    return torch.full(SHAPE, float(number))


@contextmanager
def waiting(budget: HiddenBudget, tensors: list[Tensor], device: torch.device = CPU) -> Iterator[HiddenStates]:
    hidden = HiddenStates(device, budget)
    try:
        for tensor in tensors:
            hidden.append(tensor)
        yield hidden
    finally:
        hidden.close()


def places(hidden: HiddenStates) -> list[str]:
    return [type(place).__name__ for place in hidden._places]


@pytest.mark.parametrize(
    ("device_bytes", "host_bytes", "in_memory"),
    [
        (0, 0, []),
        (SIZE - 1, 0, []),
        (SIZE, 0, [0]),
        (0, SIZE, [0]),
        (SIZE, SIZE, [0, 1]),
        (SIZE - 1, 1, [0]),  # a CPU has one memory, so both count as one
        (PLENTY, 0, [0, 1, 2]),
        (0, PLENTY, [0, 1, 2]),
    ],
)
def test_batches_wait_in_memory_while_the_budget_lasts_and_then_on_disk(
    tmp_path: Path, device_bytes: int, host_bytes: int, in_memory: list[int]
) -> None:
    tensors = [numbered(at) for at in range(3)]
    with waiting(HiddenBudget(device_bytes, host_bytes, tmp_path), tensors) as hidden:
        fetched = [hidden.fetch(at) for at in range(3)]
        assert all(torch.equal(found, wanted) for found, wanted in zip(fetched, tensors, strict=True))
        kept = [at for at in range(3) if fetched[at].data_ptr() == tensors[at].data_ptr()]
        assert kept == in_memory
        assert places(hidden) == ["_OnDevice" if at in in_memory else "_OnDisk" for at in range(3)]
        assert len(hidden) == 3


def test_a_smaller_batch_may_take_the_memory_that_a_larger_one_could_not(tmp_path: Path) -> None:
    large, small = torch.zeros(1, 8, 16), torch.ones(1, 2, 16)
    with waiting(HiddenBudget(0, small.nbytes, tmp_path), [large, small]) as hidden:
        assert places(hidden) == ["_OnDisk", "_OnDevice"]


@pytest.mark.parametrize("budget", [0, 2 * SIZE, PLENTY], ids=["disk", "both", "memory"])
def test_layers_pass_over_all_batches_in_order(tmp_path: Path, budget: int) -> None:
    with waiting(HiddenBudget(0, budget, tmp_path), [numbered(at) for at in range(5)]) as hidden:
        for layer in range(4):
            for at in range(5):
                found = hidden.fetch(at)
                assert torch.equal(found, numbered(10 * layer + at))
                hidden.store(at, found + 10)
        assert [float(state[0, 0, 0]) for state in hidden.on_host()] == [40, 41, 42, 43, 44]


@pytest.mark.parametrize("budget", [0, 2 * SIZE, PLENTY], ids=["disk", "both", "memory"])
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_the_next_batch_is_brought_before_it_is_replaced_and_the_first_one_after(
    tmp_path: Path, batches: int, budget: int
) -> None:
    with waiting(HiddenBudget(0, budget, tmp_path), [numbered(at) for at in range(batches)]) as hidden:
        for at in range(batches):
            assert torch.equal(hidden.fetch(at), numbered(at))  # the next was asked for before this one was replaced
            hidden.store(at, numbered(100 + at))
        assert torch.equal(hidden.fetch(0), numbered(100))  # from the last batch to the first of the next layer
        hidden.store(0, numbered(200))
        if batches > 1:
            assert torch.equal(hidden.fetch(1), numbered(101))
        assert torch.equal(hidden.fetch(0), numbered(200))


def test_a_batch_that_was_brought_ahead_and_replaced_is_the_new_one(tmp_path: Path) -> None:
    for budget in (0, PLENTY):
        with waiting(HiddenBudget(0, budget, tmp_path), [numbered(0), numbered(1)]) as hidden:
            hidden.fetch(0)
            hidden.store(1, numbered(2))
            assert torch.equal(hidden.fetch(1), numbered(2))


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["fetch", "store", "pass", "on_host", "peek", "spill"]), st.integers(0, 5)), max_size=40
)


@settings(derandomize=True, database=None, deadline=None, max_examples=150)
@given(batches=st.integers(1, 6), in_memory=st.integers(0, 6), operations=OPERATIONS)
def test_whatever_is_asked_for_in_whatever_order_nothing_is_stale(
    tmp_path_factory: pytest.TempPathFactory, batches: int, in_memory: int, operations: list[tuple[str, int]]
) -> None:
    """A list of tensors is the model."""
    folder = tmp_path_factory.getbasetemp()
    model = [numbered(at) for at in range(batches)]
    number = 1000.0
    with waiting(HiddenBudget(0, in_memory * SIZE, folder), list(model)) as hidden:
        for operation, at in operations:
            at %= batches
            if operation == "fetch":
                assert torch.equal(hidden.fetch(at), model[at])
            elif operation == "spill":
                assert not hidden.spill()
            elif operation == "on_host":
                assert all(torch.equal(found, is_) for found, is_ in zip(hidden.on_host(), model, strict=True))
            elif operation == "peek":  # and give up
                assert torch.equal(next(hidden.on_host()), model[0])
            for each in {"store": [at], "pass": range(batches)}.get(operation, []):
                if operation == "pass":
                    assert torch.equal(hidden.fetch(each), model[each])
                number += 1
                model[each] = numbered(number)
                hidden.store(each, model[each])


@pytest.mark.parametrize("slow", ["pwrite", "preadv"])
def test_a_slow_disk_changes_no_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    real = getattr(os, slow)

    def slowly(*arguments: Any) -> int:
        time.sleep(0.003)
        return int(real(*arguments))

    monkeypatch.setattr(os, slow, slowly)
    with waiting(HiddenBudget(0, 0, tmp_path), [numbered(at) for at in range(7)]) as hidden:
        for layer in range(3):
            for at in range(7):
                found = hidden.fetch(at)
                assert torch.equal(found, numbered(10 * layer + at))
                hidden.store(at, found + 10)


def test_a_disk_that_takes_and_gives_little_at_once_changes_no_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, piece, begin: write(file, piece[:100], begin))
    monkeypatch.setattr(os, "preadv", lambda file, pieces, begin: read(file, [pieces[0][:70]], begin))
    tensors = [torch.rand(SHAPE, generator=torch.Generator().manual_seed(at)) for at in range(3)]
    with waiting(HiddenBudget(0, 0, tmp_path), tensors) as hidden:
        assert all(torch.equal(found, wanted) for found, wanted in zip(hidden.on_host(), tensors, strict=True))


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1, 16), (2, 7, 48), (1, 65, 576), (3, 64, 64)]


def any_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Every kind of pattern, NaN too."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", [0, 9000, PLENTY], ids=["disk", "both", "memory"])
def test_bits_shapes_and_dtypes_are_kept_and_strides_are_made_plain(
    tmp_path: Path, budget: int, dtype: torch.dtype
) -> None:
    tensors = [any_bits(shape, dtype) for shape in SHAPES]
    tensors += [tensors[1].transpose(0, 1), tensors[2][:, ::2], tensors[0].expand(4, 5, 16)]
    with waiting(HiddenBudget(0, budget, tmp_path), tensors) as hidden:
        assert hidden.shapes() == [(tuple(tensor.shape), dtype) for tensor in tensors]
        assert hidden.sizes() == [tensor.numel() * dtype.itemsize for tensor in tensors]
        for _ in range(2):
            for at, wanted in enumerate(tensors):
                found = hidden.fetch(at)
                assert (found.dtype, found.shape, raw(found)) == (dtype, wanted.shape, raw(wanted))
                assert found.is_contiguous()
                hidden.store(at, wanted)
        assert [raw(found) for found in hidden.on_host()] == [raw(wanted) for wanted in tensors]


@pytest.mark.parametrize("budget", [0, PLENTY], ids=["disk", "memory"])
@pytest.mark.parametrize("other", [numbered(9).double(), numbered(9).bfloat16(), torch.zeros(2, 3, 32)])
def test_a_state_of_another_shape_or_dtype_is_refused_and_overwrites_nothing(
    tmp_path: Path, budget: int, other: Tensor
) -> None:
    with waiting(HiddenBudget(0, budget, tmp_path), [numbered(0), numbered(1)]) as hidden:
        with pytest.raises(InputError, match=r"a decoder layer turns .* of \[2, 3, 16\] in torch\.float32 into"):
            hidden.store(0, other)
        assert [float(state[0, 0, 0]) for state in hidden.on_host()] == [0, 1]


def test_spilling_moves_nothing_on_a_cpu(tmp_path: Path) -> None:
    with waiting(HiddenBudget(SIZE, SIZE, tmp_path), [numbered(at) for at in range(3)]) as hidden:
        before = places(hidden)
        assert hidden.spill() is False
        assert places(hidden) == before == ["_OnDevice", "_OnDevice", "_OnDisk"]
        assert [float(state[0, 0, 0]) for state in hidden.on_host()] == [0, 1, 2]


def files_in(folder: Path) -> list[str]:
    """Files of this folder that the process holds open, with or without a name."""
    links = [path.readlink() for path in DESCRIPTORS.iterdir() if path.is_symlink()]
    return [str(link) for link in links if link.is_relative_to(folder)]


@pytest.mark.skipif(not DESCRIPTORS.exists(), reason="the system does not list open files")
def test_the_file_has_no_name_is_made_only_where_needed_and_closed_at_the_end(tmp_path: Path) -> None:
    hidden = HiddenStates(CPU, HiddenBudget(0, SIZE, tmp_path))
    hidden.append(numbered(0))
    assert files_in(tmp_path) == []
    for at in range(1, 4):
        hidden.append(numbered(at))
    hidden.fetch(1)
    assert len(files_in(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []
    hidden.close()
    assert files_in(tmp_path) == []
    hidden.close()  # once more does no harm


@pytest.mark.skipif(not DESCRIPTORS.exists(), reason="the system does not list open files")
def test_a_walk_that_ends_while_it_records_closes_the_file(tiny: TinyModels, tmp_path: Path) -> None:
    open_files: list[int] = []

    def end(_tokens: int) -> None:
        open_files.append(len(files_in(tmp_path)))
        if len(open_files) == 3:
            raise InterruptedError

    batches = make_batches(random_samples((20, 24, 28)), 1)
    with pytest.raises(InterruptedError):
        OneLane(skeleton_of(tiny("llama")), batches, HiddenBudget(0, 0, tmp_path), before_batch=end)
    assert open_files == [0, 1, 1]
    assert files_in(tmp_path) == []


def test_a_process_that_is_killed_leaves_no_file(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch; from pathlib import Path; from nvquant.stream.hidden import *\n"
        "hidden = HiddenStates(torch.device('cpu'), HiddenBudget(0, 0, Path(sys.argv[1])))\n"
        "hidden.append(torch.ones(1, 64, 64)); print(hidden.fetch(0).sum().item(), flush=True); os.kill(os.getpid(), 9)"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (-9, "4096.0")
    assert list(tmp_path.iterdir()) == []


def pass_over_layers(folder: Path, batches: int = 6) -> None:
    """Batches of 64 KiB, three layers."""
    with waiting(HiddenBudget(0, 0, folder), []) as hidden:
        for at in range(batches):
            hidden.append(torch.full((1, 16, 1024), float(at)))
        for _ in range(3):
            for at in range(batches):
                hidden.store(at, hidden.fetch(at) + 1)


def test_a_full_disk_is_told_in_one_sentence(tmp_path: Path) -> None:
    """As on a full disk, a write beyond the limit fails, wherever it comes to light."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for batches in (3, 20):  # noticed on reading back, or by a later write
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(InputError, match=SAYS) as caught:
                pass_over_layers(tmp_path, batches)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    pass_over_layers(tmp_path)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)  # fails where a file is still open


def test_a_disk_that_is_really_full_is_told_and_its_space_given_back(full_disk: Path) -> None:
    free = os.statvfs(full_disk).f_bfree
    pass_over_layers(full_disk, batches=3)
    for _ in range(2):
        with pytest.raises(InputError, match=SAYS.replace(r"\(.+\)", r"\(No space left on device\)")):
            pass_over_layers(full_disk)
        assert os.statvfs(full_disk).f_bfree == free
        assert list(full_disk.iterdir()) == []


def test_a_folder_where_no_file_can_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=SAYS) as caught:
        pass_over_layers(tmp_path / "absent")
    assert "No such file or directory" in str(caught.value)
    assert len(re.findall(r"[.!?](?= [A-Z]|$)", str(caught.value))) == 1


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.mark.gpu
@gpu
def test_a_gpu_has_three_tiers(tmp_path: Path) -> None:
    cuda = torch.device("cuda")
    budget = HiddenBudget(SIZE, 2 * SIZE, tmp_path)
    with waiting(budget, [numbered(at).to(cuda) for at in range(5)], cuda) as hidden:
        assert places(hidden) == ["_OnDevice", "_InHostMemory", "_InHostMemory", "_OnDisk", "_OnDisk"]
        for layer in range(4):
            for at in range(5):
                found = hidden.fetch(at)
                assert found.is_cuda and torch.equal(found.cpu(), numbered(10 * layer + at))
                hidden.store(at, found + 10)
        assert hidden.spill() is True
        assert places(hidden) == ["_OnDisk", "_InHostMemory", "_InHostMemory", "_OnDisk", "_OnDisk"]
        assert hidden.spill() is False
        states = list(hidden.on_host())
        assert [float(state[0, 0, 0]) for state in states] == [40, 41, 42, 43, 44]
        assert not any(state.is_cuda for state in states)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("host_bytes", [PLENTY, 0], ids=["host", "disk"])
def test_streams_that_run_apart_change_no_value(tmp_path: Path, host_bytes: int) -> None:
    """Kernels that take long on both sides of a copy: neither may overtake the other."""
    cuda, shape = torch.device("cuda"), (1, 1024, 2048)
    tensors = [torch.full(shape, float(at), device=cuda) for at in range(6)]
    with waiting(HiddenBudget(0, host_bytes, tmp_path), tensors, cuda) as hidden:
        for _ in range(5):
            for at in range(6):
                found = hidden.fetch(at)
                torch.cuda._sleep(5_000_000)
                result = found + 10
                torch.cuda._sleep(5_000_000)
                del found
                hidden.store(at, result)
                del result
                torch.full(shape, -1.0, device=cuda)  # takes memory that was given back too soon
        for at, state in enumerate(hidden.on_host()):
            assert torch.equal(state, torch.full(shape, 50.0 + at))
