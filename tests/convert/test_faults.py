"""What can go wrong under a run, each by its real cause: disks that are full, sources that change, memory that ends.

Every fault ends in one sentence that names the file; finished layers are kept, nothing half-written has a final name,
and the same command finishes the run with the bytes of one that nothing happened to.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import nvquant.convert.layer
import pytest
import torch
from nvquant.checkpoint.digest import file_sha256
from nvquant.checkpoint.shard_bytes import read_range
from nvquant.convert.journal import STATE_FOLDER, Journal
from nvquant.convert.options import ConvertOptions, ConvertResult
from nvquant.convert.output import partial_folder
from nvquant.convert.pipeline import convert
from nvquant.convert.progress import Progress, ProgressSink
from nvquant.convert.stop import Stopped, StopRequest
from nvquant.errors import EnvironmentLack, InputError
from support.conversions import calibration_of, contents, planned, random_samples, write_ids
from support.tiny_models import tiny_llama

LAYERS = 12
KEPT = re.compile(rf"\b(\d+) of {LAYERS} layers are complete and kept: the same command resumes the run\.$")
Fault = Callable[[Path], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of twelve layers in two shards; to be copied, not changed."""
    return tiny_llama(tmp_path_factory.mktemp("model") / "source", num_layers=LAYERS)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """What a run makes that nothing happens to, by recipe."""
    root = tmp_path_factory.mktemp("whole")

    def made(recipe: str) -> dict[str, str]:
        if not (root / recipe).exists():
            run(model, root / recipe, recipe)
        return contents(root / recipe)

    return made


@pytest.fixture
def source(model: Path, tmp_path: Path) -> Path:
    """A copy of the model, with the times of its files."""
    return shutil.copytree(model, tmp_path / "source")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 80 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def run(
    source: Path, output: Path, recipe: str = "nvfp4-full", sink: ProgressSink = lambda progress: None,
    memory: int | None = None,
) -> ConvertResult:  # fmt: skip
    """Convert, with the same calibration every time."""
    plan = planned(source, recipe)
    ids = output.with_name("ids.jsonl")
    calibration = None
    if plan.needs_calibration:
        if not ids.exists():
            write_ids(ids, random_samples((40, 7, 24)))
        calibration = calibration_of(source, ids)
    return convert(plan, ConvertOptions(output, "rtn", memory_budget_bytes=memory, progress=sink), calibration)


def once(when: Callable[[Progress], bool], what: Callable[[], None]) -> ProgressSink:
    """Lets something happen the first time that a run is as far as that."""
    happened: list[bool] = []

    def sink(progress: Progress) -> None:
        if not happened and when(progress):
            happened.append(True)
            what()

    return sink


def after_a_layer(progress: Progress) -> bool:
    return progress.layers_done >= 1


def fill(disk: Path, leaving: int = 0) -> None:
    """Take all space that a file system has left, but for so many bytes."""
    with (disk / "filler").open("wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
        file.truncate(file.tell() - leaving)


def exchange(one: Path, other: Path) -> None:
    """Swap two names at once: between two renames a writing thread would find neither."""
    at_working_folder, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    renamed = ctypes.CDLL(None).renameat2(at_working_folder, bytes(one), at_working_folder, bytes(other), swap)
    if renamed:
        pytest.skip("the system cannot exchange two names")


def room_for_two_layers(source: Path, recipe: str) -> int:
    """Bytes that what is copied and some two layers take: then a third one has no room, whatever is written first."""
    *layers, rest = (shard.tensor_bytes for shard in planned(source, recipe).shards)
    assert len(layers) == LAYERS
    return rest + 5 * max(layers) // 2


def refused(run_it: Callable[[], object]) -> str:
    """The sentence of a run that ends because of what it was given."""
    with pytest.raises(InputError) as caught:
        run_it()
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_kept(error: str, output: Path) -> int:
    """The error says how many layers are kept, these are whole, and nothing else has a final name; returns how many."""
    said = KEPT.search(error)
    assert said, error
    folder = partial_folder(output)
    journal = Journal(folder)
    records = [path.name.removesuffix(".json") for path in journal.folder.glob("model-*.json")]
    shas = {
        name: re.findall(r'"sha256": "(\w{64})"', (journal.folder / f"{name}.json").read_text())[0] for name in records
    }
    for name, sha256 in shas.items():
        assert file_sha256(folder / name) == sha256
    assert not list(folder.rglob("*.tmp"))
    unnoted = {path.name for path in folder.glob("*.safetensors")} - set(records)
    assert len(unnoted) <= 1, unnoted  # whole, but the disk had no room for its record
    layers = [name for name in records if name < f"model-{LAYERS + 1:05d}"]
    assert int(said[1]) == len(layers) >= 1
    assert not output.exists()
    return len(layers)


@pytest.mark.parametrize("recipe", ["nvfp4-full", "nvfp4-a16"])
def test_a_disk_that_fills_up_under_the_run(
    source: Path, disk: Path, whole: Callable[[str], dict[str, str]], recipe: str
) -> None:
    output = disk / "out"
    room = room_for_two_layers(source, recipe)
    sink = once(lambda progress: progress.phase == "layers", lambda: fill(disk, leaving=room))
    error = refused(lambda: run(source, output, recipe, sink))
    assert re.match(
        rf"{output}.partial/.*model-\d+-of-00013.safetensors(\.json)? cannot be written \(No space left", error
    )
    kept = assert_kept(error, output)
    still_full = refused(lambda: run(source, output, recipe))
    assert f"-o {output} needs " in still_full and "free space" in still_full
    (disk / "filler").unlink()
    assert run(source, output, recipe).layers_resumed == kept
    assert contents(output) == whole(recipe)


def test_a_disk_without_room_for_the_hidden_states(
    source: Path, disk: Path, whole: Callable[[str], dict[str, str]]
) -> None:
    output = disk / "out"
    folder = partial_folder(output) / STATE_FOLDER

    def fill_behind_the_copy() -> None:
        deadline = time.monotonic() + 60
        while not (folder / "model-00013-of-00013.safetensors.json").exists():  # else it may be what finds no room
            assert time.monotonic() < deadline
            time.sleep(0.01)
        fill(disk)

    sink = once(lambda progress: progress.phase == "record", fill_behind_the_copy)
    error = refused(lambda: run(source, output, sink=sink, memory=1))
    assert error == (
        f"hidden states cannot be stored in {folder} (No space left on device): free space, use fewer --samples, or "
        f"give a larger --memory-budget."
    )
    assert not output.exists() and not partial_folder(output).exists()
    (disk / "filler").unlink()
    run(source, output, memory=1)
    assert contents(output) == whole("nvfp4-full")


def test_a_disk_that_is_full_when_only_the_index_is_missing(
    source: Path, disk: Path, whole: Callable[[str], dict[str, str]]
) -> None:
    output = disk / "out"
    sink = once(lambda progress: progress.phase == "finish", lambda: fill(disk))
    error = refused(lambda: run(source, output, sink=sink))
    assert error.startswith(
        f"{output}.partial/model.safetensors.index.json cannot be written (No space left on device)"
    )
    assert assert_kept(error, output) == LAYERS
    (disk / "filler").unlink()
    assert run(source, output).layers_resumed == LAYERS
    assert contents(output) == whole("nvfp4-full")


def test_a_disk_that_becomes_read_only(source: Path, disk: Path, whole: Callable[[str], dict[str, str]]) -> None:
    output = disk / "out"

    def remount() -> None:
        command = ["mount", "-o", "remount,ro", disk]
        deadline = time.monotonic() + 30
        while subprocess.run(command, capture_output=True).returncode:  # refused while a file is open for writing
            assert time.monotonic() < deadline
            time.sleep(0.01)

    error = refused(lambda: run(source, output, "nvfp4-a16", once(after_a_layer, remount)))
    assert re.match(rf"{output}.partial/.* cannot be written \(Read-only file system\): ", error)
    assert_kept(error, output)
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert run(source, output, "nvfp4-a16").layers_resumed >= 1
    assert contents(output) == whole("nvfp4-a16")


@pytest.mark.parametrize("recipe", ["nvfp4-full", "nvfp4-a16"])
def test_an_output_folder_that_becomes_a_file(
    source: Path, tmp_path: Path, whole: Callable[[str], dict[str, str]], recipe: str
) -> None:
    output, moved = tmp_path / "out", tmp_path / "moved"

    def replace() -> None:
        moved.write_text("in its place")
        exchange(moved, partial_folder(output))

    error = refused(lambda: run(source, output, recipe, once(after_a_layer, replace)))
    assert re.match(rf"{output}.partial/.* cannot be written \(Not a directory\): ", error)
    assert partial_folder(output).read_text() == "in its place"
    assert "nvquant did not write it" in refused(lambda: run(source, output, recipe))
    partial_folder(output).unlink()
    moved.rename(partial_folder(output))
    assert run(source, output, recipe).layers_resumed >= 1
    assert contents(output) == whole(recipe)


def test_an_output_below_a_file_is_refused_before_work(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    plan = planned(source, "nvfp4-a16")
    error = refused(lambda: convert(plan, ConvertOptions(tmp_path / "file" / "out", "rtn"), None))
    assert error == f"{tmp_path}/file/out.partial cannot be created (Not a directory): choose another folder with -o."


def touch(shard: Path) -> None:
    os.utime(shard)


def rewrite(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes())


def cut_off(shard: Path) -> None:
    times = shard.stat()
    os.truncate(shard, times.st_size // 2)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def put_a_folder(shard: Path) -> None:
    shard.unlink()
    shard.mkdir()


def put_a_pipe(shard: Path) -> None:
    aside = shard.with_suffix(".pipe")
    os.mkfifo(aside)
    aside.rename(shard)


def put_a_circle_of_links(shard: Path) -> None:
    aside = shard.with_suffix(".link")
    aside.symlink_to(shard.name)
    aside.rename(shard)


CHANGED, UNREADABLE = "changed while it was being read: wait until", "cannot be read ({}): restore the file"
FAULTS: list[tuple[Fault, str]] = [
    (touch, CHANGED),
    (rewrite, CHANGED),
    (cut_off, CHANGED),
    (put_a_folder, CHANGED),
    (put_a_pipe, CHANGED),
    (Path.unlink, UNREADABLE.format("No such file or directory")),
    (put_a_circle_of_links, UNREADABLE.format("Too many levels of symbolic links")),
]


@pytest.mark.parametrize("recipe", ["nvfp4-full", "nvfp4-a16"])
@pytest.mark.parametrize(("fault", "what"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_source_that_changes_under_the_run(
    model: Path,
    source: Path,
    tmp_path: Path,
    whole: Callable[[str], dict[str, str]],
    recipe: str,
    fault: Fault,
    what: str,
) -> None:
    output, shards = tmp_path / "out", sorted(source.glob("*.safetensors"))
    assert len(shards) == 2

    def change() -> None:
        for shard in shards:
            fault(shard)

    error = refused(lambda: run(source, output, recipe, once(after_a_layer, change)))
    assert re.match(rf"({shards[0]}|{shards[1]}) ", error), error
    assert what in error or (fault is put_a_folder and "No such file" in error)  # for a moment there is neither
    kept = assert_kept(error, output)
    shutil.rmtree(source)
    shutil.copytree(model, source)
    assert run(source, output, recipe).layers_resumed == kept
    assert contents(output) == whole(recipe)


def test_a_failed_copy_ends_the_run_before_the_other_layers_are_made(
    source: Path, tmp_path: Path, whole: Callable[[str], dict[str, str]]
) -> None:
    output, stop = tmp_path / "out", StopRequest()
    sink = once(after_a_layer, partial(setattr, stop, "number", signal.SIGTERM))
    options = ConvertOptions(output, "rtn", progress=sink, stop=stop)
    with pytest.raises(Stopped):
        convert(planned(source, "nvfp4-a16"), options, None)
    copied = partial_folder(output) / f"model-{LAYERS + 1:05d}-of-{LAYERS + 1:05d}.safetensors"
    copied.unlink(missing_ok=True)
    (copied.parent / STATE_FOLDER / f"{copied.name}.json").unlink(missing_ok=True)
    in_the_way = copied.with_name(f"{copied.name}.tmp")
    in_the_way.mkdir()
    sink = once(lambda progress: progress.phase == "layers", lambda: time.sleep(0.5))  # the copy has failed by then
    error = refused(lambda: run(source, output, "nvfp4-a16", sink))
    assert error.startswith(f"{copied} cannot be written (Is a directory): ")
    in_the_way.rmdir()
    assert assert_kept(error, output) < LAYERS
    run(source, output, "nvfp4-a16")
    assert contents(output) == whole("nvfp4-a16")


def test_a_shard_that_vanishes_between_plan_and_run_is_named(source: Path, tmp_path: Path) -> None:
    plan = planned(source, "nvfp4-a16")
    shard = min(source.glob("*.safetensors"))
    shard.unlink()
    error = refused(lambda: convert(plan, ConvertOptions(tmp_path / "out", "rtn"), None))
    assert error.startswith(f"{shard} cannot be read (No such file or directory): restore the file")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="has no /proc/self/mem, whose first page nobody can read"
)
def test_an_input_output_error_is_told_with_the_file() -> None:
    error = refused(lambda: read_range(Path("/proc/self/mem"), 0, memoryview(bytearray(16))))
    assert error == "/proc/self/mem cannot be read (Input/output error): restore the file and run the command again."


def test_a_gpu_whose_memory_ends_while_matrices_are_quantized_is_told_in_one_sentence(
    source: Path, tmp_path: Path, whole: Callable[[str], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch raises there, raised here: a CPU's memory has no such end."""
    real, calls = nvquant.convert.layer.quantize_group, itertools.count(1)

    def ending(*arguments: Any) -> Any:
        if next(calls) == 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")
        return real(*arguments)

    output = tmp_path / "out"
    monkeypatch.setattr(nvquant.convert.layer, "quantize_group", ending)
    with pytest.raises(EnvironmentLack) as caught:
        run(source, output)
    assert re.match(
        r"the GPU ran out of memory for the quantization of layer \d: end other programs that use it", str(caught.value)
    )
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    kept = assert_kept(str(caught.value), output)
    assert run(source, output).layers_resumed == kept
    assert contents(output) == whole("nvfp4-full")
