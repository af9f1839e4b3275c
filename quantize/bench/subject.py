"""A checkpoint to serve: its memory, speed and known faults, from its headers and its config."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.config_values import config_int
from ..checkpoint.headers import TensorInfo
from ..checkpoint.source import Checkpoint, open_checkpoint
from ..errors import InputError
from ..format.layouts import LAYOUTS
from ..plan.ceiling import Ceiling, held_bytes, kv_bytes_per_value, read_bytes
from ..recipe.heads import is_tied
from ..recipe.roles import Role, role_of, text_config, unused_tensors
from ..serving.faults import Capability, Situation
from ..weights.stored import StoredMatrix, find_matrices, layouts_present

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")
_SPLIT_BY_COLUMNS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Subject:
    """A checkpoint folder in any format that vLLM serves, quantized or not."""

    checkpoint: Checkpoint

    @property
    def folder(self) -> Path:
        """Its path."""
        return self.checkpoint.folder

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return dict(self.checkpoint.config)

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """All tensors by name, without those that no layer reads."""
        infos = self.checkpoint.infos()
        unused = unused_tensors(self.config, infos)
        return {name: info for name, info in infos.items() if name not in unused}

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights as they are stored."""
        return held_bytes(self.config, self.infos.values())

    @property
    def decoded_bytes(self) -> int:
        """The same with NVFP4 decoded to 16 bits, as the plugin for the CPU stores it."""
        times = {
            matrix.parts["codes"].name: 16 // matrix.scheme.bits
            for matrix in self.matrices.values()
            if "codes" in matrix.parts and matrix.scheme.has_block_scales
        }
        return sum(info.nbytes * times.get(name, 1) for name, info in self.infos.items())

    @cached_property
    def layout(self) -> str:
        """Layout of the NVFP4 matrices. Empty where there are none."""
        counts = layouts_present(self.infos)
        return max(counts, key=lambda name: counts[name]) if counts else ""

    @cached_property
    def matrices(self) -> dict[str, StoredMatrix]:
        """The quantized matrices by module."""
        return find_matrices(self.infos, LAYOUTS[self.layout]) if self.layout else {}

    @property
    def scheme(self) -> str:
        """Its scheme, for a table: `NVFP4 W4A4`, `NVFP4 weight-only`, `BF16`, or the method in its config."""
        if self.matrices:
            return " + ".join(dict.fromkeys(matrix.scheme.words for matrix in self.matrices.values()))
        method = (self.config.get("quantization_config") or {}).get("quant_method")
        sizes: dict[str, int] = {}
        for info in self.infos.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        most = max(sizes, key=lambda dtype: sizes[dtype]) if sizes else ""
        return f"{most} ({method})" if method else most

    @property
    def longest_context(self) -> int | None:
        """Tokens of the longest sequence that the model supports."""
        return config_int(text_config(self.config), "max_position_embeddings") or None

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be turned into its token ids."""
        return any((self.folder / name).is_file() for name in TOKENIZER_FILES)

    def ceiling(self, kv_cache_dtype: str) -> Ceiling:
        """The bytes that decoding reads, under vLLM's name of a KV-cache dtype."""
        return Ceiling(self.config, self._read_bytes, kv_bytes_per_value(self.config, kv_cache_dtype))

    @cached_property
    def _read_bytes(self) -> int:
        return read_bytes(self.config, self.infos.values())

    def situation(
        self,
        vllm: str | None,
        capability: Capability | None,
        is_cpu: bool,
        kv_cache_dtype: str = "auto",
        tensor_parallel: int = 1,
    ) -> Situation:
        """The situation for looking up known faults of a vLLM of this version."""
        text = text_config(self.config)
        return Situation(
            vllm=vllm,
            capability=capability,
            is_cpu=is_cpu,
            model_type=str(text.get("model_type") or ""),
            layout=self.layout,
            arithmetics=frozenset(
                "w4a4" if matrix.has_input_scale else "weight_only"
                for matrix in self.matrices.values()
                if matrix.scheme.has_block_scales
            ),
            is_tied=is_tied(self.config),
            has_experts=any(role_of(name, info.shape) is Role.EXPERT for name, info in self.infos.items()),
            kv_cache_dtype=kv_cache_dtype,
            columns_per_rank=frozenset(
                matrix.cols // (tensor_parallel if module.endswith(_SPLIT_BY_COLUMNS) else 1)
                for module, matrix in self.matrices.items()
                if matrix.is_sound
            ),
        )


def open_subject(folder: Path) -> Subject:
    """Open a checkpoint folder and read its headers only.

    Raises:
        InputError: it is no folder with config.json and safetensors.
    """
    return Subject(open_checkpoint(folder))


def need_tokenizer(subject: Subject) -> None:
    """Refuse a folder without a tokenizer for prompts.

    Raises:
        InputError: it has no tokenizer.
    """
    if not subject.has_tokenizer:
        raise InputError(
            f"{subject.folder} has no tokenizer, but load generators send text",
            where=subject.folder,
            hint="copy the source's tokenizer files into it",
        )
