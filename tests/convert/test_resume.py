"""Runs that go on where an earlier one ended, and what keeps them from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nvquant.convert.identity
import pytest
from nvquant.convert.journal import STATE_FOLDER
from nvquant.convert.options import ConvertOptions, ConvertResult
from nvquant.convert.output import partial_folder
from nvquant.convert.pipeline import convert
from nvquant.convert.progress import Progress
from nvquant.errors import CheckFailed, InputError
from nvquant.stream.manifest import MANIFEST_NAME
from support.conversions import (
    COMPRESSED_TENSORS,
    MODELOPT,
    calibration_of,
    contents,
    edit_config,
    planned,
    random_samples,
    write_ids,
)
from support.raw_safetensors import read_raw
from support.tiny_models import WRITERS, tiny_gemma4, tiny_llama
from torch import Tensor


class Stop(Exception):
    pass


def stop_at(layers: int) -> Callable[[Progress], None]:
    def progress(now: Progress) -> None:
        if now.layers_done == layers:
            raise Stop

    return progress


class Conversion:
    """A conversion of one source; it may be ended early and run again with other choices."""

    def __init__(self, source: Path, folder: Path, **choices: Any) -> None:
        self.source, self.output, self.choices = source, folder / "out", choices
        self.partial = partial_folder(self.output)
        self._ids = folder / "ids.jsonl"

    def run(self, **choices: Any) -> ConvertResult:
        chosen = self.choices | choices
        source = chosen.get("source", self.source)
        quantizer = chosen.get("quantizer", "rtn")
        layout = chosen.get("layout", COMPRESSED_TENSORS)
        plan = planned(source, chosen.get("recipe", "nvfp4-full"), layout, quantizer)
        samples: list[Tensor] = chosen.get("samples", random_samples((12, 12, 20)))
        calibration = calibration_of(source, write_ids(self._ids, samples)) if plan.needs_calibration else None
        names = ("batch_size", "restart", "progress", "fold")
        options = ConvertOptions(chosen.get("output", self.output), quantizer)
        return convert(plan, replace(options, **{name: chosen[name] for name in names if name in chosen}), calibration)

    def end_early(self, layers: int = 1, **choices: Any) -> None:
        """Run until so many layers are whole: those before the others, and perhaps two more that were on their way."""
        with pytest.raises(Stop):
            self.run(progress=stop_at(layers), **choices)
        for record in sorted((self.partial / STATE_FOLDER).glob("model-*.json"))[layers:]:
            if json.loads(record.read_text())["layer"] is not None:
                record.unlink()

    def undisturbed(self, **choices: Any) -> dict[str, str]:
        """The contents of a whole run's output."""
        output = self.output.with_name("undisturbed")
        self.run(output=output, **choices)
        found = contents(output)
        shutil.rmtree(output)
        return found

    def shard(self, layer: int) -> Path:
        """The file of a layer in the partial folder."""
        shards = {shard.layer: shard.file for shard in planned(self.source).shards}
        return self.partial / shards[layer]


@pytest.fixture
def llama(tmp_path: Path) -> Conversion:
    return Conversion(tiny_llama(tmp_path / "source"), tmp_path)


TIED = ["llama", "gemma4", "gemma4_e2b", "gemma4_text", "gemma2"]
GPTQ = [("llama", "gptq"), ("gemma4", "gptq"), ("gemma4_e2b", "gptq")]


@pytest.mark.parametrize(("name", "quantizer"), [*((name, "rtn") for name in TIED), *GPTQ])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_run_goes_on_behind_the_layers_that_are_whole(tmp_path: Path, name: str, quantizer: str, layers: int) -> None:
    conversion = Conversion(WRITERS[name](tmp_path / "source"), tmp_path, quantizer=quantizer)
    expected = conversion.undisturbed()
    conversion.end_early(layers)
    kept = {file: file.stat().st_mtime_ns for file in map(conversion.shard, range(layers))}
    inodes = {file.name: file.stat().st_ino for file in kept}
    seen: list[Progress] = []
    result = conversion.run(progress=seen.append)
    assert result.layers_resumed == layers
    assert "replay" in result.phases
    assert {now.layers_skipped for now in seen if now.layers} == {layers}
    assert contents(conversion.output) == expected
    assert not conversion.partial.exists()
    for file, mtime in kept.items():
        now = (conversion.output / file.name).stat()
        assert (now.st_mtime_ns, now.st_ino) == (mtime, inodes[file.name])


@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma2"])
@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_run_with_folds_goes_on_too(tmp_path: Path, name: str, quantizer: str, layers: int) -> None:
    conversion = Conversion(WRITERS[name](tmp_path / "source"), tmp_path, quantizer=quantizer, fold=True)
    expected = conversion.undisturbed()
    conversion.end_early(layers)
    assert conversion.run().layers_resumed == layers
    assert contents(conversion.output) == expected


@pytest.mark.parametrize("recipe", ["nvfp4-a16", "nvfp4"])
@pytest.mark.parametrize("layout", [COMPRESSED_TENSORS, MODELOPT])
@pytest.mark.parametrize("quantizer", ["mse", "gptq"])
def test_other_recipes_and_layouts_go_on_too(tmp_path: Path, recipe: str, layout: str, quantizer: str) -> None:
    choices = {"recipe": recipe, "layout": layout, "quantizer": quantizer, "batch_size": 2}
    conversion = Conversion(tiny_gemma4(tmp_path / "source"), tmp_path, **choices)
    expected = conversion.undisturbed()
    conversion.end_early(3)
    result = conversion.run()
    assert result.layers_resumed == 3
    assert ("replay" in result.phases) == (recipe != "nvfp4-a16" or quantizer == "gptq")
    assert contents(conversion.output) == expected


def test_a_run_whose_layers_are_all_whole_reads_none_of_them(
    llama: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llama.undisturbed()
    llama.end_early(3)
    result = llama.run()
    assert result.layers_resumed == 3
    assert not {"read", "record", "replay", "forward", "quantize"} & set(result.phases)
    assert contents(llama.output) == expected


def changed_time(source: Path) -> None:
    os.utime(source / "model-00002-of-00002.safetensors")


def changed_size(source: Path) -> None:
    (source / "model-00002-of-00002.safetensors").write_bytes(b"")  # grown below
    tiny_llama(source, num_layers=3, intermediate_size=144)


def changed_header(source: Path) -> None:
    """The same bytes at the same time, but for a space in the header."""
    shard = source / "model-00001-of-00002.safetensors"
    before = shard.stat()
    shard.write_bytes(
        shard.read_bytes().replace(b'{"__metadata__":{"format":"pt"}', b'{"__metadata__":{"format":"xy"}', 1)
    )
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shard.stat().st_size == before.st_size


def changed_config(source: Path) -> None:
    with (source / "config.json").open("a") as file:
        file.write("\n")


def unchanged(source: Path) -> None:
    pass


OTHER_SAMPLES = random_samples((12, 12, 20), seed=1)


@pytest.mark.parametrize(
    "change, choices, field",
    [
        (changed_time, {}, r"source\.shards\.model-00002-of-00002\.safetensors\.mtime_ns"),
        (changed_size, {}, r"source\.\S+"),
        (changed_header, {}, r"source\.shards\.model-00001-of-00002\.safetensors\.header_sha256"),
        (changed_config, {}, r"source\.config_sha256"),
        (unchanged, {"recipe": "nvfp4"}, r"recipe\.name"),
        (unchanged, {"recipe": "nvfp4-a16"}, r"recipe\.name"),
        (unchanged, {"samples": OTHER_SAMPLES}, r"calibration\.sha256"),
        (unchanged, {"samples": random_samples((12, 12))}, r"calibration\.samples"),
        (unchanged, {"layout": MODELOPT}, "format"),
        (unchanged, {"quantizer": "mse"}, "quantizer"),
        (unchanged, {"fold": True}, "fold"),
        (unchanged, {"batch_size": 2}, r"run\.batch_size"),
    ],
)
def test_a_run_of_other_files_or_choices_is_refused_with_what_differs_unless_restarted(
    llama: Conversion, change: Callable[[Path], None], choices: dict[str, Any], field: str
) -> None:
    llama.end_early()
    before = contents(llama.partial)
    change(llama.source)
    sentence = rf"out\.partial contains another run \({field} is \S.* there, \S.* here\): .*--restart"
    with pytest.raises(InputError, match=sentence):
        llama.run(**choices)
    assert contents(llama.partial) == before
    result = llama.run(restart=True, **choices)
    assert result.layers_resumed == 0
    assert contents(llama.output) == llama.undisturbed(**choices)
    assert not llama.partial.exists()


def test_a_run_of_another_nvquant_is_refused(llama: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    llama.end_early()
    monkeypatch.setattr(nvquant.convert.identity, "__version__", "99.0")
    with pytest.raises(InputError, match=r"\(nvquant is \S+ there, 99\.0 here\)"):
        llama.run()


def test_restart_makes_whole_layers_anew(llama: Conversion) -> None:
    expected = llama.undisturbed()
    llama.end_early(2)
    inode = llama.shard(0).stat().st_ino
    with llama.shard(0).open("rb"):  # so that its number is not given to another file
        result = llama.run(restart=True)
        assert (llama.output / llama.shard(0).name).stat().st_ino != inode
    assert result.layers_resumed == 0
    assert contents(llama.output) == expected


def test_restart_replaces_custom_code_that_an_earlier_run_copied(tmp_path: Path) -> None:
    source = edit_config(tiny_llama(tmp_path / "source"), auto_map={"AutoModel": "modeling_x.X"})
    (source / "modeling_x.py").write_text("class X: ...")
    conversion = Conversion(source, tmp_path)
    conversion.end_early()
    (conversion.partial / "modeling_x.py").write_text("class X: ...")  # as if the run had ended a little later
    assert not conversion.run(restart=True).was_finished
    assert not conversion.run(quantizer="mse", restart=True).was_finished
    (conversion.output / "mine.py").write_text("")
    with pytest.raises(InputError, match=r"out holds mine\.py, which nvquant did not write"):
        conversion.run(restart=True)


def test_a_finished_output_of_an_equal_run_is_left_as_it_is(llama: Conversion) -> None:
    first = llama.run()
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in llama.output.iterdir()}
    result = llama.run()
    assert (first.was_finished, result.was_finished) == (False, True)
    assert result.layers_resumed == 3
    assert result.marlin_flushed_blocks == first.marlin_flushed_blocks
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in llama.output.iterdir()} == before
    assert not llama.partial.exists()


def test_a_finished_output_of_another_run_is_replaced_only_with_restart(llama: Conversion) -> None:
    llama.run()
    before = contents(llama.output)
    sentence = r"out contains the finished checkpoint of another run \(quantizer is rtn there, mse here\).*--restart"
    with pytest.raises(InputError, match=sentence):
        llama.run(quantizer="mse")
    assert contents(llama.output) == before
    assert not llama.run(quantizer="mse", restart=True).was_finished
    assert contents(llama.output) == llama.undisturbed(quantizer="mse")


def test_a_run_without_folds_is_another_one_than_a_run_with_them(llama: Conversion) -> None:
    """The record of a run without folds does not mention them."""
    llama.end_early(fold=True)
    with pytest.raises(InputError, match=r"out\.partial contains another run \(fold is auto there, missing here\)"):
        llama.run()
    llama.run(fold=True)
    with pytest.raises(InputError, match=r"out contains the finished checkpoint of another run \(fold is auto there"):
        llama.run()


HOLDING = """
import sys
from pathlib import Path
from nvquant.convert.output import locked_partial

with locked_partial(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_of_an_output_is_refused_while_the_first_one_lives(llama: Conversion) -> None:
    llama.end_early()
    before = contents(llama.partial)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, llama.output], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for restart in (False, True):
            with pytest.raises(InputError, match=r"another run is writing to \S*out\.partial: wait until it ends"):
                llama.run(restart=restart)
        assert contents(llama.partial) == before
        other.kill()
    assert llama.run().layers_resumed == 1


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_last_byte, cut_short, empty])
@pytest.mark.parametrize("layer", [0, 1, None])
def test_a_damaged_shard_is_named_and_only_it_is_made_anew(
    llama: Conversion, damage: Callable[[Path], None], layer: int | None
) -> None:
    expected = llama.undisturbed()
    llama.end_early(2)
    shard = next(llama.partial / shard.file for shard in planned(llama.source).shards if shard.layer == layer)
    if layer is None and not shard.exists():
        llama.end_early(3)
    damage(shard)
    with pytest.raises(CheckFailed, match=rf"{shard} is damaged .*: remove this file and run the same command again"):
        llama.run()
    shard.unlink()
    assert llama.run().layers_resumed == (2 if layer is None else 1)
    assert contents(llama.output) == expected


@pytest.mark.parametrize("damage", [cut_short, empty, lambda path: path.write_text("{}")])
def test_a_damaged_record_is_named_and_only_its_shard_is_made_anew(
    llama: Conversion, damage: Callable[[Path], None]
) -> None:
    expected = llama.undisturbed()
    llama.end_early(2)
    record = llama.partial / STATE_FOLDER / f"{llama.shard(0).name}.json"
    damage(record)
    with pytest.raises(CheckFailed, match=rf"{record} is damaged: remove this file and run the same command again"):
        llama.run()
    record.unlink()
    assert llama.run().layers_resumed == 1
    assert contents(llama.output) == expected


def test_a_damaged_note_of_whose_run_it_is_names_the_file_and_restart_helps(llama: Conversion) -> None:
    llama.end_early(2)
    identity = llama.partial / STATE_FOLDER / "identity.json"
    empty(identity)
    with pytest.raises(CheckFailed, match=rf"{identity} is damaged: begin anew with --restart"):
        llama.run()
    assert llama.run(restart=True).layers_resumed == 0


def test_a_removed_shard_is_made_anew_and_those_behind_it_are_kept(llama: Conversion) -> None:
    expected = llama.undisturbed()
    llama.end_early(2)
    llama.shard(0).unlink()
    kept = llama.shard(1).stat().st_ino
    result = llama.run()
    assert result.layers_resumed == 1
    assert (llama.output / llama.shard(1).name).stat().st_ino == kept
    assert contents(llama.output) == expected


def change_a_weight(source: Path, layer: int) -> None:
    """Change a weight behind nvquant's back: the file's header, size and time stay."""
    for shard in source.glob("*.safetensors"):
        entries, data = read_raw(shard)
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        if name in entries:
            before, at = shard.stat(), entries[name]["data_offsets"][0]
            blob = shard.read_bytes()
            at += len(blob) - len(data)
            shard.write_bytes(blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :])
            os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_weight_that_changed_unnoticed_is_found_when_its_layer_is_replayed(llama: Conversion) -> None:
    llama.end_early(2)
    change_a_weight(llama.source, 1)
    with pytest.raises(InputError, match=r"source: the weights of layer 1 changed since the earlier run"):
        llama.run()
    change_a_weight(llama.source, 1)
    assert llama.run().layers_resumed == 2


def test_a_layer_that_is_still_to_be_made_may_not_be_checked_and_is_noted_as_it_was_read(llama: Conversion) -> None:
    llama.end_early(1)
    change_a_weight(llama.source, 2)
    llama.run()
    layers = json.loads((llama.output / MANIFEST_NAME).read_text())["layers"]
    fresh = Conversion(llama.source, llama.output.parent)
    fresh.output = llama.output.with_name("fresh")
    fresh.run(output=fresh.output)
    assert layers == json.loads((fresh.output / MANIFEST_NAME).read_text())["layers"]
