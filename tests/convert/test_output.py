"""The output folder: refused before any work, filled under another name, published whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from nvquant.checkpoint.places import write_whole
from nvquant.checkpoint.writer import write_json
from nvquant.convert.journal import CLEARED_FOLDER, IDENTITY_NAME, STATE_FOLDER, Journal
from nvquant.convert.output import (
    SLACK_BYTES,
    check_finished,
    check_output,
    finish_publishing,
    fresh_partial,
    locked_partial,
    open_partial,
    partial_folder,
    publish,
    remove_partial,
)
from nvquant.errors import InputError
from nvquant.stream.manifest import MANIFEST_NAME


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "source"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def filled(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("names", [(), (MANIFEST_NAME, "config.json")], ids=["empty", "ours"])
def test_an_empty_folder_and_one_of_ours_may_be_replaced(tmp_path: Path, source: Path, names: tuple[str, ...]) -> None:
    check_output(filled(tmp_path / "out", *names), 1000, source)


def test_an_output_deep_in_folders_yet_to_be_made_is_fine(tmp_path: Path, source: Path) -> None:
    check_output(tmp_path / "a" / "b" / "out", 1000, source)


def test_a_folder_that_is_not_ours_is_refused_and_kept(tmp_path: Path, source: Path) -> None:
    output = filled(tmp_path / "out", "thesis.tex")
    with pytest.raises(InputError, match=r"-o .*out exists, but nvquant did not write it"):
        check_output(output, 1000, source)
    assert (output / "thesis.tex").exists()


def test_a_file_is_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").write_text("text")
    with pytest.raises(InputError, match="nvquant did not write it"):
        check_output(tmp_path / "out", 1000, source)


def left_by(folder: Path, identity: dict[str, str], *names: str) -> Path:
    """A partial folder of a run that ended early."""
    partial = filled(folder, *names)
    Journal(partial).begin(identity)
    return partial


def test_a_partial_folder_of_the_same_run_is_continued(tmp_path: Path, source: Path) -> None:
    partial = left_by(tmp_path / "out.partial", {"nvquant": "1"}, "model-00001-of-00004.safetensors")
    check_output(tmp_path / "out", 1000, source)
    with locked_partial(tmp_path / "out") as locked:
        assert open_partial(locked, {"nvquant": "1"}, restart=False).partial == partial
    assert (partial / "model-00001-of-00004.safetensors").exists()


@pytest.mark.parametrize(
    "names", [(), (MANIFEST_NAME, "config.json"), (f"{CLEARED_FOLDER}/x.json", MANIFEST_NAME, "config.json")]
)
@pytest.mark.parametrize("restart", [True, False])
def test_a_partial_folder_without_records_is_emptied(
    tmp_path: Path, source: Path, names: tuple[str, ...], restart: bool
) -> None:
    partial = tmp_path / "out.partial"
    for name in names:
        filled((partial / name).parent, Path(name).name)
    check_output(tmp_path / "out", 1000, source)
    with locked_partial(tmp_path / "out") as locked:
        open_partial(locked, {"nvquant": "1"}, restart)
    assert [path.name for path in partial.iterdir()] == [STATE_FOLDER]
    assert json.loads((partial / STATE_FOLDER / IDENTITY_NAME).read_text()) == {"nvquant": "1"}


def test_a_partial_folder_of_another_run_is_refused_and_kept_without_restart(tmp_path: Path) -> None:
    partial = left_by(tmp_path / "out.partial", {"nvquant": "1"}, "model-00001-of-00004.safetensors")
    with locked_partial(tmp_path / "out") as locked:
        with pytest.raises(InputError, match=r"out\.partial contains another run \(nvquant is 1 there, 2"):
            open_partial(locked, {"nvquant": "2"}, restart=False)
        assert (partial / "model-00001-of-00004.safetensors").exists()
        open_partial(locked, {"nvquant": "2"}, restart=True)
    assert [path.name for path in partial.iterdir()] == [STATE_FOLDER]
    assert Journal(partial).identity() == {"nvquant": "2"}


def test_a_partial_folder_is_for_one_run_at_a_time(tmp_path: Path) -> None:
    with locked_partial(tmp_path / "out"):
        with pytest.raises(InputError, match=r"another run is writing to \S*out\.partial: "):
            with locked_partial(tmp_path / "out"):
                pass
    with locked_partial(tmp_path / "out"):
        pass


def test_a_fresh_partial_folder_is_empty_and_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    left_by(tmp_path / "out.partial", {"nvquant": "1"}, "model-00001-of-00004.safetensors")
    with pytest.raises(KeyError), fresh_partial(tmp_path / "out", {"nvquant": "2"}) as partial:
        assert [path.name for path in partial.iterdir()] == [STATE_FOLDER]
        filled(partial, "config.json")
        raise KeyError
    assert not any(tmp_path.iterdir())


def test_a_finished_output_is_known_by_its_identity(tmp_path: Path) -> None:
    output = filled(tmp_path / "out")
    assert not check_finished(output, {"nvquant": "1"}, restart=False)
    (output / MANIFEST_NAME).write_text(json.dumps({"nvquant": "1", "files": {}}))
    assert check_finished(output, {"nvquant": "1"}, restart=False)
    assert not check_finished(output, {"nvquant": "1"}, restart=True)
    assert not check_finished(output, {"nvquant": "2"}, restart=True)
    with pytest.raises(
        InputError, match=r"contains the finished checkpoint of another run \(nvquant is 1 there, 2 here\)"
    ):
        check_finished(output, {"nvquant": "2"}, restart=False)


@pytest.mark.parametrize(
    "before", [None, (), ("model-00001-of-00001.safetensors",)], ids=["nothing", "empty", "moved away"]
)
def test_a_whole_output_gets_the_name_that_a_killed_run_did_not_give_it(
    tmp_path: Path, before: tuple[str, ...] | None
) -> None:
    output = tmp_path / "out"
    filled(tmp_path / "out.partial", MANIFEST_NAME, "model.safetensors")
    filled(tmp_path / "out.partial" / CLEARED_FOLDER, "model.safetensors.json")
    if before is not None:
        filled(tmp_path / ".out.nvquant-replaced" if before else output, *before)
    finish_publishing(output)
    assert sorted(path.name for path in output.iterdir()) == ["model.safetensors", MANIFEST_NAME]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_not_whole_or_would_replace_an_output_is_not_published(tmp_path: Path) -> None:
    output = tmp_path / "out"
    finish_publishing(output)
    assert not any(tmp_path.iterdir())
    partial = left_by(tmp_path / "out.partial", {}, MANIFEST_NAME)
    finish_publishing(output)
    assert not output.exists()
    Journal(partial).clear()
    filled(output, MANIFEST_NAME, "model-00001-of-00001.safetensors")
    finish_publishing(output)
    assert (output / "model-00001-of-00001.safetensors").exists()
    assert partial.exists()


def test_a_partial_folder_is_removed_but_for_nothing(tmp_path: Path) -> None:
    partial = left_by(tmp_path / "out.partial", {}, "config.json", MANIFEST_NAME)
    filled(partial / "additional_chat_templates", "tool.jinja")
    remove_partial(partial)
    assert not any(tmp_path.iterdir())


def test_a_foreign_partial_folder_is_refused_and_kept(tmp_path: Path, source: Path) -> None:
    partial = filled(tmp_path / "out.partial", "thesis.tex")
    with pytest.raises(InputError, match=r"out\.partial exists, but nvquant did not write it"):
        check_output(tmp_path / "out", 1000, source)
    assert (partial / "thesis.tex").exists()


def link_to(target: Path, link: Path) -> Path:
    link.symlink_to(target)
    return link


@pytest.mark.parametrize(
    "name_it",
    [
        lambda source, other: source,
        lambda source, other: source / "..",
        lambda source, other: source.parent,
        lambda source, other: source / ".." / "source",
        lambda source, other: Path(os.path.relpath(source)),
        lambda source, other: link_to(source, other / "link"),
        lambda source, other: link_to(source.parent, other / "link") / "source",
    ],
)
def test_the_source_and_what_holds_it_are_refused_by_every_name(
    tmp_path: Path, source: Path, name_it: Callable[[Path, Path], Path]
) -> None:
    filled(source, MANIFEST_NAME)
    filled(source.parent, MANIFEST_NAME)
    with pytest.raises(InputError, match="is the source itself, or contains it"):
        check_output(name_it(source, tmp_path), 1000, source)


def test_too_little_disk_is_refused_with_both_numbers(tmp_path: Path, source: Path) -> None:
    with pytest.raises(InputError, match=rf"needs {10**18 + SLACK_BYTES:,} bytes, but .* has [\d,]+ free"):
        check_output(tmp_path / "out", 10**18, source)


def test_the_disk_of_a_link_is_where_it_leads(tmp_path: Path, source: Path) -> None:
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir() or os.statvfs(shared_memory).f_bavail == os.statvfs(tmp_path).f_bavail:
        pytest.skip("no second file system to lead to")
    link = link_to(shared_memory / "nvquant-test-output", tmp_path / "out")
    with pytest.raises(InputError, match=r"but /dev/shm has"):
        check_output(link, 10**18, source)


def test_the_partial_folder_lies_beside_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (tmp_path / "here", Path(), Path("../here"), Path("../here/"), tmp_path / "x" / ".." / "here"):
        assert partial_folder(output) == tmp_path / "here.partial"


def test_publishing_replaces_an_earlier_output(tmp_path: Path) -> None:
    output = filled(tmp_path / "out", MANIFEST_NAME, "model-00001-of-00001.safetensors")
    partial = left_by(tmp_path / "out.partial", {}, MANIFEST_NAME, "model.safetensors")
    publish(partial, output)
    assert sorted(path.name for path in output.iterdir()) == ["model.safetensors", MANIFEST_NAME]
    assert not partial.exists()


def test_publishing_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    target = filled(tmp_path / "disk" / "out", MANIFEST_NAME, "model-00001-of-00001.safetensors")
    link = link_to(target, tmp_path / "out")
    publish(left_by(tmp_path / "disk" / "out.partial", {}, MANIFEST_NAME, "model.safetensors"), link)
    assert link.is_symlink()
    assert sorted(path.name for path in target.iterdir()) == ["model.safetensors", MANIFEST_NAME]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_partial_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match=r"out\.partial cannot be created \(Not a directory\)"):
        with locked_partial(tmp_path / "file" / "out"):
            pass


@pytest.mark.parametrize("name", ["out.partial", ".out.nvquant-replaced", "out.partial/nvquant_run"])
def test_nothing_is_written_through_a_link(tmp_path: Path, source: Path, name: str) -> None:
    elsewhere = filled(tmp_path / "elsewhere", MANIFEST_NAME, "precious")
    link = tmp_path / name
    link.parent.mkdir(exist_ok=True)
    link_to(elsewhere, link)
    with pytest.raises(InputError, match="is a link, which nvquant does not write through"):
        check_output(tmp_path / "out", 1000, source)
    with pytest.raises(InputError, match="is a link, which nvquant does not write through"):
        with locked_partial(tmp_path / "out") as partial:
            open_partial(partial, {"nvquant": "1"}, restart=True)
            check_output(tmp_path / "out", 1000, source)
    assert sorted(path.name for path in elsewhere.iterdir()) == [MANIFEST_NAME, "precious"]


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    "foreign", ["precious", "model-00009-of-00009.safetensors", "LICENSE.mine", "notes", "config.json.bak", "mine.py"]
)
def test_restart_removes_only_what_the_journal_lists(tmp_path: Path, listed: bool, foreign: str) -> None:
    shard = "model-00001-of-00004.safetensors"
    partial = filled(tmp_path / "out.partial", shard, f"{shard}.tmp", "config.json", "tokenizer.json")
    Journal(partial).begin({"nvquant": "1"}, [shard, "tokenizer.json"] if listed else ())
    if foreign == "notes":
        filled(partial / foreign, "text")
    else:
        filled(partial, foreign)
    if not listed and foreign.startswith(("model-", "LICENSE")):
        return  # without a list, the form of a name decides
    with locked_partial(tmp_path / "out") as locked:
        with pytest.raises(InputError, match=f"holds {foreign}, which nvquant did not write"):
            open_partial(locked, {"nvquant": "2"}, restart=True)
        assert sorted(path.name for path in partial.iterdir()) == sorted(
            [shard, f"{shard}.tmp", "config.json", "tokenizer.json", STATE_FOLDER, foreign]
        )
        (partial / foreign).rename(tmp_path / "moved")
        open_partial(locked, {"nvquant": "2"}, restart=True)
    assert [path.name for path in partial.iterdir()] == [STATE_FOLDER]


@pytest.mark.parametrize(
    "manifest", ["{}", '{"files": {"model.safetensors": "00"}}', "not JSON", '{"files": {"../x": ""}}']
)
def test_restart_replaces_no_output_with_something_foreign_in_it(tmp_path: Path, manifest: str) -> None:
    output = filled(tmp_path / "out", "model.safetensors", "config.json", "precious")
    (output / MANIFEST_NAME).write_text(manifest)
    with pytest.raises(InputError, match="holds precious, which nvquant did not write, so --restart does not remove"):
        check_finished(output, {"nvquant": "1"}, restart=True)
    (output / "precious").unlink()
    assert not check_finished(output, {"nvquant": "1"}, restart=True)


def test_a_foreign_folder_under_the_name_for_replaced_outputs_is_kept(tmp_path: Path, source: Path) -> None:
    foreign = filled(tmp_path / ".out.nvquant-replaced", "precious")
    with pytest.raises(InputError, match="nvquant-replaced exists, but nvquant did not write it"):
        check_output(tmp_path / "out", 1000, source)
    publish(left_by(tmp_path / "out.partial", {}, MANIFEST_NAME, "model.safetensors"), tmp_path / "out")
    assert (foreign / "precious").exists()


def test_a_link_under_a_temporary_name_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("victim")
    link_to(victim, tmp_path / "config.json.tmp")
    write_json(tmp_path / "config.json", {"a": 1})
    assert victim.read_text() == "victim"
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    assert not (tmp_path / "config.json").is_symlink()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_json(tmp_path / "a.json", {})
        write_whole(tmp_path / "b.html", b"")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}
