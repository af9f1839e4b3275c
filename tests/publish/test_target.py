"""What of a repository stays, what is refused, and what is deleted."""

from __future__ import annotations

import pytest
from nvquant.checkpoint.hub.repository import HubFile
from nvquant.errors import InputError
from nvquant.publish.files import CHART_NAME, LocalFile
from nvquant.publish.target import Changes, Target, changes_for, check_repo_name, foreign_files

FILES = [
    LocalFile("config.json", b"{}"),
    LocalFile("model.safetensors", b"weights"),
    LocalFile("tokenizer.json", b"{}"),
    LocalFile("README.md", b"card"),
]


def target_with(*names: str, is_card_ours: bool = True) -> Target:
    """A repository with these files, each of another content than ours."""
    return Target("me/x", "c0ffee", True, {name: HubFile(name, 1, "0" * 40) for name in names}, is_card_ours)


def changes(target: Target, replace: bool = False, needs_card: bool = False) -> Changes:
    return changes_for(target, FILES, replace=replace, needs_card=needs_card)


LOADED = [
    *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "consolidated.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "weights.pth", "adapter_config.json"),
    *("hf_quant_config.json", "quantize_config.json", "nvquant_manifest.json", "chat_template.jinja", "merges.txt"),
]


@pytest.mark.parametrize("name", LOADED)
def test_what_a_loader_would_read_beside_the_checkpoint_is_refused_or_replaced(name: str) -> None:
    target = target_with(name, "model.safetensors")
    with pytest.raises(InputError, match=rf"me/x contains files .* \({name}\). .* with --replace"):
        changes(target)
    assert changes(target, replace=True).delete == (name,)


@pytest.mark.parametrize(
    "name",
    [
        "picture.png",
        "docs/guide.md",
        "LICENSE.txt",
        "NOTICE",
        "onnx/model.onnx",
        "original/consolidated.00.pth",
        ".gitattributes",
    ],
)
def test_other_files_stay(name: str) -> None:
    for replace in (False, True):
        found = changes(target_with(name), replace=replace)
        assert found.delete == () and len(found.upload) == len(FILES)


def test_many_foreign_files_are_counted() -> None:
    target = target_with(*(f"model-{at:05}-of-00009.safetensors" for at in range(1, 10)))
    with pytest.raises(
        InputError, match=r"model-00001\S+, model-00002\S+, model-00003-of-00009.safetensors and 6 more\)"
    ):
        changes(target)
    assert len(foreign_files(target, FILES)) == 9


def test_a_readme_of_somebodys_stays_unless_it_may_be_replaced() -> None:
    target = target_with("README.md", is_card_ours=False)
    kept = changes(target)
    assert kept.keeps_card and "README.md" not in [file.name for file in kept.files]
    replaced = changes(target, replace=True)
    assert not replaced.keeps_card and "README.md" in [file.name for file in replaced.upload]


def test_a_readme_of_somebodys_cannot_hide_that_checks_failed() -> None:
    target = target_with("README.md", is_card_ours=False)
    with pytest.raises(InputError, match="must report that this checkpoint did not pass"):
        changes(target, needs_card=True)
    assert not changes(target, replace=True, needs_card=True).keeps_card


def test_a_chart_of_an_earlier_push_goes_where_there_is_none_now() -> None:
    assert changes(target_with(CHART_NAME)).delete == (CHART_NAME,)


def test_what_is_there_already_is_not_sent() -> None:
    there = {file.name: HubFile(file.name, file.size, file.git_id) for file in FILES[:2]}
    found = changes(Target("me/x", "c0ffee", True, there))
    assert [file.name for file in found.unchanged] == ["config.json", "model.safetensors"]
    assert [file.name for file in found.upload] == ["tokenizer.json", "README.md"]


@pytest.mark.parametrize(
    "name", ["model", "me/x/y", "me/x@main", "https://huggingface.co/me/x", "me/", "/x", "", "me /x"]
)
def test_what_is_no_name_of_a_repository_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="is not a repository's name: give it as org/name"):
        check_repo_name(name)
