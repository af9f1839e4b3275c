"""Options of commands that start a server, or ask one that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError
from .options import F

if TYPE_CHECKING:
    from ..serving.server import ServeOptions

NAMES = ("vllm", "url", "tensor_parallel", "max_model_len", "kv_cache_dtype", "vllm_flags", "ready_seconds")


def serving_options(function: F) -> F:
    """`--vllm` or `--url`, and how the server is to run; `take_serve_options` collects their values."""
    for option in reversed(
        (
            click.option(
                "--vllm",
                metavar="COMMAND",
                help="The vLLM to start: a command, or the Python of its environment. By default the one on PATH, in "
                "this environment, or by uvx.",
            ),
            click.option("--url", metavar="URL", help="Ask the server that runs there instead of starting one."),
            click.option(
                "--tensor-parallel",
                type=click.IntRange(min=1),
                default=1,
                show_default=True,
                metavar="GPUS",
                help="GPUs that share the weights.",
            ),
            click.option(
                "--max-model-len",
                type=click.IntRange(min=64),
                metavar="TOKENS",
                help="The longest request of the server; by default 4096, or the model's own limit where it is less.",
            ),
            click.option(
                "--kv-cache-dtype",
                default="auto",
                show_default=True,
                metavar="DTYPE",
                help="Of the server, as fp8; auto takes what the checkpoint asks for.",
            ),
            click.option(
                "--vllm-flag",
                "vllm_flags",
                multiple=True,
                metavar="FLAG",
                help="A further flag for the server, as --vllm-flag=--attention-backend=TRITON_ATTN; may be given "
                "several times.",
            ),
            click.option(
                "--ready-seconds",
                type=click.FloatRange(min=1),
                default=1800.0,
                show_default=True,
                metavar="SECONDS",
                help="How long to wait for the server to be ready.",
            ),
        )
    ):
        function = option(function)
    return function


def take_serve_options(values: dict[str, Any]) -> ServeOptions:
    """Take the values of `serving_options` out of a command's keyword arguments.

    Raises:
        InputError: options for starting a server together with `--url`.
    """
    from ..serving.server import ServeOptions

    taken = {name: values.pop(name) for name in NAMES}
    if taken["url"] is not None and (taken["vllm"] is not None or taken["vllm_flags"]):
        raise InputError("--url asks a server that runs already, so --vllm and --vllm-flag have no effect: drop one.")
    return ServeOptions(
        vllm=taken["vllm"],
        url=taken["url"],
        tensor_parallel=taken["tensor_parallel"],
        max_model_len=taken["max_model_len"],
        kv_cache_dtype=taken["kv_cache_dtype"],
        flags=tuple(taken["vllm_flags"]),
        ready_seconds=taken["ready_seconds"],
    )
