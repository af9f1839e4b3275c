"""Python files that configs name travel with the model, a missing one is named, and none is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nvquant.checkpoint.custom_code import code_files, lack_of_code, missing_code
from nvquant.checkpoint.sidefiles import side_files
from nvquant.convert.ownership import foreign_entries
from nvquant.errors import InputError
from nvquant.verify.structure import verify_structure
from support.conversions import converted, edit_config, planned
from support.tiny_models import tiny_llama

MAP = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
FILES = {
    "configuration_x.py": "raise SystemExit('configuration_x was run')\n",
    "modeling_x.py": "from .configuration_x import (\n    XConfig,\n)\nfrom .layers_x import Layer  # comment\n",
    "layers_x.py": "try:\n    from .kernels_x import fast\nfinally:\n    from . import helper_x, absent_x\n",
    "kernels_x.py": "from .layers_x import Layer\n",
    "helper_x.py": "",
    "tokenization_x.py": "from transformers import PreTrainedTokenizer\n",
    "unrelated.py": "print('no config names this')\n",
}
NAMED = sorted(set(FILES) - {"unrelated.py"})
TOKENIZER = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}


def write_code(folder: Path) -> Path:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": MAP}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    return write_code(tmp_path)


def test_named_files_and_what_they_import_are_side_files(folder: Path) -> None:
    assert code_files(folder) == NAMED
    assert set(NAMED) <= set(side_files(folder))
    assert "unrelated.py" not in side_files(folder)
    assert missing_code(folder) == {}


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("modeling_x.py", "config.json"),
        ("configuration_x.py", "config.json"),
        ("layers_x.py", "modeling_x.py"),
        ("kernels_x.py", "layers_x.py"),
        ("tokenization_x.py", "tokenizer_config.json"),
    ],
)
def test_missing_code_is_named_with_who_needs_it(folder: Path, name: str, by: str) -> None:
    (folder / name).unlink()
    assert missing_code(folder) == {name: by}
    how = f"{by} imports" if by.endswith(".py") else f"auto_map in {by} names"
    assert lack_of_code(folder) == f"{name}, which {how}"


def test_a_link_to_nowhere_is_refused_by_name(folder: Path) -> None:
    (folder / "modeling_x.py").unlink()
    (folder / "modeling_x.py").symlink_to(folder / "nowhere.py")
    with pytest.raises(InputError, match=r"modeling_x\.py is a link that leads nowhere"):
        side_files(folder)


@pytest.mark.parametrize(
    "auto_map",
    [
        {"AutoModel": "org/name--modeling_y.Y"},
        {"AutoModel": "../modeling_y.Y"},
        {"AutoModel": "/etc/modeling_y.Y"},
        {"AutoModel": "modeling_y"},
        {"AutoModel": None},
        {"AutoModel": [None, 7, {}]},
        [],
        "modeling_y.Y",
    ],
)
def test_references_that_name_no_file_of_the_folder_are_left_alone(tmp_path: Path, auto_map: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    assert (code_files(tmp_path), missing_code(tmp_path)) == ([], {})


def test_code_of_inner_configs_comes_along_and_is_not_required(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"llm_config": {"auto_map": {"AutoConfig": "inner_x.C"}}}))
    assert (code_files(tmp_path), missing_code(tmp_path)) == ([], {})
    (tmp_path / "inner_x.py").write_text("")
    assert code_files(tmp_path) == ["inner_x.py"]


@pytest.mark.parametrize("text", ["\n" * 300_000, "from . import (" * 60_000, "import ." * 200_000, " " * 1_000_000])
def test_code_made_to_take_long_does_not(folder: Path, text: str) -> None:
    (folder / "modeling_x.py").write_text(text)
    assert "modeling_x.py" in code_files(folder)


def test_a_conversion_carries_the_code_and_verify_misses_what_was_lost(tmp_path: Path) -> None:
    source = write_code(edit_config(tiny_llama(tmp_path / "source"), auto_map=MAP))
    output = converted(source, tmp_path / "out", "nvfp4-a16")
    carried = [name for name in NAMED if name != "tokenization_x.py"]
    assert sorted(path.name for path in output.glob("*.py")) == carried
    assert all((output / name).read_text() == FILES[name] for name in carried)
    assert foreign_entries(output) == []
    (output / "mine.py").write_text("")
    assert foreign_entries(output) == ["mine.py"]
    (output / "mine.py").unlink()
    assert verify_structure(output, source).passed
    (output / "layers_x.py").unlink()
    details = {check.name: check.detail for check in verify_structure(output).checks if not check.passed}
    assert "layers_x.py is missing, which modeling_x.py imports" in details["architecture"]
    (source / "modeling_x.py").unlink()
    with pytest.raises(InputError, match=r"lacks modeling_x\.py, which auto_map in config\.json names"):
        planned(source, "nvfp4-a16")
