"""The default environment and flags of a server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import PurePath

from ..quoting import is_secret_name, without_secrets

GIB = 1 << 30
# These would lead the server's Python to nvquant's packages and settings.
FOREIGN_PREFIXES = ("PYTHON", "VIRTUAL_ENV", "PYTEST_", "__PYVENV_LAUNCHER__")
# Thread pools of nvquant's own computing; what a server needs is another matter.
FOREIGN_NAMES = frozenset({"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"})
# Of CI systems and clouds: they tell of the machine's owner, or open what is theirs.
_PRIVATE_PREFIXES = (
    *("GITHUB_", "ACTIONS_", "RUNNER_", "GITLAB_", "CI_", "JENKINS_", "BUILDKITE_", "CIRCLE_"),
    *("AWS_", "AZURE_", "GOOGLE_", "GCP_", "ARM_", "DOCKER_", "KUBERNETES_", "SSH_", "GPG_", "NPM_", "TWINE_"),
)
_PRIVATE_NAMES = frozenset(
    {"HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH", "NETRC", "KUBECONFIG", "PGPASSFILE", "VAULT_ADDR"}
)
_PRIVATE_PARTS = frozenset(
    {"TOKEN", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASSPHRASE", "PASS", "PWD", "CREDENTIAL", "CREDENTIALS",
     "AUTH", "AUTHORIZATION", "APIKEY", "COOKIE", "PAT"}
)  # fmt: skip
_OWN_PREFIXES = ("VLLM_", "TORCH", "CUDA", "NCCL")
# These fetch vLLM before they start it, and need what opens an index and a proxy.
_FETCHING = ("uv", "uvx", "pipx")
_FETCHING_PREFIXES = ("UV_", "PIP_", "PIPX_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NETRC")
# One eager pass without compilation: on a CPU, compiling takes minutes, and each request only tenths of a second.
CPU_FLAGS = ("--enforce-eager",)


def own_settings(is_cpu: bool, kv_cache_bytes: int, tensor_parallel: int, ready_seconds: float) -> dict[str, str]:
    """Variables that the server gets unless the user's environment sets them.

    Args:
        is_cpu: whether the server computes on a CPU.
        kv_cache_bytes: the size of the longest request's KV cache.
    """
    settings = {
        "PYTHONSAFEPATH": "1",  # a folder named vllm where the user stands is not vLLM
        "HF_HUB_OFFLINE": "1",  # the checkpoint is a folder
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",  # nor is the token of `hf auth login` needed
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(max(600, round(ready_seconds))),
    }
    if not is_cpu:
        return settings
    settings |= {
        # With as many threads as cores, vLLM's worker and its own server starve each other: fourteen times slower on
        # two busy cores. Half of them is also the number of real cores where each shows as two.
        "OMP_NUM_THREADS": str(max(1, _cores() // 2)),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, -(-2 * kv_cache_bytes // GIB))),
        # vLLM compiles the function that ranks prompt logprobs at the first request, for three seconds.
        "TORCH_COMPILE_DISABLE": "1",
    }
    if tensor_parallel == 1:
        # The worker lives in the engine's process: one import of vLLM less, a third of the start-up time.
        settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return settings


def server_environment(settings: Mapping[str, str], program: str = "") -> dict[str, str]:
    """The environment of this process without nvquant's own variables, and with `settings` where it has none.

    A child needs no token, no key and no password, because it reads a folder and listens on this machine. Variables
    whose names or values reveal a secret are therefore removed.

    Args:
        program: the program to start. One that fetches vLLM keeps the credentials of its package index.
    """
    fetches = PurePath(program).name in _FETCHING
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(FOREIGN_PREFIXES)
        and name not in FOREIGN_NAMES
        and (not _is_private(name, value) or (fetches and name.upper().startswith(_FETCHING_PREFIXES)))
    }
    return {**settings, **kept}


def _is_private(name: str, value: str) -> bool:
    upper = name.upper()
    if upper in ("PWD", "OLDPWD"):
        return False
    if upper.startswith(_PRIVATE_PREFIXES) or upper in _PRIVATE_NAMES or is_secret_name(name):
        return True
    if not upper.startswith(_OWN_PREFIXES) and not _PRIVATE_PARTS.isdisjoint(upper.split("_")):
        return True
    return upper.endswith(("PASSWORD", "PASSWD", "APIKEY")) or without_secrets(value) != value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
