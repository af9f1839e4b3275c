"""Constants of the time forecast, each with its measurement.

A source is a file of benchmarks/results/ and an expression over its keys, which stand in braces. A test evaluates them
and compares the values with the files. If there are several, the value is their mean. All runs on a GPU used one
H200 with 16 cores, those on a CPU on two cores of a Xeon.
"""

from __future__ import annotations

from dataclasses import dataclass

_SLICE, _WHOLE = "gemma4_slice-h200.json", "served_31b-h200.json"  # 6 layers, 262,144 tokens; 60 layers, 8,192 tokens
_GPTQ = "gemma4_slice-gptq-h200.json"  # 6 layers, 131,072 tokens, two lanes
_HALF, _SMOLLM2 = "data_free-intel-xeon-2-cores.json", "smollm2_cpu-intel-xeon-2-cores.json"

MEASURED_GPU = "H200"


@dataclass(frozen=True)
class Measured:
    """A constant.

    Attributes:
        sources: file of benchmarks/results/ and expression over its keys.
    """

    value: float
    sources: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Rates:
    """The speed of a kind of machine.

    Attributes:
        flop: operations a second in a decoder layer's forward: matrix products, attention, and all that lies between.
        call_seconds: least seconds of one batch in one layer, whatever its tokens: Python and the launches of kernels.
        quantize: matrix elements a second, by quantizer.
        moment_flop: operations a second, of second moments of inputs: in BF16 with float32 sums on a GPU.
        solve_flop: operations a second in float32, of quantization with error feedback.
        read_bytes: a second, from the shards to the device with hashing, where the disk is faster.
        write_bytes: a second, of one of two threads that hash and write, where the disk is faster.
        copy_bytes: a second, of tensors that are copied unchanged.
        start_seconds: of the process before it converts: imports, the GPU's context, kernels.
        begin_seconds: before the first layer is read: headers, identity, locks.
        build_seconds: then, before the first layer is computed: the skeleton and the recorded calls.
    """

    flop: Measured
    call_seconds: Measured
    quantize: dict[str, Measured]
    moment_flop: Measured
    solve_flop: Measured
    read_bytes: Measured
    write_bytes: Measured
    copy_bytes: Measured
    start_seconds: Measured
    begin_seconds: Measured
    build_seconds: Measured


def _in_runs(file: str, expression: str, *runs: str) -> tuple[tuple[str, str], ...]:
    """An expression for several runs of a file. `RUN` stands for each run's key."""
    return tuple((file, expression.replace("RUN", run)) for run in runs)


_BY_QUANTIZER, _BY_RECIPE = ("runs.nvquant rtn", "runs.nvquant mse"), ("convert.nvfp4", "convert.nvfp4-full")
_START = "{RUN.wall_seconds} - {RUN.seconds}"
_BUILD = "{RUN.phases.build} + {RUN.phases.record}"
# What no phase of the main thread names.
_BEGIN = (
    "{RUN.seconds} - {RUN.phases.build} - {RUN.phases.record} - {RUN.phases.wait for read} - {RUN.phases.forward}"
    " - {RUN.phases.quantize} - {RUN.phases.wait for write} - {RUN.phases.finish}"
)

_CPU_FLOP = "1880736399360 / {RUN.phases.forward}"

# Without a stored run of gptq on a CPU, this is assumed: it rounds block after block at a sixth of the rate of large
# products.
ASSUMED_CPU_SOLVING = Measured(0.032e12, ())

# Literals in the expressions follow from the shapes: operations, elements of the quantized matrices, bytes outside of
# the decoder's layers. The forecast counts the same, and a test compares.
GPU_RATES = Rates(
    flop=Measured(
        406.8e12, _in_runs(_SLICE, "({work.matmul_flop} + 50596862230528) / {RUN.phases.forward}", *_BY_QUANTIZER)
    ),
    call_seconds=Measured(4.261e-3, _in_runs(_WHOLE, "{RUN.phases.forward} / (60 * 16)", *_BY_RECIPE)),
    quantize={
        "rtn": Measured(53.36e9, ((_SLICE, "2080899072 / {runs.nvquant rtn.phases.quantize}"),)),
        "mse": Measured(
            29.72e9,
            (
                (_WHOLE, "20808990720 / {convert.nvfp4.phases.quantize}"),
                (_WHOLE, "29286727680 / {convert.nvfp4-full.phases.quantize}"),
            ),
        ),
    },
    # The rest of the forward, after the passes of both lanes at the rate above.
    moment_flop=Measured(
        171.6e12,
        ((_GPTQ, "1110678542745600 / ({runs.nvquant gptq.phases.forward} - 4529375889374663 / 406.8e12)"),),
    ),
    solve_flop=Measured(27.39e12, ((_GPTQ, "225224361858382 / {runs.nvquant gptq.phases.quantize}"),)),
    read_bytes=Measured(3.126e9, _in_runs(_WHOLE, "{make.decoder_bytes} / {RUN.phases.read}", *_BY_RECIPE)),
    write_bytes=Measured(
        1.082e9, _in_runs(_WHOLE, "({RUN.tensor_bytes} - 2818583040) / {RUN.phases.write}", *_BY_RECIPE)
    ),
    copy_bytes=Measured(
        0.8487e9, _in_runs(_SLICE, "({work.source_bytes} - {work.decoder_bytes}) / {RUN.phases.copy}", *_BY_QUANTIZER)
    ),
    start_seconds=Measured(14.04, _in_runs(_SLICE, _START, *_BY_QUANTIZER) + _in_runs(_WHOLE, _START, *_BY_RECIPE)),
    begin_seconds=Measured(0.566, _in_runs(_SLICE, _BEGIN, *_BY_QUANTIZER) + _in_runs(_WHOLE, _BEGIN, *_BY_RECIPE)),
    build_seconds=Measured(0.473, _in_runs(_SLICE, _BUILD, *_BY_QUANTIZER) + _in_runs(_WHOLE, _BUILD, *_BY_RECIPE)),
)
CPU_RATES = Rates(
    flop=Measured(0.1922e12, _in_runs(_SMOLLM2, _CPU_FLOP, *_BY_QUANTIZER)),
    call_seconds=Measured(0.0, ()),
    quantize={
        "rtn": Measured(
            0.6002e9,
            (
                (_HALF, "14643363840 / {runs.nvquant rtn.phases.quantize}"),
                (_SMOLLM2, "106168320 / {runs.nvquant rtn.phases.quantize}"),
            ),
        ),
        "mse": Measured(
            0.2716e9,
            (
                (_HALF, "14643363840 / {runs.nvquant mse.phases.quantize}"),
                (_SMOLLM2, "106168320 / {runs.nvquant mse.phases.quantize}"),
            ),
        ),
    },
    moment_flop=Measured(0.1922e12, _in_runs(_SMOLLM2, _CPU_FLOP, *_BY_QUANTIZER)),  # the same products in float32
    solve_flop=ASSUMED_CPU_SOLVING,
    read_bytes=Measured(0.6708e9, _in_runs(_HALF, "{work.decoder_bytes} / {RUN.phases.read}", *_BY_QUANTIZER)),
    write_bytes=Measured(
        0.4575e9,
        _in_runs(
            _HALF,
            "({RUN.tensor_bytes} - {work.source_bytes} + {work.decoder_bytes}) / {RUN.phases.write}",
            *_BY_QUANTIZER,
        ),
    ),
    copy_bytes=Measured(0.4671e9, _in_runs(_SMOLLM2, "56624256 / {RUN.phases.copy}", *_BY_QUANTIZER)),
    start_seconds=Measured(3.005, _in_runs(_HALF, _START, *_BY_QUANTIZER) + _in_runs(_SMOLLM2, _START, *_BY_QUANTIZER)),
    begin_seconds=Measured(0.416, _in_runs(_SMOLLM2, _BEGIN, *_BY_QUANTIZER)),
    build_seconds=Measured(0.1275, _in_runs(_SMOLLM2, _BUILD, *_BY_QUANTIZER)),
)

# Bytes a second of the two disks that were measured: a RAM disk, and a cloud machine's disk with nothing in the cache.
RAM_READ = Measured(15.22e9, ((_SLICE, "{speeds.read GB/s} * 1e9"),))
RAM_WRITE = Measured(9.623e9, ((_SLICE, "{speeds.write GB/s} * 1e9"),))
NVME_READ = Measured(1.943e9, ((_HALF, "{speeds.read GB/s} * 1e9"),))
NVME_WRITE = Measured(1.457e9, ((_HALF, "{speeds.write GB/s} * 1e9"),))
