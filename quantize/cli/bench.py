"""`nvquant bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError
from .options import debug_option, output_options
from .output import Output
from .serving_options import serving_options, take_serve_options

if TYPE_CHECKING:
    from ..bench.grid import Grid
    from ..bench.load import LoadGenerator
    from ..bench.run import Setting
    from ..serving.server import ServeOptions

EXAMPLES = """
\b
Examples:
  nvquant bench ./gemma-4-31b-nvfp4
  nvquant bench ./gemma-4-31b-nvfp4 --against ./gemma-4-31b --contexts 1024,16384,65536 --kv-cache-dtype auto,fp8
  nvquant bench ./gemma-4-31b-nvfp4 --against Q4_K_M=http://127.0.0.1:8080 --users 1
  nvquant bench ./gemma-4-31b-nvfp4 --url http://127.0.0.1:8000 --load-generator guidellm
"""


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """`1,8,32` as numbers, each once."""
    words = [word.strip() for word in value.split(",") if word.strip()]
    if not words or not all(word.isdigit() and int(word) > 0 for word in words):
        raise click.BadParameter(f"{value!r} is not a list of numbers. Write it as 1,8,32.", ctx, parameter)
    return tuple(dict.fromkeys(int(word) for word in words))


@click.command("bench", epilog=EXAMPLES)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--against",
    multiple=True,
    metavar="CHECKPOINT|URL",
    help="Compare with another checkpoint folder, or with a running server at this address, such as llama.cpp's. "
    "NAME=… names it. You can repeat this option.",
)
@click.option(
    "--users",
    callback=_numbers,
    default="1,8,32",
    show_default=True,
    metavar="N,…",
    help="Measure with these numbers of simultaneous users.",
)
@click.option(
    "--contexts",
    callback=_numbers,
    default="1024,4096,16384",
    show_default=True,
    metavar="TOKENS,…",
    help="Measure with prompts of these lengths.",
)
@click.option(
    "--output-tokens",
    type=click.IntRange(min=2),
    default=200,
    show_default=True,
    help="Request answers of this length.",
)
@click.option(
    "--prompts",
    type=click.IntRange(min=1),
    help="Send this many requests for each point, rounded up to complete rounds of all users.",
    show_default="8, or two rounds if that is more",
)
@serving_options
@click.option(
    "--load-generator",
    type=click.Choice(["vllm", "guidellm"]),
    default="vllm",
    show_default=True,
    help="Send the requests with `vllm bench serve` of the vLLM that serves, or with guidellm.",
)
@click.option("--guidellm", metavar="COMMAND", help="Start guidellm with this command.", show_default="the one on PATH")
@click.option(
    "--dataset",
    default="random",
    show_default=True,
    metavar="NAME",
    help="Take prompts from this data set of `vllm bench serve`. --contexts affects only random prompts.",
)
@click.option("--dataset-path", metavar="PATH", help="Read the data set from this path.")
@click.option(
    "--bandwidth",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB/S",
    help="Give the memory bandwidth of all GPUs together, if nvquant does not know your GPU.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("nvquant-bench"),
    show_default=True,
    help="Write bench.json, bench.md, plots and logs to this folder.",
)
@click.option("--plots/--no-plots", default=None, help="Draw SVG files.", show_default="if matplotlib is installed")
@output_options
@debug_option
def command(
    checkpoint: Path,
    against: tuple[str, ...],
    output: Path,
    plots: bool | None,
    out: Output,
    **values: Any,
) -> int:
    """Measure the serving speed of CHECKPOINT, alone or against others, point by point.

    For every context and number of users, this command measures decode and prefill tokens a second, the time to the
    first token and between tokens (p50, p99), GPU memory and KV-cache capacity. Beside the decode rate it shows the
    ceiling set by the GPU's memory. If a server does not start or a request fails, its point fails, the others
    continue, and the exit code is 1.
    """
    from ..bench.grid import find_targets
    from ..bench.plots import draw, need_matplotlib
    from ..bench.run import Bench

    draws = plots if plots is not None else _has_matplotlib()
    if draws:
        need_matplotlib()
    url = values["url"]
    targets = find_targets(checkpoint, url, against)
    setting, head = _setting(values)
    names = [target.name for target in targets]
    bench = Bench(targets, setting, output, head | {"targets": names}, out.say)
    results = bench.results
    try:
        bench.run()
    finally:
        if draws and results.points:
            draw(results.points, output)
    out.report(lambda: results.document, lambda: _print(results.points, out))
    out.say(f"Results: {output / 'bench.md'}")
    return 1 if results.failed else 0


def _print(points: Sequence[Mapping[str, Any]], out: Output) -> None:
    from ..bench.document import plain_table, where_of

    out.result(plain_table(points))
    for point in points:
        if point.get("failed"):
            out.say(f"Failed: {where_of(point)}: {point['failed']}")


def _setting(values: dict[str, Any]) -> tuple[Setting, dict[str, Any]]:
    from ..bench.document import head_of
    from ..bench.run import Setting
    from ..serving.machine import gpus

    generator, options, dtypes = _server_and_generator(values)
    grid = _grid(values)
    used = gpus()[: options.tensor_parallel]
    given = values["bandwidth"]
    known = [gpu.bandwidth_bytes for gpu in used]
    bandwidth = given * 1e9 if given else sum(filter(None, known)) if known and None not in known else None
    settings = {
        "load_generator": generator.name,
        "contexts": list(grid.contexts),
        "users": list(grid.users),
        "output_tokens": grid.output_tokens,
        "requests": grid.requests,
        "dataset": grid.dataset,
        "kv_cache_dtypes": list(dtypes),
        "tensor_parallel": options.tensor_parallel,
        "vllm_flags": list(options.flags),
    }
    setting = Setting(options, dtypes, grid, generator, used, bandwidth)
    return setting, head_of(used, bandwidth, bool(given), settings)


def _server_and_generator(values: dict[str, Any]) -> tuple[LoadGenerator, ServeOptions, tuple[str, ...]]:
    """The server and the load generator. With --url, --vllm names the vLLM whose load generator runs."""
    from ..bench.guidellm_load import find_guidellm
    from ..bench.vllm_load import bench_command
    from ..serving.command import find_vllm

    vllm, is_running = values["vllm"], values["url"] is not None
    dtypes = tuple(dict.fromkeys(word.strip() for word in values["kv_cache_dtype"].split(",") if word.strip()))
    if not dtypes:
        raise InputError("--kv-cache-dtype is empty", where="--kv-cache-dtype", hint="write auto,fp8")
    if is_running:
        if dtypes != ("auto",):
            raise InputError(
                "--url measures a running server, whose KV cache nvquant cannot change",
                where="--url",
                hint="drop --kv-cache-dtype",
            )
        values["vllm"] = None
    options = take_serve_options(values)
    if values["load_generator"] == "guidellm" and values["dataset"] != "random":
        raise InputError("guidellm sends random prompts only", hint="drop --dataset, or --load-generator guidellm")
    takes_guidellm, guidellm = values.pop("load_generator") == "guidellm", values.pop("guidellm")
    if guidellm and not takes_guidellm:
        raise InputError("--guidellm has no effect without --load-generator guidellm.")
    generator: LoadGenerator = find_guidellm(guidellm) if takes_guidellm else bench_command(find_vllm(vllm))
    return generator, replace(options, kv_cache_dtype=dtypes[0], url=None), dtypes


def _grid(values: Mapping[str, Any]) -> Grid:
    from ..bench.grid import Grid
    from ..bench.load import RANDOM

    if values["dataset"] != RANDOM and not values["dataset_path"]:
        raise InputError(f"--dataset {values['dataset']} requires --dataset-path, the file or name of the data set.")
    return Grid(
        values["contexts"],
        values["users"],
        values["output_tokens"],
        values["prompts"],
        values["dataset"],
        values["dataset_path"],
    )


def _has_matplotlib() -> bool:
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None
