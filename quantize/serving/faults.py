"""Known faults of vLLM, as data: by version, GPU and checkpoint, and by the error of a failed start.

An issue or PR without a repository is of vllm-project/vllm. "Seen" means seen in a real start of vLLM 0.24.0 or 0.32.0.
All other bounds of versions come from the dates of reports and fixes, and may be off by a release.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Capability = tuple[int, int]


@dataclass(frozen=True)
class Situation:
    """The checkpoint, the machine and the settings of a server. Unknown facts are None or empty.

    Attributes:
        vllm: version.
        capability: compute capability of the GPU. None for a CPU too.
        is_cpu: whether the server computes on a CPU.
        model_type: of config.json, the text model's where there are several.
        layout: of the checkpoint, as in `quant_method`.
        arithmetics: that its layers are made for, `w4a4` or `weight_only`.
        is_tied: whether the head is the embedding.
        has_experts: whether there are experts.
        kv_cache_dtype: vLLM's name.
        columns_per_rank: of the inputs of its quantized layers, split over the ranks.
        kernel: vLLM's class, once the server reported it.
    """

    vllm: str | None = None
    capability: Capability | None = None
    is_cpu: bool = False
    model_type: str = ""
    layout: str = ""
    arithmetics: frozenset[str] = frozenset()
    is_tied: bool = False
    has_experts: bool = False
    kv_cache_dtype: str = "auto"
    columns_per_rank: frozenset[int] = frozenset()
    kernel: str | None = None

    @property
    def is_blackwell(self) -> bool:
        """Whether the GPU has FP4 units."""
        return self.capability is not None and self.capability[0] >= 10

    @property
    def is_consumer_blackwell(self) -> bool:
        """Compute capability 12.x: RTX 50, RTX PRO 6000, GB10."""
        return self.capability is not None and self.capability[0] == 12

    @property
    def is_gemma4(self) -> bool:
        """Any Gemma 4, complete or text alone."""
        return self.model_type.startswith("gemma4")

    @property
    def has_fp8_kv_cache(self) -> bool:
        """Whether it was requested by name."""
        return self.kv_cache_dtype.startswith("fp8")


@dataclass(frozen=True)
class KnownFault:
    """A fault of some versions on some machines.

    Attributes:
        hint: the fault, and the way around it.
        source: the place that reports it.
        applies: to everything except the version.
        fixed_in: the first version known to be without it. None where none is known.
        since: the first version known to have it.
    """

    hint: str
    source: str
    applies: Callable[[Situation], bool]
    fixed_in: str | None = None
    since: str | None = None


KNOWN_FAULTS: tuple[KnownFault, ...] = (
    KnownFault(
        "tied models in the modelopt layout do not start with vLLM 0.24: use `nvquant relayout` to compressed-tensors",
        "issue 48238",
        lambda s: s.is_tied and s.layout == "modelopt",
        since="0.24.0",
        fixed_in="0.32.0",
    ),
    KnownFault(
        "dense NVFP4 gives garbage on compute capability 12.x where a rank's columns are not a multiple of 32: use "
        "fewer ranks, --vllm-flag=--linear-backend=marlin, or --vllm-flag=--enforce-eager",
        "issue 48898 (0.25.1), PR 48965",
        lambda s: s.is_consumer_blackwell and any(columns % 32 for columns in s.columns_per_rank),
    ),
    KnownFault(
        "on compute capability 12.x this version prefers a weight-only kernel to the native ones, which slows "
        "prefill: use --vllm-flag=--linear-backend=flashinfer_cutlass",
        "issue 55397",
        lambda s: s.is_consumer_blackwell and "w4a4" in s.arithmetics,
        since="0.26.0",
        fixed_in="0.32.0",
    ),
    KnownFault(
        "on compute capability 12.x vLLM may fail with cudaErrorIllegalInstruction because it wrongly expects CUTLASS "
        "FP4: use a newer vLLM",
        "PR 38423",
        lambda s: s.is_consumer_blackwell,
        fixed_in="0.19.0",
    ),
    KnownFault(
        "vLLM may report that this GPU has no native support for FP4: it has, but only W4A4 checkpoints use it",
        "issues 27471 and 47749, PRs 48199 and 56603",
        lambda s: s.is_blackwell and s.arithmetics == {"weight_only"},
    ),
    KnownFault(
        "Gemma 4 with an FP8 KV cache may choose FLASH_ATTN on Blackwell and fail at the first request: use "
        "--vllm-flag=--attention-backend=TRITON_ATTN",
        "issue 51828, PR 52980",
        lambda s: s.is_gemma4 and s.is_blackwell and s.has_fp8_kv_cache,
        fixed_in="0.32.0",
    ),
    KnownFault(
        "the attention kernel for Gemma 4 with an FP8 KV cache on Hopper differs between versions: compare once with "
        "--vllm-flag=--attention-backend=TRITON_ATTN",
        "PRs 48666, 52987, 53175",
        lambda s: s.is_gemma4 and s.capability == (9, 0) and s.has_fp8_kv_cache,
    ),
    KnownFault(
        "Gemma 4 is slow in this version because all its layers use the Triton attention kernel: use a newer vLLM",
        "issue 38887, PR 38891",
        lambda s: s.is_gemma4 and not s.is_cpu,
        fixed_in="0.20.0",
    ),
    KnownFault(
        "an NVFP4 KV cache gives garbage for Gemma 4 on compute capability 12.x: use --kv-cache-dtype fp8",
        "PR 46329",
        lambda s: s.is_gemma4 and s.is_consumer_blackwell and "nvfp4" in s.kv_cache_dtype,
    ),
    KnownFault(
        "quantized experts give wrong results on compute capability 12.x with the native kernels: use the Marlin "
        "backend for experts",
        "NVIDIA/cutlass 3096, flashinfer-ai/flashinfer 2723",
        lambda s: s.is_consumer_blackwell and s.has_experts,
    ),
    KnownFault(
        "this release is older than all that nvquant was tested with: use a newer vLLM",
        "seen: 0.24.0, 0.32.0",
        lambda s: True,
        fixed_in="0.24.0",
    ),
)


def known_faults(situation: Situation) -> list[KnownFault]:
    """The faults that may occur in a situation. For an unknown version, only those without a fixed version."""
    return [
        fault for fault in KNOWN_FAULTS if fault.applies(situation) and _concerns(fault, version_key(situation.vllm))
    ]


def _concerns(fault: KnownFault, version: tuple[int, ...] | None) -> bool:
    if version is None:
        return fault.fixed_in is None and fault.since is None
    since, fixed = version_key(fault.since), version_key(fault.fixed_in)
    return (since is None or version >= since) and (fixed is None or version < fixed)


def version_key(version: str | None) -> tuple[int, ...] | None:
    """The numbers of a version for comparisons, such as (0, 32, 0) for `0.32.0+cpu`. None where there are none."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", version or "")
    return tuple(int(part) for part in match[1].split(".")) if match else None


@dataclass(frozen=True)
class StartFailure:
    """The error of a failed start, and the way out.

    Attributes:
        pattern: found in the root cause, or anywhere in the log.
        hint: one sentence without a full stop.
        source: the place that reports it, or the version in which it was seen.
    """

    pattern: str
    hint: str
    source: str


# The first that matches counts, so the special ones stand before the general ones.
START_FAILURES: tuple[StartFailure, ...] = (
    StartFailure(
        r"Failed to find a kernel that can implement the NVFP4 linear layer\. Reasons:\s*$",
        "the CPU build of vLLM has no NVFP4 kernel of its own: install integrations/vllm_cpu beside it, and check that "
        "VLLM_PLUGINS does not exclude it",
        "seen, 0.32.0",
    ),
    StartFailure(
        r"Failed to find a kernel that can implement the NVFP4 linear layer",
        "no kernel of this vLLM can compute NVFP4 here, for the reasons in its log: unset VLLM_DISABLED_KERNELS, "
        "drop --linear-backend, or use a build for this GPU",
        "model_executor/kernels/linear/__init__.py, 0.32.0",
    ),
    StartFailure(
        r"Forced NVFP4 kernel \w+ is not supported: Marlin FP4 not available",
        "a weight-only checkpoint requires Marlin (GPUs from Turing on), or on a CPU the plugin in "
        "integrations/vllm_cpu",
        "seen, 0.32.0",
    ),
    StartFailure(
        r"Found different quantization schemes for the shards of",
        "the ignore list names only some of q, k, v (or of gate, up): name all or none, and for Gemma 4, whose "
        "full-attention layers have no v_proj on disk, the absent v_proj too (`nvquant verify --stage structure` "
        "lists them)",
        "seen in 0.32.0, issue 47473, PR 47507",
    ),
    StartFailure(
        r"NotImplementedError in tie_weights",
        "tied models in the modelopt layout do not start with vLLM 0.24: use `nvquant relayout` for the other layout, "
        "or a newer vLLM",
        "issue 48238",
    ),
    StartFailure(
        r"'\w+Linear' object has no attribute 'data'",
        "the ignore list names a layer that is packed on disk: remove it from the list",
        "seen, 0.32.0",
    ),
    StartFailure(
        r"no module or parameter named '[^']*(input_scale|weight_scale|weight_packed|global_scale)",
        "a layer is quantized on disk, but vLLM builds it unquantized: leave it in BF16, or remove it from the ignore "
        "list",
        "PRs 45132 and 44571, vllm-project/llm-compressor 2714",
    ),
    StartFailure(
        r"no module or parameter named",
        "a layer is stored unquantized, or under a name that vLLM does not have: add it to the ignore list",
        "seen, 0.32.0",
    ),
    StartFailure(
        r"Following weights were not initialized from\s+checkpoint",
        "the checkpoint lacks these tensors: write or download it again",
        "seen, 0.32.0",
    ),
    StartFailure(
        r"start \(\d+\) \+ length \(\d+\) exceeds dimension size",
        "a tensor is smaller than its layer requires, often a weight_scale of another group size, or padded: store it "
        "as [rows, columns / 16]",
        "seen, 0.32.0",
    ),
    StartFailure(
        r"incomplete metadata|Error while deserializing header|InvalidHeader|MetadataIncomplete",
        "a shard is cut off: write or download it again (`nvquant verify --stage structure` names it)",
        "seen, 0.32.0",
    ),
    StartFailure(
        r"Tried to load weights of size|Attempted to load weight|shape mismatch|^AssertionError",
        "a tensor has another shape than its layer (`nvquant verify --stage structure` names it)",
        "model_executor/layers/linear.py, 0.32.0",
    ),
    StartFailure(
        r"No package metadata was found for vllm",
        "the vllm script of the CPU wheel cannot start: give the Python of its environment with --vllm instead",
        "seen, 0.32.0",
    ),
    StartFailure(
        r"No module named '?vllm",
        "this Python has no vLLM: name another with --vllm",
        "seen",
    ),
    StartFailure(
        r"operator torchvision::nms does not exist",
        "torchvision was built for another torch: uninstall it, or install the build that matches",
        "seen, 0.32.0",
    ),
    StartFailure(
        r"Currently supported kv cache quantization is num_bits=8",
        "the config requests a KV cache that vLLM does not support: use FP8 or none",
        "layers/quantization/compressed_tensors/compressed_tensors.py, 0.32.0",
    ),
    StartFailure(
        r"fp8_e5m2 kv-cache is not supported with fp8 checkpoints",
        "the checkpoint has scales for an FP8 KV cache: use --kv-cache-dtype fp8, which is E4M3",
        "layers/attention/attention.py, 0.32.0",
    ),
    StartFailure(
        r"Free memory on device .* is less than desired GPU memory utilization",
        "another program uses memory of this GPU: end it, or use --vllm-flag=--gpu-memory-utilization=0.8",
        "v1/worker/utils.py, 0.32.0",
    ),
    StartFailure(
        r"No available memory for the cache blocks",
        "the weights leave no room for a KV cache: use --vllm-flag=--gpu-memory-utilization=0.95, "
        "--vllm-flag=--language-model-only, or more GPUs with --tensor-parallel",
        "v1/core/kv_cache_utils.py, 0.32.0",
    ),
    StartFailure(
        r"KV cache is needed, which is larger than the available KV cache memory",
        "the context is too long for this memory: use a shorter --max-model-len, or --kv-cache-dtype fp8",
        "v1/core/kv_cache_utils.py, 0.32.0",
    ),
    StartFailure(
        r"is greater than the derived max_model_len",
        "the model does not support so long a context: use a shorter --max-model-len",
        "seen, 0.32.0",
    ),
    StartFailure(
        r"OutOfMemoryError|CUDA out of memory|Cannot allocate memory|\bMemoryError",
        "the server ran out of memory: use a shorter --max-model-len, --vllm-flag=--max-num-seqs=8, or more GPUs with "
        "--tensor-parallel",
        "issue 40291",
    ),
    StartFailure(
        r"size_n = \d+ is not divisible by tile_n_size",
        "a layer of the vision tower is quantized, which Marlin cannot compute: exclude the tower in the recipe",
        "NVIDIA/Model-Optimizer PR 1687",
    ),
    StartFailure(
        r"FlashAttention only support fp16 and bf16|No module named '?cutlass",
        "this build chose FlashAttention where it cannot run: use --vllm-flag=--attention-backend=TRITON_ATTN",
        "issue 51828, PR 52980, seen in 0.24.0",
    ),
    StartFailure(
        r"No supported CUDA architectures found for major versions \[12\]",
        "FlashInfer compiles for this GPU only with CUDA 12.9 or newer: update CUDA, or use "
        "--vllm-flag=--linear-backend=marlin",
        "FlashInfer's JIT",
    ),
    StartFailure(
        r"illegal instruction",
        "this build wrongly expects FP4 code for this GPU: use a newer vLLM",
        "PR 38423",
    ),
    StartFailure(
        r"AmbiguousGlobalPerLayerAttributeError",
        "transformers 5.14 and newer do not work with vLLM 0.24 for Gemma 4: use transformers 5.13.1, or a newer vLLM",
        "seen, 0.24.0",
    ),
    StartFailure(
        r"Address already in use",
        "another program took the port in the meantime: run the command again",
        "seen",
    ),
    StartFailure(
        r"unrecognized arguments|invalid choice|expected one argument|error: argument",
        "this vLLM does not know a flag: check --vllm-flag and the version",
        "seen, 0.32.0",
    ),
    StartFailure(
        r"does not match the quantization method specified|Quantization method specified in the model config",
        "drop --quantization from --vllm-flag: config.json sets the quantization method",
        "config/model.py, 0.32.0",
    ),
    StartFailure(
        r"Can't load tokenizer|Couldn't instantiate the backend tokenizer|not appear to have a file named tokenizer",
        "the checkpoint has no tokenizer that the server can load: copy the source's tokenizer files into its folder",
        "transformers",
    ),
    StartFailure(
        r"Killed|SIGKILL",
        "the system ended it, most likely because it ran out of memory: use a shorter --max-model-len, or a machine "
        "with more memory",
        "Linux's out-of-memory killer",
    ),
)


def hint_for(cause: str) -> StartFailure | None:
    """The known way out of a failed start, by its root cause."""
    return next((failure for failure in START_FAILURES if re.search(failure.pattern, cause)), None)


# Weight-only checkpoints in the modelopt layout, and weight-only experts: vLLM makes room for input scales, which none
# of them has, and its check for tensors that were not loaded then refuses every one. Seen in 0.32.0.
LOAD_CHECK_REFUSES_WEIGHT_ONLY = True
