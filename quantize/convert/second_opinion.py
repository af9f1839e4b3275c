"""A second opinion: the same recipe, samples and scheme through llm-compressor, on models that fit in memory.

llm-compressor loads, calibrates, quantizes and saves. nvquant passes it the token ids and the patterns, and compares
the output with the plan. config.json is nvquant's: it describes every layer in the same way, by patterns that vLLM
reads for Gemma 4 too. docs/second-opinion.md lists and measures the differences between the two engines.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.model_class import ATTENTION
from ..calibrate.quiet import quiet_transformers
from ..calibrate.samples import CalibrationSet
from ..checkpoint.config_values import config_int
from ..checkpoint.hub.shards import DownloadedShards
from ..checkpoint.source import Checkpoint, open_checkpoint, torch_dtype
from ..checkpoint.writer import TensorEntry
from ..errors import CheckFailed, EnvironmentLack, InputError, NvquantError
from ..format.declared import PRESETS
from ..format.layouts import GLOBAL_SCALES
from ..format.marlin import count_flushed_blocks, scale_histogram
from ..plan.plan import SHARD_LIMIT_BYTES, Plan
from ..recipe.matrices import matrix_entries
from ..recipe.roles import Role, text_config
from ..stream.memory import available_host_bytes, peak_gpu_bytes, peak_host_bytes
from ..weights.decoding import decoded_form
from .config import coverage_in_order, output_configs
from .options import ConvertOptions, ConvertResult
from .output import check_output, fresh_partial, publish, write_side_files
from .progress import Progress

log = logging.getLogger("nvquant.convert")

PACKAGE = "llmcompressor"
INSTALL = "pip install 'nvquant[llmcompressor]'"
INTERPRETER_BYTES = 1_500_000_000  # torch, transformers, llm-compressor and their buffers
MATRIX_COPIES = 8  # that quantizing a matrix holds at once, of its size in the compute dtype
SCORE_COPIES = 3  # of eager attention's scores, [heads, tokens, tokens]


def convert_with_llmcompressor(
    plan: Plan, options: ConvertOptions, calibration: CalibrationSet | None
) -> ConvertResult:
    """Convert with llm-compressor's `oneshot`. The output appears under its final name only when it is complete and as
    planned.

    Args:
        plan: in the compressed-tensors layout.
        options: the quantizer is rtn, the batch size 1. On the CPU everything is computed in float32, on a GPU in
            bfloat16, as in `pipeline.convert`.
        calibration: None for a weight-only recipe.
    Raises:
        InputError: this engine does not support the request, or the model does not fit the memory.
        EnvironmentLack: llm-compressor is not installed, or not usable.
        CheckFailed: the saved tensors differ from the plan.
    """
    started = time.monotonic()
    refuse_unsupported(plan, options)
    _require_package()
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    check_memory(plan, calibration, options.device, dtype)
    check_output(options.output, plan.file_bytes, plan.source.folder)
    configs = output_configs(plan)
    if isinstance(plan.source.content, DownloadedShards):
        plan.source.content.fetch_all(plan.source.shards)
    with fresh_partial(options.output, {"engine": PACKAGE, "version": metadata.version(PACKAGE)}) as partial:
        quantize_and_save(plan, calibration, options, dtype, partial)
        write_side_files(plan.source.folder, partial, configs)
        written = open_checkpoint(partial)
        assert_holds_plan(plan, written)
        flushed = _flushed_blocks(plan, written)
        publish(partial, options.output)
    infos = written.infos().values()
    return ConvertResult(
        output=str(options.output),
        tensors=len(infos),
        tensor_bytes=sum(info.nbytes for info in infos),
        quantized=len(plan.matrices),
        seconds=round(time.monotonic() - started, 3),
        peak_host_bytes=peak_host_bytes(),
        peak_gpu_bytes=peak_gpu_bytes(),
        calibration=calibration.as_json() if calibration else None,
        marlin_flushed_blocks=flushed,
    )


def refuse_unsupported(plan: Plan, options: ConvertOptions) -> None:
    """Raise InputError for requests that llm-compressor does not support, or handles in another way than nvquant."""
    if plan.layout.name != "compressed-tensors":
        raise InputError(
            "--engine llmcompressor writes the compressed-tensors layout only",
            where="--engine",
            hint="drop --format, and use `nvquant relayout` on the output",
        )
    form = decoded_form(plan.source)
    if form is not None:
        raise InputError(
            f"--engine llmcompressor reads unquantized models only, and {plan.model} is stored in {form}",
            where="--engine",
            hint="use --engine nvquant",
        )
    if options.quantizer != "rtn":
        raise InputError(
            "--engine llmcompressor chooses scales with its own observers, which do not include nvquant's "
            f"{options.quantizer}",
            where="--engine",
            hint="use --quantizer rtn",
        )
    if options.batch_size != 1:
        raise InputError(
            "--engine llmcompressor calibrates one sequence at a time", where="--engine", hint="drop --batch-size"
        )
    if Role.EXPERT in plan.selection.roles.values():
        raise InputError(
            f"--engine llmcompressor does not support {plan.model}, a mixture of experts",
            where="--engine",
            hint="use --engine nvquant",
        )
    if plan.head is not None:
        raise InputError(
            "--engine llmcompressor does not quantize the output head, as the key `head` of recipe "
            f"{plan.recipe.name} requires",
            where="--engine",
            hint="remove the key, or use --engine nvquant",
        )
    if plan.cached:
        raise InputError(
            f"--engine llmcompressor does not write the scales of the KV cache that recipe {plan.recipe.name} requires",
            where="--engine",
            hint="use kv_cache: {dtype: fp8}, or --engine nvquant",
        )
    other = [info for info in plan.source.infos().values() if info.dtype != "BF16"]
    if options.device != "cpu" and other:
        raise InputError(
            f"--engine llmcompressor would round {other[0].name} ({other[0].dtype}) to bfloat16 on a GPU",
            where="--engine",
            hint="use --device cpu",
        )


def needed_bytes(plan: Plan, calibration: CalibrationSet | None, dtype: torch.dtype) -> int:
    """Memory of the complete model in llm-compressor, an upper estimate: weights in the compute dtype, the
    largest matrix while it is quantized, attention scores of the longest sample."""
    elements = [math.prod(info.shape) for info in plan.source.infos().values()]
    largest = max((matrix.rows * matrix.cols for matrix in plan.matrices.values()), default=0)
    tokens = max((len(ids) for ids in calibration.samples), default=0) if calibration else 0
    heads = config_int(text_config(plan.source.config), "num_attention_heads", 1)
    scores = SCORE_COPIES * heads * tokens * tokens
    return (sum(elements) + MATRIX_COPIES * largest + scores) * dtype.itemsize


def check_memory(plan: Plan, calibration: CalibrationSet | None, device: str, dtype: torch.dtype) -> None:
    """Raise InputError if the complete model does not fit the memory, because this engine does not stream."""
    working = needed_bytes(plan, calibration, dtype)
    needed = {"cpu": INTERPRETER_BYTES + working}  # with a GPU too: loaded here, and saved from here
    if device != "cpu":
        needed[device] = working
    for place, size in needed.items():
        free = available_host_bytes() if place == "cpu" else torch.cuda.mem_get_info(place)[0]
        if free is not None and size > free:
            what = "host memory" if place == "cpu" else "GPU memory"
            raise InputError(
                f"--engine llmcompressor loads the complete model and needs {size:,} bytes of {what}, but "
                f"{free:,} are free",
                where="--engine",
                hint="use --engine nvquant, which streams the model",
            )


def _require_package() -> None:
    if importlib.util.find_spec(PACKAGE) is None:
        raise EnvironmentLack(
            "--engine llmcompressor requires llm-compressor, which is not installed",
            where="--engine",
            hint=f"run `{INSTALL}`",
        )


def quantize_and_save(
    plan: Plan, calibration: CalibrationSet | None, options: ConvertOptions, dtype: torch.dtype, folder: Path
) -> None:
    """Load, quantize and save into `folder`, and keep llm-compressor's messages off stdout.

    Args:
        dtype: of the loaded weights. llm-compressor computes their scales and codes in it too.
    Raises:
        EnvironmentLack: llm-compressor cannot be imported.
        NvquantError: it failed for any reason.
    """
    version = metadata.version(PACKAGE)
    options.progress(Progress(f"llm-compressor {version}"))
    try:
        with _aside():
            model = _load(plan, options.device, dtype)
            _oneshot(model, plan, calibration)
            restore_dtypes(model, plan)
            model.save_pretrained(folder, save_compressed=True, max_shard_size=SHARD_LIMIT_BYTES)
    except ImportError as error:
        raise EnvironmentLack(
            f"llm-compressor {version} does not work with the installed packages ({error})",
            hint=f"run `{INSTALL}` in a new environment",
        ) from error
    except NvquantError:
        raise
    except Exception as error:  # whatever it raises; the traceback is shown with --debug
        raise NvquantError(
            f"llm-compressor {version} failed ({type(error).__name__}: {error})",
            hint="run the command with --debug for its traceback, or use --engine nvquant",
        ) from error
    finally:
        gc.collect()  # its session and observers hold the model in cycles


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Keep stdout, which belongs to the result, empty, and show progress bars on stderr if it is a terminal."""
    with contextlib.ExitStack() as stack:
        bars = sys.stderr if sys.stderr.isatty() else stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(contextlib.redirect_stderr(bars))
        stack.enter_context(quiet_transformers())
        # Its loguru logger keeps the stdout of the moment of its first import: hence after the redirection.
        from llmcompressor import logger, reset_session

        for package in (PACKAGE, "compressed_tensors"):
            logger.disable(package)
        try:
            yield
        finally:
            reset_session()
            for package in (PACKAGE, "compressed_tensors"):
                logger.enable(package)


def _load(plan: Plan, device: str, dtype: torch.dtype) -> Any:
    import transformers

    is_multimodal = "vision_config" in plan.source.config
    auto = transformers.AutoModelForImageTextToText if is_multimodal else transformers.AutoModelForCausalLM
    load = partial(auto.from_pretrained, plan.source.folder, dtype=dtype, local_files_only=True)
    try:
        model = load(attn_implementation=ATTENTION)
    except ValueError:  # a part of the model refuses it: each part chooses for itself then
        model = load()
    return model.eval().to(device)


def _oneshot(model: nn.Module, plan: Plan, calibration: CalibrationSet | None) -> None:
    """llm-compressor's own calibration and quantization, in place."""
    from compressed_tensors.offload import remove_dispatch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    coverage = coverage_in_order(plan)
    schemes = {PRESETS[scheme]: [pattern.regex() for pattern in found] for scheme, found in coverage.targets.items()}
    oneshot(
        model=model,
        processor=object(),  # there is nothing to tokenize; None would make it load one
        recipe=QuantizationModifier(scheme=schemes, ignore=coverage.ignore_regexes()),
        dataset=None if calibration is None else calibration_loader(calibration.samples),
        pipeline="datafree" if calibration is None else "basic",
    )
    remove_dispatch(model)  # plain tensors again: the data-free pipeline wraps them


def calibration_loader(samples: Sequence[Tensor]) -> torch.utils.data.DataLoader[dict[str, Tensor]]:
    """Batches of one sample, in order, complete, without padding: int64 [1, tokens] each, and a mask of ones."""
    rows: list[dict[str, Tensor]] = [
        {"input_ids": ids.unsqueeze(0), "attention_mask": torch.ones_like(ids).unsqueeze(0)} for ids in samples
    ]
    return torch.utils.data.DataLoader(rows, batch_size=None, shuffle=False)  # type: ignore[arg-type]


def restore_dtypes(model: nn.Module, plan: Plan) -> None:
    """Give unquantized tensors the dtype of the source. This is exact, since they came from there.

    Weights to be packed keep their dtype, in which the compressor computes.
    """
    infos = plan.source.infos()
    usual = max(infos.values(), key=lambda info: info.nbytes).dtype
    for module_name, module in model.named_modules():
        is_quantized = hasattr(module, "quantization_scheme")
        for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_floating_point() and (not is_quantized or leaf == "bias"):
                name = f"{module_name}.{leaf}" if module_name else leaf
                stored = infos[name].dtype if name in infos else usual
                tensor.data = tensor.data.to(torch_dtype(stored))


def assert_holds_plan(plan: Plan, written: Checkpoint) -> None:
    """Compare the saved tensors of llm-compressor with the plan: names, dtypes, shapes, and the bytes of all
    unquantized tensors.

    Tensors that no layer reads, and a head that the source stores although it is tied, may be missing: transformers
    does not save them.
    Raises:
        CheckFailed: the first difference.
    """
    planned = {entry.name: entry for shard in plan.shards for entry in shard.entries}
    for name, info in written.infos().items():
        if planned.get(name) != TensorEntry(name, info.dtype, info.shape):
            what = f"{planned[name].dtype} {list(planned[name].shape)}" if name in planned else "nothing"
            raise CheckFailed(
                f"llm-compressor saved {name} as {info.dtype} {list(info.shape)}, but the plan has {what}."
            )
    for name, origin in plan.origins.items():
        if name not in written.files:
            if origin.source in plan.selection.unused or plan.selection.roles[origin.source] is Role.HEAD:
                continue
            raise CheckFailed(f"llm-compressor did not save {name}.")
        if origin.is_copy and not _same_bytes(plan.source, written, name):
            raise CheckFailed(f"llm-compressor saved {name}, but its values differ from the source's.")
        if origin.part in GLOBAL_SCALES:
            value = float(written.read(name))
            if not (math.isfinite(value) and value > 0):
                raise CheckFailed(f"llm-compressor saved {name} as {value!r}, which is not a scale.")


def _same_bytes(source: Checkpoint, written: Checkpoint, name: str) -> bool:
    ours, theirs = (checkpoint.read(name).flatten().view(torch.uint8) for checkpoint in (source, written))
    return torch.equal(ours, theirs)


def _flushed_blocks(plan: Plan, written: Checkpoint) -> int:
    """Blocks that Marlin would serve as zeros. See `format.marlin`."""
    total = 0
    for group in plan.groups:
        if not plan.matrices[group.members[0]].scheme.has_block_scales:
            continue
        names = (matrix_entries(plan.matrices[member], plan.layout)["scales"].name for member in group.members)
        histograms = [scale_histogram(written.read(name)) for name in names]
        total += count_flushed_blocks(torch.stack(histograms).sum(0))
    return total
