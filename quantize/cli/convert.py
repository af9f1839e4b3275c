"""`nvquant convert`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..errors import InputError
from ..plan.plan import Plan
from ..quoting import argument, shell
from ..recipe.load import load_recipe
from .options import (
    calibration_options,
    debug_option,
    device_option,
    format_option,
    json_option,
    make_plan,
    named,
    parse_bytes,
    recipe_option,
    resolve_device,
    revision_option,
)
from .output import emit_json, gigabytes, say, tell
from .publishing import check_push, push_made, report_push

if TYPE_CHECKING:
    from ..calibrate.samples import CalibrationSet
    from ..checkpoint.hub.repository import HubModel
    from ..convert.options import ConvertOptions, ConvertResult
    from ..convert.ranks import Ranks
    from ..convert.stop import StopRequest

EXAMPLES = """
\b
Examples:
  nvquant convert google/gemma-4-31b --recipe nvfp4
  nvquant convert google/gemma-4-31b --recipe nvfp4 --low-disk
  nvquant convert google/gemma-4-31b --recipe nvfp4 --push-to me/gemma-4-31b-NVFP4
  nvquant convert ./gemma-4-31b --recipe nvfp4
  nvquant convert ./gemma-4-31b --recipe nvfp4-full --format modelopt -o out --samples 256
  nvquant convert ./model --recipe nvfp4-a16 --device cpu
  nvquant convert ./model --recipe my.yaml --calibration prompts.jsonl
"""


@click.command("convert", epilog=EXAMPLES)
@click.argument("model")
@recipe_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the output to this folder.",
    show_default="MODEL-RECIPE in the current folder",
)
@format_option
@click.option("--quantizer", help="Override the recipe's quantizer with mse or rtn.")
@click.option(
    "--calibration",
    help="Calibrate with a shipped set, a Hub data set, a .txt/.jsonl/.parquet/.csv file, or token ids.",
    show_default="the recipe's set",
)
@click.option(
    "--calibration-fallback",
    metavar="SET",
    help="Calibrate with this set if the Hub data set is not available. Without this option, that is an error.",
)
@calibration_options
@click.option("--seed", type=int, default=0, show_default=True, help="Choose calibration samples with this seed.")
@device_option
@click.option(
    "--memory-budget",
    callback=parse_bytes,
    help="Use at most this much memory on the GPU and on the host each, such as 8GB.",
    show_default="the free memory",
)
@click.option(
    "--resume/--restart",
    default=True,
    show_default=True,
    help="Resume an unfinished run of this output, or begin anew and replace it.",
)
@click.option(
    "--profile",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write a phase table and a trace for Perfetto to this folder.",
)
@click.option(
    "--engine",
    type=click.Choice(["nvquant", "llmcompressor"]),
    default="nvquant",
    show_default=True,
    help="Convert with this engine. Use llmcompressor for a second opinion.",
)
@revision_option
@click.option(
    "--low-disk",
    is_flag=True,
    help="Fetch the weights of a MODEL on the Hub by ranges as the walk needs them, and keep none on the disk.",
)
@click.option(
    "--push-to",
    metavar="REPO",
    help="Verify the checkpoint and publish it as org/name, like `nvquant push`. New repositories are private.",
)
@json_option
@debug_option
def command(
    model: str,
    recipe_name: str,
    format_name: str,
    output: Path | None,
    quantizer: str | None,
    profile: Path | None,
    engine: str,
    revision: str | None,
    low_disk: bool,
    push_to: str | None,
    as_json: bool,
    **run: Any,
) -> None:
    """Convert MODEL, a folder or a model on the Hub, layer by layer.

    The output folder appears only when it is complete and exactly as planned. To resume an unfinished run, run the same
    command again.
    """
    if low_disk and engine != "nvquant":
        raise InputError(
            f"--low-disk: --engine {engine} reads the whole model from the disk. Drop one of the two options."
        )
    if push_to is not None:
        check_push(push_to)
    recipe = load_recipe(recipe_name)
    pin = partial(_where_it_began, output=output, recipe=recipe.name, resume=run["resume"])
    plan, _ = make_plan(model, recipe_name, format_name, revision, low_disk, pin)
    from ..convert.stop import StopRequest
    from ..quantizers import get_quantizer
    from ..stream.trace import Trace, prepare_folder

    chosen = get_quantizer(quantizer or recipe.quantizer).name
    target = output or _default_output(plan.source.name, recipe.name)
    if profile is not None:
        prepare_folder(profile)
    with StopRequest() as stop:
        trace = Trace(keep_events=profile is not None)
        with trace.span("import"):
            from ..convert.options import ConvertOptions

            device, ranks = _places(plan, target, run["device"], low_disk)
        is_first = ranks.rank == 0
        if is_first:  # it speaks for all
            _announce(plan, target, chosen, device, ranks)
        else:
            _be_quiet(stop)
        loaded = None
        if plan.needs_calibration:
            with trace.span("samples"):
                loaded = _load(plan, run, is_first)
        sizes = (run["batch_size"], run["memory_budget"])
        options = ConvertOptions(
            target, chosen, device, *sizes, restart=not run["resume"], stop=stop, ranks=ranks, trace=trace
        )
        result = _run(plan, options, loaded, engine)
        if profile is not None and is_first:
            trace.write(profile)
    if is_first:
        _finish(plan, result.as_json(), target, push_to, profile, as_json)


def _default_output(source: str, recipe: str) -> Path:
    return Path(f"{source.rpartition('/')[2]}-{recipe}")


def _where_it_began(remote: HubModel, output: Path | None, recipe: str, resume: bool) -> HubModel:
    """The model at the commit of an unfinished run, although its branch may have moved."""
    if not resume or remote.revision == remote.commit:
        return remote
    from ..checkpoint.hub.repository import find_model
    from ..convert.journal import Journal
    from ..convert.output import partial_folder

    identity = Journal(partial_folder(output or _default_output(remote.repo, recipe))).identity() or {}
    began = identity.get("source", {}).get("hub") or {}
    if began.get("id") != remote.repo or began.get("commit") in (None, remote.commit):
        return remote
    say(f"{remote.repo} has moved to {remote.commit[:12]}. The run resumes at its first commit {began['commit'][:12]}.")
    return find_model(remote.repo, began["commit"], endpoint=remote.endpoint, cache=remote.cache)


def _places(plan: Plan, target: Path, device: str, low_disk: bool) -> tuple[str, Ranks]:
    """The device and the ranks of this run, after a check that its output and its downloads fit on the disk."""
    from ..convert.output import check_cache, check_output
    from ..convert.ranks import join_ranks

    check_output(target, plan.file_bytes, plan.source.folder)
    check_cache(plan.source, target, plan.file_bytes)
    found, ranks = join_ranks(resolve_device(device))
    if low_disk and ranks.size > 1:
        raise InputError("--low-disk: every rank would fetch the whole model. Drop the option, or use one rank.")
    return found, ranks


def _announce(plan: Plan, target: Path, quantizer: str, device: str, ranks: Ranks) -> None:
    from ..format.native import TARGETS

    where = f"{device}, {ranks.size} ranks" if ranks.size > 1 else device
    how = f"recipe {plan.recipe.name}, {quantizer}, {plan.layout.name}"
    say(f"nvquant {__version__}: {named(plan)} -> {target}, {how}, {where}")
    if device == "cpu" and not TARGETS:
        say("The compiled CPU kernels are not installed. PyTorch computes the same bytes more slowly.")


def _be_quiet(stop: StopRequest) -> None:
    logging.getLogger("nvquant").setLevel(logging.ERROR)
    stop.is_quiet = True


def _load(plan: Plan, run: Mapping[str, Any], is_first: bool) -> CalibrationSet:
    """The calibration samples of the options, or else of the recipe."""
    from ..calibrate.samples import load_calibration
    from ..checkpoint.hub.errors import HubError

    default = plan.recipe.calibration
    load = partial(
        load_calibration,
        model_folder=plan.source.folder,
        config=plan.source.config,
        samples=run["samples"] or default.samples,
        sequence_length=run["sequence_length"] or default.sequence_length,
        seed=run["seed"],
    )
    try:
        loaded = load(run["calibration"] or default.set)
    except HubError as refusal:
        fallback = run["calibration_fallback"]
        if fallback is None:
            raise
        say(f"{refusal} Calibrating with the --calibration-fallback {fallback}.")
        loaded = load(fallback)
    if is_first:
        count = len(loaded.samples)
        say(f"calibration {loaded.name}: {count} samples, {loaded.tokens:,} tokens, {loaded.framing}")
    return loaded


def _run(plan: Plan, options: ConvertOptions, loaded: CalibrationSet | None, engine: str) -> ConvertResult:
    """Convert with an engine, and show its progress."""
    if engine == "llmcompressor":
        from ..convert.second_opinion import convert_with_llmcompressor as run
    else:
        from ..convert.pipeline import convert as run
    if options.ranks.rank != 0:
        return run(plan, options, loaded)
    from .progress import progress_display

    with progress_display() as sink:
        return run(plan, replace(options, progress=sink), loaded)


def _finish(
    plan: Plan, result: dict[str, Any], target: Path, push_to: str | None, profile: Path | None, as_json: bool
) -> None:
    """Report the result, and publish it if --push-to is given."""
    _tell(result, profile)
    if not as_json:
        tell(
            f"{result['output']}: {result['tensors']} tensors, {gigabytes(result['tensor_bytes'])}, "
            f"{result['quantized']} matrices quantized in "
            f"{result['seconds']:.1f} s, peak {gigabytes(result['peak_host_bytes'])} host, "
            f"{gigabytes(result['peak_gpu_bytes'])} GPU."
        )
    if push_to is None:
        words = ["nvquant", "verify", argument(result["output"]), "--against", argument(plan.model)]
        say(f"Next: {shell(words)}")
    else:
        pushed = push_made(target, plan.source, push_to)
        result = {**result, "push": pushed.as_json()}
        if not as_json:
            report_push(pushed)
    if as_json:
        emit_json(result)


def _tell(result: Mapping[str, Any], profile: Path | None) -> None:
    if profile is not None:
        say(f"Profile: {profile / 'phases.txt'}, and {profile / 'trace.json'} for ui.perfetto.dev")
    if result["was_finished"]:
        say("An equal run has already written this output. To rebuild it, use --restart.")
    if result["marlin_flushed_blocks"]:
        from ..format.marlin import RULE_READ_FROM

        say(
            f"{result['marlin_flushed_blocks']:,} blocks become zeros in Marlin on GPUs without FP4 units (rule of "
            f"{RULE_READ_FROM})."
        )
