"""`from nvquant import plan, convert, distill, verify, …`: light to import, and each example runs."""

from __future__ import annotations

import doctest
import inspect
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import nvquant
import nvquant.api
import pytest
from huggingface_hub import constants
from nvquant.api.conversion import ConvertRequest
from nvquant.api.distillation import DistillRequest
from nvquant.api.publication import PushOptions
from nvquant.api.sweeping import SweepRequest
from nvquant.api.verification import VerifyRequest
from nvquant.errors import InputError
from nvquant.recipe.load import load_recipe
from nvquant.verify.report import Check
from support.conversions import Conversions, TinyModels, contents, random_samples, write_ids
from support.hub_models import hub_for_this_process
from support.hub_uploads import User

FUNCTIONS = ("convert", "distill", "plan", "push", "relayout", "sweep", "verify")
NAMED_WITH_ANOTHER = {"recipe", "format", "revision", "fold", "samples", "sequence_length", "target_size", "max_kl"}
TOKEN = "hf_thisIsTheSecretOfTheTests"


@pytest.fixture(scope="module")
def converted(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Conversions(tiny, tmp_path_factory.mktemp("conversions"))("llama", "nvfp4")


def run(code: str) -> list[str]:
    """The words that a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_the_import_is_light() -> None:
    heavy = {"torch", "transformers", "pydantic", "yaml", "click", "typing", "dataclasses", "nvquant.api"}
    loaded = "import sys; before = set(sys.modules); import nvquant; print(*(set(sys.modules) - before))"
    assert not heavy & set(run(loaded))
    assert not {"torch", "transformers", "click"} & set(run(f"{loaded}; from nvquant import Recipe, plan, push"))


def test_every_name_is_listed_and_found() -> None:
    assert set(nvquant.__all__) == {*FUNCTIONS, "Recipe", "__version__"}
    assert set(nvquant.__all__) <= set(dir(nvquant))
    with pytest.raises(AttributeError, match="has no attribute 'plam'"):
        nvquant.plam  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("first", ["", "import nvquant.plan.plan, nvquant.convert.watch, nvquant.verify.run; "])
def test_a_function_is_found_whatever_was_imported_before(first: str) -> None:
    code = f"{first}from nvquant import plan, convert, verify; print(*(callable(f) for f in (plan, convert, verify)))"
    assert run(code) == ["True", "True", "True"]
    assert run(f"{first}import nvquant.convert.stop as stop; print(stop.STOPPED)") == ["128"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_of_a_function_runs(
    name: str,
    tiny: TinyModels,
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    paths = {"model": str(tiny("llama")), "checkpoint": str(converted), "output": str(tmp_path / "out")}
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(nvquant.api, name), name, globs=paths)
    assert len(example.examples) >= 2
    with hub_for_this_process(monkeypatch, tmp_path / "cache") as hub:
        hub.users[TOKEN] = User("me")
        assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_docstring_names_every_parameter_and_has_each_section(name: str) -> None:
    function = getattr(nvquant.api, name)
    text = inspect.getdoc(function) or ""
    arguments = text.partition("Args:")[2].partition("Returns:")[0]
    for parameter in inspect.signature(function).parameters:
        if parameter not in NAMED_WITH_ANOTHER:
            assert f"\n    {parameter}" in arguments, parameter
    assert all(f"\n{section}:\n" in text for section in ("Args", "Returns", "Raises", "Example"))
    assert inspect.signature(getattr(nvquant, name)) == inspect.signature(function)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("convert", ConvertRequest),
        ("distill", DistillRequest),
        ("verify", VerifyRequest),
        ("push", PushOptions),
        ("sweep", SweepRequest),
    ],
)
def test_a_request_has_the_defaults_of_its_function(name: str, kind: type) -> None:
    parameters = inspect.signature(getattr(nvquant.api, name)).parameters
    for field in fields(kind):
        default = parameters[field.name].default
        assert default is inspect.Parameter.empty or default == field.default, field.name


def test_the_function_and_the_command_write_the_same_bytes(tiny: TinyModels, tmp_path: Path) -> None:
    ids = write_ids(tmp_path / "ids.jsonl", random_samples())
    command = ["convert", str(tiny("llama")), "-o", str(tmp_path / "a"), "--calibration", str(ids), "--samples", "6"]
    command += ["--sequence-length", "40", "--device", "cpu", "--quantizer", "rtn"]
    subprocess.run([sys.executable, "-m", "nvquant", *command], check=True, capture_output=True)
    nvquant.convert(
        tiny("llama"), tmp_path / "b", load_recipe("nvfp4"), calibration=ids, samples=6, sequence_length=40,
        device="cpu", quantizer="rtn",
    )  # fmt: skip
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_failed_check_is_a_verdict_and_no_exception(converted: Path, tmp_path: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in converted.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    seen: list[Check] = []
    report = nvquant.verify(broken, on_check=seen.append)
    assert not report.passed
    assert tuple(seen) == report.checks


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda model: nvquant.plan(model, format="gguf"), "layout 'gguf' does not exist: choose compressed-tensors"),
        (lambda model: nvquant.plan(model, "nvfp5"), "recipe 'nvfp5' does not exist"),
        (lambda model: nvquant.verify(model, stages=["speed"]), "stage 'speed' does not exist: choose from structure"),
        (lambda model: nvquant.convert(model, engine="vllm"), "engine 'vllm' does not exist: choose nvquant"),
        (lambda model: nvquant.convert(model, device="tpu"), "device 'tpu' does not exist: choose auto, cuda or cpu"),
    ],
)
def test_a_value_that_no_command_line_checked_is_refused(tiny: TinyModels, call: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        call(tiny("llama"))  # type: ignore[operator]
