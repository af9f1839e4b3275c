"""The files of docs/scale-out are what SkyPilot, the Hub's client, accelerate and nvquant itself accept."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import huggingface_hub
import pytest
import yaml
from nvquant.cli.main import cli

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "scale-out"
PAGE = ROOT / "docs" / "scale-out.md"
TASKS = {path.name: yaml.safe_load(path.read_text("utf-8")) for path in FOLDER.glob("sky-*.yaml")}
VOLUME = TASKS.pop("sky-volume.yaml")
SCRIPTS = sorted(FOLDER.glob("*.sh"))
# What a launch gives; the names that SkyPilot gives on each host, and the two that a loop sets.
ENVIRONMENT = {
    "MODEL": "org/model", "RECIPE": "nvfp4", "TARGET": "me/model-NVFP4", "HF_TOKEN": "hf_secret",
    "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
}  # fmt: skip
# The keys of SkyPilot's reference, "SkyPilot YAML" and "Volumes", https://docs.skypilot.co/en/stable/reference/
TASK_KEYS = {
    "name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts", "setup", "run", "config",
}  # fmt: skip
RESOURCE_KEYS = {
    "infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot", "disk_size",
    "disk_tier", "network_tier", "max_hourly_cost", "image_id", "ports", "labels", "autostop", "any_of", "ordered",
    "job_recovery",
}  # fmt: skip
RECOVERY_KEYS = {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}
VOLUME_KEYS = {"name", "type", "infra", "size", "use_existing", "config", "labels"}
LAUNCH_OPTIONS = {"--yes", "--async", "--name", "--secret", "--env", "--use-spot"}  # of `sky jobs launch`
CLIENT = shutil.which("hf", path=Path(sys.executable).parent) or "hf"
OFFLINE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "NO_COLOR": "1"}

tasks = pytest.mark.parametrize("name", sorted(TASKS))
needs_sky = pytest.mark.skipif(importlib.util.find_spec("sky") is None, reason="no SkyPilot: pip install skypilot")


@pytest.fixture(scope="module")
def hf_fleet() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hf_fleet", FOLDER / "hf_fleet.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_bash(script: str, path: Path, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the commands of a folder before all others."""
    environment = {**ENVIRONMENT, "PATH": f"{path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    command = ["bash", "-c", script, "bash", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


def recorded(script: str, tmp_path: Path, *arguments: str) -> list[list[str]]:
    """Run a script in which every outside command only notes its words; what was called, in order."""
    bin_folder, log = tmp_path / "bin", tmp_path / "calls.jsonl"
    bin_folder.mkdir()
    note = f"#!{sys.executable}\nimport json, sys, pathlib\n"
    note += f"name = pathlib.Path(sys.argv[0]).name\nwith open({str(log)!r}, 'a') as log:\n"
    note += "    print(json.dumps([name, *sys.argv[1:]]), file=log)\n"
    for name in ("nvquant", "pip", "hf", "sky", "accelerate"):
        (bin_folder / name).write_text(note)
        (bin_folder / name).chmod(0o755)
    ran = run_bash(script, bin_folder, tmp_path, *arguments)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in log.read_text().splitlines()]


def run_client(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed client of the Hub, away from any network."""
    environment = {**os.environ, **OFFLINE}
    return subprocess.run([CLIENT, *arguments], env=environment, capture_output=True, text=True, check=True)


def accepts(words: list[str]) -> click.Context:
    """Let nvquant's own parser read a command; raises what it refuses with."""
    name, *arguments = words
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, f"nvquant has no command {name}"
    return command.make_context(name, arguments)


# SkyPilot


@tasks
def test_a_task_has_only_keys_of_skypilots_reference(name: str) -> None:
    task = TASKS[name]
    assert set(task) <= TASK_KEYS
    assert set(task["resources"]) <= RESOURCE_KEYS
    assert set(task["resources"]["job_recovery"]) <= RECOVERY_KEYS
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", task["name"])
    assert all(Path(place).is_absolute() for place in task.get("volumes", {}))


def test_the_volume_is_the_one_that_the_task_mounts() -> None:
    assert set(VOLUME) <= VOLUME_KEYS
    assert VOLUME["type"] in ("k8s-pvc", "runpod-network-volume")
    assert list(TASKS["sky-one.yaml"]["volumes"].values()) == [VOLUME["name"]]


@tasks
@needs_sky
def test_skypilot_reads_the_task(name: str) -> None:
    program = (
        "import sys, sky, yaml; task = sky.Task.from_yaml_config(yaml.safe_load(open(sys.argv[1])), "
        "env_overrides=[(name, 'a/b') for name in ('MODEL', 'RECIPE', 'TARGET')], "
        "secrets_overrides=[('HF_TOKEN', 'x')]); print(task.num_nodes)"
    )
    read = subprocess.run([sys.executable, "-c", program, FOLDER / name], capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
    assert read.stdout.split()[-1] == str(TASKS[name].get("num_nodes", 1))


@needs_sky
def test_skypilots_launch_has_the_options_that_are_used() -> None:
    asked = subprocess.run(["sky", "jobs", "launch", "--help"], capture_output=True, text=True, check=True)
    assert all(option in asked.stdout for option in LAUNCH_OPTIONS)


@tasks
def test_what_a_task_reads_is_declared_in_it(name: str) -> None:
    task = TASKS[name]
    used = set(re.findall(r"\$\{?([A-Z_]+)", task["setup"] + task["run"]))
    given = set(task["envs"]) | set(task["secrets"])
    assert {variable for variable in used if not variable.startswith("SKYPILOT_")} <= given
    assert {"MODEL", "RECIPE", "TARGET"} == set(task["envs"])
    assert task["envs"]["TARGET"] is None, "whoever launches must say where the result goes"


@tasks
def test_the_commands_of_a_task_are_nvquants(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    script = "SKYPILOT_NODE_RANK=0\n" + task["setup"] + task["run"]
    marker = tmp_path / "source.complete"
    marker.touch()
    calls = recorded(script.replace("/data/source.complete", str(marker)), tmp_path)
    assert calls[0][:2] == ["pip", "install"]
    own = [words[1:] for words in calls if words[0] == "nvquant"]
    own += [words[words.index("nvquant") + 1 :] for words in calls if words[0] == "accelerate"]
    converted = [accepts(words).params for words in own if words[0] == "convert"]
    assert [accepts(words).info_name for words in own]
    assert len(converted) == 1
    assert converted[0]["recipe_name"] == "nvfp4"
    for words in calls:
        if words[:2] == ["hf", "download"]:
            assert words[2:] == ["org/model", "--local-dir", "/data/source"]
            assert "--local-dir" in run_client("download", "--help").stdout


def test_two_hosts_are_launched_as_accelerate_wants_it(tmp_path: Path) -> None:
    from accelerate.commands.launch import launch_command_parser

    marker = tmp_path / "source.complete"
    marker.touch()
    run = TASKS["sky-hosts.yaml"]["run"].replace("/data/source.complete", str(marker))
    (words,) = [call[1:] for call in recorded(run, tmp_path) if call[0] == "accelerate"]
    assert words[0] == "launch"
    read = launch_command_parser().parse_args(words[1:])
    assert (read.num_machines, read.num_processes, read.machine_rank) == (2, 16, 1)
    assert (read.multi_gpu, read.module, read.main_process_ip) == (True, True, "10.0.0.1")
    assert (read.training_script, read.training_script_args[0]) == ("nvquant", "convert")
    output = accepts(read.training_script_args).params["output"]
    assert output == Path("/data/out"), "both hosts write to the volume"


def test_a_fleet_is_one_launch_for_each_model(tmp_path: Path) -> None:
    models = tmp_path / "models.txt"
    models.write_text("# a comment\n\norg/Model-3.1-8B nvfp4\nother/model_b nvfp4-full\n")
    calls = recorded((FOLDER / "sky-fleet.sh").read_text(), tmp_path, "me", str(models))
    assert len(calls) == 2
    for words, (model, recipe) in zip(
        calls, [("org/Model-3.1-8B", "nvfp4"), ("other/model_b", "nvfp4-full")], strict=True
    ):
        assert words[:3] == ["sky", "jobs", "launch"]
        assert {word for word in words if word.startswith("--")} <= LAUNCH_OPTIONS
        name = words[words.index("--name") + 1]
        assert re.fullmatch(r"[A-Za-z0-9]+(?:[-][A-Za-z0-9-]*[A-Za-z0-9])?", name)
        assert words[words.index("--secret") + 1] == "HF_TOKEN"
        given = dict(word.split("=", 1) for at, word in enumerate(words) if words[at - 1] == "--env")
        assert given == {"MODEL": model, "RECIPE": recipe, "TARGET": f"me/{model.split('/')[1]}-{recipe}"}
        assert words[-1].endswith("sky-fleet.yaml")


# Jobs of the Hub


def job_flavors() -> set[str]:
    hardware = getattr(huggingface_hub, "JobHardware", None) or huggingface_hub.SpaceHardware
    return {str(flavor.value) for flavor in hardware}


def test_the_hubs_client_reads_the_job_as_it_is_meant(tmp_path: Path) -> None:
    """The real client is asked, with --dry-run, what it would submit."""
    if "--dry-run" not in run_client("jobs", "run", "--help").stdout:
        pytest.skip("this huggingface_hub has no `hf jobs run --dry-run`")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    lines = ["#!/bin/bash", '[ "$1 $2" = "jobs run" ] || exit 9', "shift 2"]
    lines += [f"export {name}={value}" for name, value in OFFLINE.items()]
    (bin_folder / "hf").write_text("\n".join([*lines, f'exec {shlex.quote(CLIENT)} jobs run --dry-run "$@"']))
    (bin_folder / "hf").chmod(0o755)
    ran = run_bash((FOLDER / "hf-one.sh").read_text(), bin_folder, tmp_path, "me", "org/model", "nvfp4-full")
    assert ran.returncode == 0, ran.stderr
    told = " ".join(ran.stdout.split())
    assert "image python:3.12 command bash -c 'set -e pip install" in told
    assert "flavor h200 timeout 2h env MODEL=org/model RECIPE=nvfp4-full TARGET=me/model-nvfp4-full" in told
    assert "secrets HF_TOKEN=***" in told
    assert "hf_secret" not in ran.stdout + ran.stderr


def test_the_job_runs_nvquants_own_commands(tmp_path: Path, hf_fleet: ModuleType) -> None:
    (call,) = recorded((FOLDER / "hf-one.sh").read_text(), tmp_path, "me")
    assert call[call.index("--flavor") + 1] in job_flavors()
    assert call[-3:-1] == ["bash", "-c"]
    for at, script in enumerate((call[-1], hf_fleet.SCRIPT)):
        folder = tmp_path / str(at)
        folder.mkdir()
        found = [accepts(words[1:]) for words in recorded(script, folder) if words[0] == "nvquant"]
        assert [context.params for context in found if context.info_name == "convert"]


def test_a_fleet_of_jobs_is_what_run_job_takes(hf_fleet: ModuleType) -> None:
    listed = "# a comment\n\norg/Model-3.1-8B nvfp4\nother/model_b nvfp4-full  # and why\n"
    found = list(hf_fleet.requests(listed, "me", "hf_secret"))
    for request in found:
        bound = inspect.signature(huggingface_hub.run_job).bind(flavor="h200", timeout="2h", **request)
        assert bound.arguments["secrets"] == {"HF_TOKEN": "hf_secret"}
        assert "hf_secret" not in json.dumps({**request, "secrets": None})
    assert [request["env"]["TARGET"] for request in found] == ["me/Model-3.1-8B-nvfp4", "me/model_b-nvfp4-full"]


def test_the_program_submits_with_the_token_of_the_login(
    hf_fleet: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted: list[dict[str, Any]] = []

    class Job:
        url = "https://huggingface.co/jobs/me/1"

    def run_job(**request: Any) -> Job:
        inspect.signature(huggingface_hub.run_job).bind(**request)
        submitted.append(request)
        return Job()

    monkeypatch.setattr(hf_fleet, "run_job", run_job)
    monkeypatch.setattr(hf_fleet, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(sys, "argv", ["hf_fleet.py", "me"])
    hf_fleet.main()
    lines = [line for line in (FOLDER / "models.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(submitted) == len(lines) == len(capsys.readouterr().out.splitlines())
    assert {request["flavor"] for request in submitted} <= job_flavors()
    monkeypatch.setattr(hf_fleet, "get_token", lambda: None)
    with pytest.raises(SystemExit, match="no token: run `hf auth login`, or set HF_TOKEN"):
        hf_fleet.main()


# All of them


def test_no_file_holds_a_token_or_says_it_aloud() -> None:
    aloud = re.compile(
        r"hf_[A-Za-z0-9]{10,}|--(?:env|secrets?|token)[ =]['\"]?\$?\{?HF_TOKEN\}?['\"]?=|echo \$HF_TOKEN|set -x"
    )
    found = {path.name: aloud.findall(path.read_text("utf-8")) for path in sorted(FOLDER.iterdir()) if path.is_file()}
    assert {name: texts for name, texts in found.items() if texts} == {}
    assert {name: task["secrets"] for name, task in TASKS.items() if task["secrets"] != {"HF_TOKEN": None}} == {}
    assert [name for name, task in TASKS.items() if "HF_TOKEN" in task["envs"]] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(path: Path) -> None:
    assert os.access(path, os.X_OK)
    checker = shutil.which("shellcheck", path=Path(sys.executable).parent)
    if checker is None:
        pytest.skip("no shellcheck: pip install .[test]")
    checked = subprocess.run([checker, path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_every_file_is_told_of_on_the_page() -> None:
    text = PAGE.read_text("utf-8")
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == set(
        re.findall(r"\]\(scale-out/([^)]+)\)", text)
    )


def test_the_tables_on_the_page_are_the_programs() -> None:
    program = [sys.executable, ROOT / "benchmarks" / "forecast.py", "--check"]
    checked = subprocess.run(program, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
