"""Reading recipes: what ships, what is refused, and the words in which it is refused."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
from click.testing import CliRunner
from nvquant.cli.main import cli
from nvquant.errors import InputError
from nvquant.recipe.load import load_recipe, parse_recipe, shipped_recipes

HEAD = "name: mine\nquantize:\n  - modules: [mlp]\n    scheme: nvfp4\n"  # lines 1 to 4


def refused(text: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_recipe(text, "my.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_four_recipes_ship_and_do_what_they_are_called() -> None:
    assert shipped_recipes() == ["nvfp4", "nvfp4-a16", "nvfp4-fp8", "nvfp4-full"]
    found = {name: load_recipe(name) for name in shipped_recipes()}
    assert all(recipe.name == name and recipe.description for name, recipe in found.items())
    assert {name: [(e.modules, e.scheme) for e in recipe.quantize] for name, recipe in found.items()} == {
        "nvfp4": [(("mlp",), "nvfp4")],
        "nvfp4-a16": [(("attention", "mlp", "linear"), "nvfp4-a16")],
        "nvfp4-fp8": [(("mlp",), "nvfp4"), (("attention", "linear"), "fp8")],
        "nvfp4-full": [(("attention", "mlp", "linear"), "nvfp4")],
    }
    assert all(recipe.experts == "refuse" and recipe.quantizer == "mse" for recipe in found.values())


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4-a16", "nvfp4-fp8", "nvfp4-full"])
def test_show_prints_the_file_and_it_is_a_recipe_of_its_own(name: str, tmp_path: Path) -> None:
    text = (resources.files("nvquant.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    shown = CliRunner().invoke(cli, ["recipes", "show", name])
    assert (shown.exit_code, shown.stdout) == (0, text)
    (tmp_path / "copy.yaml").write_text(shown.stdout)
    assert load_recipe(str(tmp_path / "copy.yaml")) == load_recipe(name)


def test_all_recipes_are_listed_with_their_description() -> None:
    listed = CliRunner().invoke(cli, ["recipes"])
    assert [line.split()[0] for line in listed.stdout.splitlines()] == shipped_recipes()
    assert load_recipe("nvfp4").description in listed.stdout


def test_defaults_are_those_of_the_documentation() -> None:
    recipe = parse_recipe(HEAD, "my.yaml")
    assert (recipe.quantizer, recipe.experts, recipe.description) == ("mse", "refuse", "")
    assert (recipe.activations.headroom, recipe.kv_cache.dtype) == ("auto", "bf16")
    assert recipe.calibration.model_dump() == {"set": "offline", "samples": None, "sequence_length": 2048}
    emptied = parse_recipe(HEAD + "activations:\nkv_cache:\ncalibration:\n", "my.yaml")
    assert emptied == recipe, "a key with nothing behind it means its defaults"


@pytest.mark.parametrize(("written", "meant"), [("auto", "auto"), ("1", 1.0), ("4", 4.0), ("16.0", 16.0)])
def test_headroom_is_auto_or_a_power_of_two(written: str, meant: object) -> None:
    recipe = parse_recipe(HEAD + f"activations:\n  headroom: {written}\n", "my.yaml")
    assert recipe.activations.headroom == meant


NOT_A_KEY = "is not a key of a recipe: `nvquant recipes show nvfp4` lists all of them."
SECOND = "  - modules: [attention]\n    scheme: int4\n"
MESSAGES = [
    ("", "my.yaml:1: the file is not a map with the keys name and quantize."),
    ("- mlp", "my.yaml:1: the file is not a map with the keys name and quantize."),
    ("name: mine\n", "my.yaml:1: key 'quantize': is required."),
    ("\n\n" + HEAD[11:], "my.yaml:3: key 'name': is required."),
    (HEAD + "foo: 1\n", f"my.yaml:5: key 'foo': 'foo' {NOT_A_KEY}"),
    (HEAD + "    bits: 4\n", f"my.yaml:5: key 'quantize.0.bits': 'bits' {NOT_A_KEY}"),
    (HEAD + "calibration:\n  tokens: 3\n", f"my.yaml:6: key 'calibration.tokens': 'tokens' {NOT_A_KEY}"),
    (HEAD + SECOND, "my.yaml:6: key 'quantize.1.scheme': input should be 'nvfp4', 'nvfp4-a16' or 'fp8'."),
    (HEAD.replace("[mlp]", "mlp"), "my.yaml:3: key 'quantize.0.modules': must be a list."),
    (HEAD.replace("[mlp]", "[]"), "my.yaml:3: key 'quantize.0.modules': must not be empty."),
    (HEAD.replace("[mlp]", "[mlp, 7]"), "my.yaml:3: key 'quantize.0.modules.1': must be text."),
    ("name: mine\nquantize: []\n", "my.yaml:2: key 'quantize': must not be empty."),
    ("name: mine\nquantize:\n", "my.yaml:2: key 'quantize': must be a list."),
    ("name: mine\nquantize:\n  - mlp\n", "my.yaml:3: key 'quantize.0': must be a map of keys."),
    (
        HEAD.replace("[mlp]", "['re:(']"),
        "my.yaml:3: key 'quantize.0.modules': 're:(' is not a regular expression "
        "(missing ), unterminated subpattern at position 0).",
    ),
    *(
        (
            HEAD + f"activations:\n  headroom: {value}\n",
            "my.yaml:6: key 'activations.headroom': must be 'auto' or a power of two, at least 1.",
        )
        for value in ("3", "0.5", "-2", "0", ".inf", ".nan", "true", "lots", "[]", "1e300")
    ),
    (HEAD + "kv_cache: fp8\n", "my.yaml:5: key 'kv_cache': must be a map of keys."),
    (
        HEAD + "kv_cache:\n  dtype: fp4\n",
        "my.yaml:6: key 'kv_cache.dtype': input should be 'bf16', 'fp8' or 'fp8-calibrated'.",
    ),
    (HEAD + "experts: nvfp4\n", "my.yaml:5: key 'experts': input should be 'refuse' or 'bf16'."),
    (
        HEAD + "calibration:\n  set: offline\n  samples: 0\n",
        "my.yaml:7: key 'calibration.samples': input should be greater than or equal to 1.",
    ),
    (HEAD.replace("mine", "on"), "my.yaml:1: key 'name': must be text."),
    (HEAD + "name: other\n", "my.yaml:5: key 'name' occurs twice: remove one."),
    (HEAD + "    scheme: nvfp4-a16\n", "my.yaml:5: key 'scheme' occurs twice: remove one."),
    (
        "name: mine\n\tquantize: 1\n",
        "my.yaml:2: the text is not YAML (found character '\\t' that cannot start any token).",
    ),
    (
        "name: !!python/object:os.system x\n",
        "my.yaml:1: the text is not YAML (could not determine a constructor for the tag",
    ),
    ("name: 2024-13-45\n", "my.yaml:1: the file contains an unreadable value (month must be in 1..12)."),
    ("name: !!int abc\n", "my.yaml:1: the file contains an unreadable value"),
    ("a: " + "[" * 1200, "my.yaml:1: the file nests more than 50 lists and maps."),
    ("a: " + "[" * 60 + "]" * 60, "my.yaml:1: the file nests more than 50 lists and maps."),
    ("name: " + "9" * 3000, "my.yaml:1: the file contains a number of 3000 digits."),
    ("name: " + "9" * 5000, "my.yaml:1: the file contains an unreadable value"),
    ('name: "\\ud800"\n', "my.yaml:1: "),
    (HEAD + "verify: {max_kl: .inf}\n", "my.yaml:5: key 'verify.max_kl': "),
    (HEAD + "? " + "x" * 70_000 + "\n: 1\n", "my.yaml:5: key 'xxx"),
    ("x: " + "y" * 1_000_000, "my.yaml:1: the file has 1,000,003 bytes, but the limit is 1,000,000."),
    ("a: &a [*a]\n", "my.yaml:1: the file nests more than 50 lists and maps."),
    ("name: \0\n", "my.yaml:1: the text is not YAML (special characters are not allowed)."),
    ("name: a\n---\nname: b\n", "my.yaml:2: the text is not YAML (but found another document)."),
]


@pytest.mark.parametrize(("text", "message"), MESSAGES, ids=[message[8:60] for _, message in MESSAGES])
def test_a_faulty_recipe_is_refused_with_file_line_and_key(text: str, message: str) -> None:
    found = refused(text)
    assert found.startswith(message)
    assert found.endswith(".") and "\n" not in found


@pytest.mark.parametrize("name", ["My Recipe", "../x", "-x", "x/y", ""])
def test_a_name_that_could_not_be_a_folders_is_refused(name: str) -> None:
    assert re.match(r"my\.yaml:1: key 'name': ", refused(HEAD.replace("mine", repr(name))))


def test_aliases_cannot_make_a_small_file_large() -> None:
    lines = ["a0: &a0 [mlp, mlp]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    assert refused("\n".join(lines)) == "my.yaml:15: the file contains more than 50,000 values."


def test_an_unknown_name_is_refused_with_the_ones_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load_recipe("nvfp5")
    assert str(caught.value) == (
        "recipe 'nvfp5' does not exist: choose one of nvfp4, nvfp4-a16, nvfp4-fp8, nvfp4-full, or give the path of "
        "your own file, such as ./my.yaml."
    )


@pytest.mark.parametrize("name", ["absent.yaml", "folder.yaml", "binary.yaml", "n" * 5000])
def test_a_file_that_cannot_be_read_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.yaml").mkdir()
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=rf"^{name}(:1:)? (is missing: |is a folder, not a file: |cannot|byte 0 is)"):
        load_recipe(name)


def test_a_users_file_wins_no_shipped_name_and_needs_no_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("nvfp4", "mine"):
        Path(name).write_text(HEAD)
    assert load_recipe("nvfp4").name == "nvfp4"
    assert load_recipe("mine").name == load_recipe("./nvfp4").name == "mine"
