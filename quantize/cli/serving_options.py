"""Options of commands that start a server or use a running one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .options import F

if TYPE_CHECKING:
    from ..serving.server import ServeOptions

NAMES = ("vllm", "url", "tensor_parallel", "max_model_len", "kv_cache_dtype", "vllm_flags", "ready_seconds")


def serving_options(function: F) -> F:
    """`--vllm` or `--url`, and the settings of the server. `take_serve_options` collects their values."""
    for option in reversed(
        (
            click.option(
                "--vllm",
                metavar="COMMAND",
                help="Start this vLLM, given as a command or as the Python of its environment.",
                show_default="the one on PATH, in this environment, or by uvx",
            ),
            click.option(
                "--url", metavar="URL", help="Use the running server at this address instead of starting one."
            ),
            click.option(
                "--tensor-parallel",
                type=click.IntRange(min=1),
                default=1,
                show_default=True,
                metavar="GPUS",
                help="Share the weights among this many GPUs.",
            ),
            click.option(
                "--max-model-len",
                type=click.IntRange(min=64),
                metavar="TOKENS",
                help="Start the server for requests of up to this length.",
                show_default="4096, or the model's own limit if that is less",
            ),
            click.option(
                "--kv-cache-dtype",
                default="auto",
                show_default=True,
                metavar="DTYPE",
                help="Use this dtype for the KV cache, such as fp8. auto takes the dtype that the checkpoint requests.",
            ),
            click.option(
                "--vllm-flag",
                "vllm_flags",
                multiple=True,
                metavar="FLAG",
                help="Pass a further flag to the server, such as --vllm-flag=--attention-backend=TRITON_ATTN. You "
                "can repeat this option.",
            ),
            click.option(
                "--ready-seconds",
                type=click.FloatRange(min=1),
                default=1800.0,
                show_default=True,
                metavar="SECONDS",
                help="Wait at most this long until the server is ready.",
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
    return ServeOptions(
        vllm=taken["vllm"],
        url=taken["url"],
        tensor_parallel=taken["tensor_parallel"],
        max_model_len=taken["max_model_len"],
        kv_cache_dtype=taken["kv_cache_dtype"],
        flags=tuple(taken["vllm_flags"]),
        ready_seconds=taken["ready_seconds"],
    )
