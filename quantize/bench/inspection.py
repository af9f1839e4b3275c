"""The state of this machine, found without importing anything heavy: packages, vLLM, token, disk."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..recipe.roles import text_config
from ..serving.command import VllmCommand
from ..serving.environment import server_environment

PLUGIN = "nvquant_cpu"
_SECONDS = 60
# Reads metadata and one file as text: importing vLLM takes ten seconds.
_PROBE = """\
import importlib.metadata as metadata, importlib.util, json, pathlib
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
spec = importlib.util.find_spec("vllm")
registry = pathlib.Path(spec.submodule_search_locations[0], "model_executor", "models", "registry.py") if spec else None
print(json.dumps({
    "versions": {name: version(name) for name in ("torch", "transformers", "compressed-tensors", "flashinfer-python")},
    "plugins": [entry.name for entry in metadata.entry_points(group="vllm.general_plugins")],
    "registry": registry.read_text(errors="replace") if registry and registry.is_file() else None,
}))
"""


@dataclass(frozen=True)
class VllmEnvironment:
    """The packages beside a vLLM.

    Attributes:
        versions: of packages that matter to serving. None for absent ones.
        plugins: names under which plugins for all of vLLM are registered.
        architectures: classes that this vLLM knows. Empty where they are unknown.
    """

    versions: Mapping[str, str | None]
    plugins: tuple[str, ...]
    architectures: frozenset[str]

    @property
    def has_cpu_plugin(self) -> bool:
        """Whether nvquant's kernels for the CPU are installed there."""
        return PLUGIN in self.plugins


def look_into(vllm: VllmCommand) -> VllmEnvironment | None:
    """The environment of a vLLM. None where its command does not reveal its Python, as with `uvx` or a container."""
    python = _python_of(vllm)
    if python is None:
        return None
    try:
        done = subprocess.run(
            [*python, "-c", _PROBE], env=server_environment({}), stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
        facts = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    names = re.findall(r'^\s+"(\w+)":', facts["registry"] or "", re.MULTILINE)
    return VllmEnvironment(facts["versions"], tuple(facts["plugins"]), frozenset(names))


def installed(name: str) -> str | None:
    """Version of a package beside nvquant. None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_known_to_transformers(config: Mapping[str, Any]) -> bool | None:
    """Whether transformers here has the checkpoint's model type. None where that is unknown.

    Its table of types is read as text, because importing it would import torch.
    """
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0], "models", "auto")
    texts = [path.read_text(errors="replace") for path in folder.glob("*.py")]
    known = set(re.findall(r'"([\w.-]+)"[,:]\s*"\w+Config"', "\n".join(texts)))
    kinds = {str(part.get("model_type")) for part in (config, text_config(config)) if part.get("model_type")}
    return kinds <= known if known and kinds else None


@dataclass(frozen=True)
class HubToken:
    """A token for the Hugging Face Hub, without its value.

    Attributes:
        where: the variable or file that contains it.
        owner: the name under which it was stored, where it was stored by name.
    """

    where: str
    owner: str | None


def hub_token() -> HubToken | None:
    """The token that huggingface_hub would use, by its rules. None where there is none."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return HubToken(name, _owner(os.environ[name].strip()))
    path = Path(os.environ.get("HF_TOKEN_PATH") or _hub_home() / "token").expanduser()
    try:
        token = path.read_text().strip()
    except OSError:
        return None
    return HubToken(str(path), _owner(token)) if token else None


def hub_cache() -> Path:
    """The folder of huggingface_hub's downloads."""
    return Path(os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub").expanduser()


def free_bytes(folder: Path) -> int | None:
    """Free space on the disk of a folder, which may not exist yet."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        return shutil.disk_usage(there).free
    except OSError:
        return None


def _hub_home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or Path(cache, "huggingface")).expanduser()


def _owner(token: str) -> str | None:
    """The name under which `hf auth login` stored a token."""
    path = Path(os.environ.get("HF_STORED_TOKENS_PATH") or _hub_home() / "stored_tokens")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text())
    except (OSError, configparser.Error):
        return None
    return next((name for name in parser.sections() if parser.get(name, "hf_token", fallback="") == token), None)


def _python_of(vllm: VllmCommand) -> list[str] | None:
    for flag in ("-m", "-c"):
        if flag in vllm.words:
            return list(vllm.words[: vllm.words.index(flag)])
    script = shutil.which(vllm.words[0])
    if script is None or len(vllm.words) > 2:
        return None
    with Path(script).open("rb") as file:
        words = file.readline(4096).decode(errors="replace").removeprefix("#!").split()
    return words if words and re.search(r"python[\d.]*$", words[0]) else None
