"""What is to be measured: targets, points, requests, and what is refused before a start."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvquant.bench.grid import Grid, Point, find_targets
from nvquant.bench.subject import open_subject
from nvquant.errors import InputError
from support.conversions import TinyModels

GRID = Grid((1024, 4096), (1, 8, 32), 200)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyModels(tmp_path_factory.mktemp("tiny"))("llama")


def test_every_context_with_every_number_of_users() -> None:
    assert GRID.points[:4] == (Point(1024, 1), Point(1024, 8), Point(1024, 32), Point(4096, 1))
    assert len(GRID.points) == 6
    assert GRID.longest == 4296


def test_a_data_set_has_contexts_of_its_own() -> None:
    grid = Grid((1024, 4096), (1, 8), 200, dataset="sharegpt", dataset_path="x")
    assert grid.points == (Point(None, 1), Point(None, 8))
    assert grid.longest is None
    grid.refuse_longer_than(100, "a limit")


@pytest.mark.parametrize(
    ("prompts", "users", "requests"),
    [(None, 1, 8), (None, 8, 16), (None, 3, 9), (None, 32, 64), (10, 8, 16), (1, 4, 4)],
)
def test_requests_fill_whole_rounds_of_users(prompts: int | None, users: int, requests: int) -> None:
    assert Grid((1,), (1,), 2, prompts).requests_for(users) == requests


def test_a_point_that_is_too_long_is_refused_with_its_context() -> None:
    GRID.refuse_longer_than(4296, "the limit")
    GRID.refuse_longer_than(None, "the limit")
    with pytest.raises(InputError, match=r"A context of 4096 and 200 output tokens exceed the limit of 4295"):
        GRID.refuse_longer_than(4295, "the limit")


def test_a_server_is_started_as_long_as_the_longest_point_needs(model: Path) -> None:
    subject = open_subject(model)
    limit = subject.longest_context
    assert limit is not None
    assert Grid((64,), (1,), 16).model_len(subject) == 64 + 16 + 16
    assert Grid((limit - 16,), (1,), 16).model_len(subject) == limit


def test_targets_are_named_by_folder_address_or_the_user(model: Path, tmp_path: Path) -> None:
    found = find_targets(model, None, [f"BF16={model}", "Q4_K_M=http://127.0.0.1:8080/v1", "http://host:9/"])
    assert [(t.name, t.url) for t in found] == [
        (model.name, None),
        ("BF16", None),
        ("Q4_K_M", "http://127.0.0.1:8080"),
        ("host:9", "http://host:9"),
    ]
    assert [t.subject is not None for t in found] == [True, True, False, False]


def test_a_folder_with_an_equals_sign_is_a_folder(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lr=1"
    folder.symlink_to(model)
    assert find_targets(model, None, [str(folder)])[1].subject is not None


def test_the_checkpoint_itself_may_be_served_already(model: Path) -> None:
    (target,) = find_targets(model, "127.0.0.1:8000", [])
    assert (target.url, target.subject is not None) == ("http://127.0.0.1:8000", True)


@pytest.mark.parametrize(
    ("against", "said"),
    [
        (["/no/such/folder"], "neither a folder nor the address"),
        (["X=/no/such/folder"], "/no/such/folder is neither"),
        (["ftp://host/x"], "neither a folder nor the address"),
        (["A=http://h:1", "A=http://h:2"], "two models have the name A"),
        (["x" * 5000], "neither a folder"),
    ],
)
def test_what_is_no_target_is_refused(model: Path, against: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        find_targets(model, None, against)


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = TinyModels(tmp_path)("llama")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="has no tokenizer, but load generators send text"):
        find_targets(folder, None, [])
