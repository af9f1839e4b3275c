"""The library's functions. They take plain Python values and do the work of the commands, which call the same code.

Messages of a run go to the logger `nvquant.api`. Errors are `nvquant.errors.NvquantError`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..plan.plan import Plan
from ..recipe.schema import Recipe
from .conversion import Conversion, ConvertRequest
from .distillation import DEFAULT_TOKENS, DistillRequest, run_distillation
from .inputs import AnyPath, as_layout, checked_plan, open_model
from .publication import PushOptions, verified_request
from .sweeping import SweepRequest, SweepResult, run_sweep, within_budget
from .verification import VerifyRequest, open_verification

if TYPE_CHECKING:
    from ..convert.options import ConvertResult
    from ..convert.progress import Progress, ProgressSink
    from ..convert.relayout import RelayoutResult
    from ..distill.options import DistillResult
    from ..publish.push import PushResult
    from ..serving.server import ServeOptions
    from ..verify.report import Check, Report
    from ..verify.threads import Progress as StageProgress

__all__ = ["convert", "distill", "plan", "push", "relayout", "sweep", "verify"]
_LOG = logging.getLogger(__name__)
Request = TypeVar("Request", ConvertRequest, DistillRequest, VerifyRequest, PushOptions, SweepRequest)


def plan(
    model: AnyPath,
    recipe: AnyPath | Recipe = "nvfp4",
    *,
    format: str = "compressed-tensors",
    revision: str | None = None,
) -> Plan:
    """Compute every output tensor, file and byte of a conversion from headers and config, without reading a weight.

    Args:
        model: a folder, or a model on the Hub as `org/name` or `org/name@revision`.
        recipe: the name of a shipped recipe, the path of a YAML file, or a recipe.
        format: the layout, `compressed-tensors` or `modelopt`.
        revision: a commit, branch or tag of a model on the Hub.
    Returns:
        The plan. `tensor_bytes`, `shards` and `matrices` describe the output.
    Raises:
        InputError: no such model, recipe or layout, or the recipe does not fit the model.
        CheckFailed, EnvironmentLack: `convert` would refuse this plan, see `convert.checks.check_conversion`.
    Example:
        >>> from nvquant import plan
        >>> planned = plan(model, "nvfp4-a16")
        >>> len(planned.matrices), planned.tensors, planned.layout.name
        (21, 71, 'compressed-tensors')
    """
    return checked_plan(model, recipe, format, revision, say=_say)


def convert(
    model: AnyPath,
    output: AnyPath | None = None,
    recipe: AnyPath | Recipe = "nvfp4",
    *,
    format: str = "compressed-tensors",
    quantizer: str | None = None,
    fold: str | None = None,
    calibration: AnyPath | None = None,
    calibration_fallback: AnyPath | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    device: str = "auto",
    memory_budget: int | None = None,
    restart: bool = False,
    profile: AnyPath | None = None,
    engine: str = "nvquant",
    revision: str | None = None,
    low_disk: bool = False,
    target_bits: float | None = None,
    target_size: int | None = None,
    max_kl: float | None = None,
    distill: int | None = None,
    progress: ProgressSink | None = None,
) -> ConvertResult:
    """Convert a BF16 model into an NVFP4 checkpoint, layer by layer. An equal call resumes an unfinished run.

    Args:
        model, recipe, format, revision: see `plan`.
        output: the folder to write. None for MODEL-RECIPE in the current folder.
        quantizer: `mse`, `rtn` or `gptq`. None for the recipe's.
        fold: `auto` for exact folds before quantizing, `off` for none. None for the recipe's, or else the quantizer's.
        calibration: a shipped set, a Hub data set, or a file. None for the recipe's set.
        calibration_fallback: the set to use if the Hub data set is not available. None to raise.
        samples, sequence_length: the size of the calibration set in sequences and tokens. None for the recipe's.
        batch_size: sequences in one forward.
        seed: of the choice of calibration samples.
        device: `auto`, `cuda` or `cpu`.
        memory_budget: bytes, on the GPU and on the host each. None for the free memory.
        restart: begin anew, and replace an unfinished run or an output.
        profile: a folder for a phase table and a trace.
        engine: `nvquant`, or `llmcompressor` for a second opinion.
        low_disk: fetch the weights of a model on the Hub by ranges, and keep none.
        target_bits, target_size, max_kl: a budget for mixed precision, see `sweep`. At most one.
        distill: tokens of a distillation after the conversion. None for none.
        progress: called with the progress of the run, by any of its threads.
    Returns:
        The sizes, times and peaks of the run, the document of `convert --json`.
    Raises:
        InputError, EnvironmentLack: a wrong model, recipe or option, an output in the way, or too little of something.
        CheckFailed, KeyboardInterrupt: the output differs from the plan, or Ctrl-C. Complete layers are kept.
    Example:
        >>> from nvquant import convert
        >>> result = convert(model, output, "nvfp4-a16", device="cpu")
        >>> result.quantized, result.was_finished
        (21, False)
    """
    return _converted(_request(ConvertRequest, locals()), progress or _ignore_state)


def sweep(
    model: AnyPath,
    recipe: AnyPath | Recipe = "nvfp4",
    output: AnyPath | None = None,
    *,
    format: str = "compressed-tensors",
    quantizer: str | None = None,
    fold: str | None = None,
    target_bits: Sequence[float] = (),
    target_size: Sequence[int] = (),
    max_kl: Sequence[float] = (),
    calibration: AnyPath | None = None,
    calibration_fallback: AnyPath | None = None,
    samples: int = 8,
    sequence_length: int = 512,
    seed: int = 0,
    device: str = "auto",
    memory_budget: int | None = None,
    restart: bool = False,
    revision: str | None = None,
    progress: StageProgress | None = None,
) -> SweepResult:
    """Measure the loss of each fused group alone in NVFP4 and in FP8, and make recipes for budgets.

    An equal call resumes an unfinished sweep. With other budgets, a finished one is not measured again.

    Args:
        model, recipe, format, revision: see `plan`.
        output: the folder for the measurements, the curve and the recipes. None for MODEL-RECIPE.sweep.
        quantizer, fold: of the conversion, see `convert`. With gptq, mse measures.
        target_bits: make a recipe for each, with at most this mean number of stored bits a weight.
        target_size: make a recipe for each, for a checkpoint of at most this number of bytes.
        max_kl: make a recipe for each, whose forecast of the mean KL divergence is within these nats.
        calibration: a shipped set, a Hub data set, or a file to measure on. None for the recipe's set.
        calibration_fallback: the set to use if the Hub data set is not available. None to raise.
        samples, sequence_length: the size of the measured text in sequences and tokens.
        seed: of the choice of samples.
        device: `auto`, `cuda` or `cpu`.
        memory_budget: bytes, on the GPU and on the host each. None for the free memory.
        restart: begin anew, and replace an earlier sweep.
        progress: called with (done, total, phase).
    Returns:
        The measurements and the curve (`document`), and the recipes by their names, which `convert` takes.
    Raises:
        InputError: a wrong model, recipe, calibration or option, an impossible budget, or foreign files in the folder.
        EnvironmentLack: a device or package is missing.
        CheckFailed: predictions are not finite.
    Example:
        >>> from nvquant import sweep
        >>> found = sweep(model, "nvfp4-full", output, target_bits=[6], samples=2, sequence_length=32, device="cpu")
        >>> list(found.recipes), len(found.document.groups)
        (['nvfp4-full-6bits'], 12)
    """
    return run_sweep(_request(SweepRequest, locals()), progress or _ignore_stage, _say)


def distill(
    checkpoint: AnyPath,
    against: AnyPath,
    output: AnyPath,
    *,
    tokens: int = DEFAULT_TOKENS,
    calibration: AnyPath | None = None,
    text: AnyPath | None = None,
    device: str = "auto",
    memory_budget: int | None = None,
    restart: bool = False,
    progress: StageProgress | None = None,
) -> DistillResult:
    """Train the block scales and norms of a checkpoint to its source's logits. An equal call resumes an unfinished run.

    Args:
        checkpoint: a folder, or a checkpoint on the Hub.
        against: the source of the checkpoint, a folder or a model on the Hub.
        output: the folder to write.
        tokens: of the training.
        calibration: the training text, as for `convert`. None for the shipped set.
        text: the text that decides whether the training is kept. None for the shipped held-out text.
        device: `auto`, `cuda` or `cpu`.
        memory_budget: bytes, on the device. None for the free memory.
        restart: begin anew, and replace an unfinished run or an output.
        progress: called with (done, total, phase).
    Returns:
        The document of `distill --json`. `record.is_kept` states whether the training was kept. If not, the output
        has the tensors of the checkpoint.
    Raises:
        InputError: no checkpoint of nvquant, another model for a source, or an output in the way.
        EnvironmentLack: a device is missing, or the memory is too small for both models.
    Example:
        >>> from nvquant import distill
        >>> result = distill(checkpoint, model, output, tokens=4096, device="cpu")
        >>> result.record.steps
        1
    """
    from ..convert.stop import StopRequest

    return run_distillation(_request(DistillRequest, locals()), StopRequest(), progress or _ignore_stage)


def verify(
    checkpoint: AnyPath,
    *,
    against: AnyPath | None = None,
    stages: Sequence[str] = ("structure",),
    by_ranges: bool = True,
    text: AnyPath | None = None,
    samples: int = 18,
    sequence_length: int = 512,
    max_kl: float | None = None,
    min_top1: float | None = None,
    device: str = "auto",
    server: ServeOptions | None = None,
    log_folder: AnyPath | None = None,
    on_check: Callable[[Check], None] | None = None,
    progress: StageProgress | None = None,
) -> Report:
    """Verify a checkpoint, stage by stage. A failed check is a verdict in the report and no exception.

    Args:
        checkpoint: a folder, or a checkpoint on the Hub as `org/name[@revision]`.
        against: the source of the checkpoint, a folder or a model on the Hub. The stage numerics requires it.
        stages: of structure, numerics and serve. They run in this order.
        by_ranges: whether the stage structure alone reads only headers and scales of a checkpoint on the Hub.
            Otherwise it is downloaded completely.
        text: a file to measure on. None for the shipped held-out text.
        samples, sequence_length: the size of the measured text in sequences and tokens.
        max_kl: limit of the mean KL divergence in nats. None for the recipe's.
        min_top1: limit of the top-1 agreement. None for the recipe's.
        device: `auto`, `cuda` or `cpu`.
        server: the options of the stage serve. None for the defaults.
        log_folder: for the server's log.
        on_check: called with each check when it is done.
        progress: called with (done, total, phase) by long steps.
    Returns:
        The verdict (`passed`), the checks and the measured numbers. `as_json()` is the document of `verify --json`.
    Raises:
        InputError: no NVFP4 checkpoint, no such stage, or a wrong source.
        EnvironmentLack: a device, a package or a vLLM is missing.
    Example:
        >>> from nvquant import verify
        >>> report = verify(checkpoint, against=model)
        >>> report.passed, [check.name for check in report.checks if not check.passed]
        (True, [])
    """
    request = _request(VerifyRequest, locals())
    verification = open_verification(request, progress or _ignore_stage)
    for check in verification.run():
        if on_check is not None:
            on_check(check)
    return verification.report()


def relayout(checkpoint: AnyPath, format: str, output: AnyPath) -> RelayoutResult:
    """Rewrite an NVFP4 checkpoint in the other layout. Codes and block scales keep their bytes.

    Args:
        checkpoint: a folder, or a checkpoint on the Hub.
        format: the layout to write, `compressed-tensors` or `modelopt`.
        output: the folder to write.
    Returns:
        The sizes of the output, and how its global scales were made.
    Raises:
        InputError: no NVFP4 checkpoint, the same layout, or an output in the way.
        CheckFailed: the output differs from the expected one.
    Example:
        >>> from nvquant import relayout
        >>> relayout(checkpoint, "modelopt", output).scalars
        'exact'
    """
    from ..convert.relayout import relayout as rewrite

    return rewrite(open_model(str(checkpoint)), as_layout(format), Path(output))


def push(
    checkpoint: AnyPath,
    repo: str,
    *,
    against: AnyPath | None = None,
    verify_json: AnyPath | None = None,
    base_model: str | None = None,
    is_public: bool = False,
    replace: bool = False,
    unverified: bool = False,
    message: str | None = None,
    progress: StageProgress | None = None,
) -> PushResult:
    """Verify a checkpoint and publish it on the Hub, with a model card. An equal call resumes an unfinished push.

    Args:
        checkpoint: its folder.
        repo: the repository as `org/name`. A new one is private.
        against: the source of the checkpoint, to measure the numbers for the card.
        verify_json: a file of an earlier `nvquant verify --json` of this checkpoint, whose results are reused.
        base_model: the source on the Hub, if you converted a local folder.
        is_public: make a new repository public.
        replace: delete weights and settings of other checkpoints in the repository, and replace its README.md.
        unverified: publish although checks failed. The card then begins with the failed checks.
        message: of the commit.
        progress: called with (done, total, phase) by long steps of the verification.
    Returns:
        The commit, and the files that it changed.
    Raises:
        CheckFailed: a check failed, or the Hub lacks an uploaded file.
        InputError: no token or right, foreign files in the way, or no network.
    Example:
        >>> from nvquant import push
        >>> result = push(checkpoint, "me/tiny-NVFP4")
        >>> result.repo, result.is_private, result.passed
        ('me/tiny-NVFP4', True, True)
    """
    from ..publish.push import push as upload

    options = _request(PushOptions, locals())
    return upload(verified_request(Path(checkpoint), repo, options, progress or _ignore_stage, _say))


def _converted(request: ConvertRequest, sink: ProgressSink) -> ConvertResult:
    from ..convert.stop import StopRequest

    return Conversion(within_budget(request, _ignore_stage, _say), _say).run(StopRequest(), lambda: nullcontext(sink))


def _request(kind: type[Request], arguments: Mapping[str, object]) -> Request:
    """A request from the arguments of a function, which has a parameter for each field."""
    values: dict[str, Any] = {field.name: arguments[field.name] for field in fields(kind)}
    return kind(**values)


def _say(text: str) -> None:
    _LOG.info("%s", text)


def _ignore_state(_state: Progress) -> None:
    pass


def _ignore_stage(_done: int, _total: int, _phase: str) -> None:
    pass
