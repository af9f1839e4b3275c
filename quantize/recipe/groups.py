"""Fused groups: matrices that servers join into one and that must therefore share their global scales.

The table was read from vLLM 0.32.0: `packed_modules_mapping`, `stacked_params_mapping` and `orig_to_new_stacked` of
every file in vllm/model_executor/models and vllm/models, and the merged layers of vllm/model_executor/layers/mamba.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fusion:
    """A linear layer that servers build of several stored matrices with one parent.

    Attributes:
        name: the last part of the server's name for the module.
        members: last parts of the stored names, in the order in which they are fused.
        beside: last parts that must all stand beside a member.
        apart: last parts of which none may stand beside a member.
        parent: the last part of the parent's name, or an empty text for any.
        models: beginnings of the architectures that fuse so. If empty, all architectures do.
        other_models: beginnings of the architectures that do not.
    """

    name: str
    members: tuple[str, ...]
    beside: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()
    parent: str = ""
    models: tuple[str, ...] = ()
    other_models: tuple[str, ...] = ()


_QKV = ("q_proj", "k_proj", "v_proj")
# The first row that fits counts, so rows for certain models and longer rows stand first. Where vLLM fuses in one class
# and not in another, and no name tells them apart, the row holds: matrices that share a scale are right for both.
FUSIONS: tuple[Fusion, ...] = (
    # Kimi's delta attention: kimi_gdn_linear_attn.py, kimi_k3/nvidia/model.py; glm5next/common/kda.py.
    Fusion(
        "in_proj_qkvbfg_a",
        (*_QKV, "b_proj", "f_a_proj", "g_a_proj"),
        frozenset({"b_proj", "f_a_proj"}),
        models=("Glm5Next", "GlmNext"),
    ),
    Fusion(
        "in_proj_qkvgfab",
        (*_QKV, "g_proj", "f_a_proj", "b_proj"),
        frozenset({"b_proj", "f_a_proj", "g_proj"}),
    ),
    Fusion("in_proj_qkvgfab", (*_QKV, "b_proj", "f_a_proj"), frozenset({"b_proj", "f_a_proj"})),
    Fusion("in_proj_qkvg", (*_QKV, "g_proj"), frozenset({"g_proj"}), parent="linear_attn"),  # olmo_hybrid.py
    Fusion("qkvb_proj", (*_QKV, "b_proj"), frozenset({"b_proj"}), models=("BailingMoeV3",)),
    Fusion("qk_proj", ("q_proj", "k_proj"), models=("K2Horizon",)),
    # minimax_m3: the indexer's queries and keys are rows of the same matrix.
    Fusion(
        "qkv_proj",
        (*_QKV, "index_q_proj", "index_k_proj"),
        frozenset({"index_q_proj", "index_k_proj"}),
    ),
    # Latent attention without a low rank for queries has a q_proj of its own (DeepSeek V2 Lite).
    Fusion("qkv_proj", _QKV, apart=frozenset({"kv_a_proj_with_mqa"}), other_models=("K2Horizon",)),
    Fusion("gate_up_proj", ("gate_proj", "up_proj")),
    # Gated delta nets: qwen3_5.py. Qwen3-Next stores in_proj_qkvz and in_proj_ba whole.
    Fusion("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    Fusion("in_proj_ba", ("in_proj_b", "in_proj_a")),
    # Latent attention: deepseek_v2.py, openpangu.py, bailing_moe_v3.py, hy_v4, glm5next; kimi_k3/nvidia/mla.py.
    Fusion(
        "fused_qkv_a_g_proj",
        ("q_a_proj", "kv_a_proj_with_mqa", "g_proj"),
        frozenset({"g_proj"}),
        models=("KimiK3",),
    ),
    Fusion("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa"), other_models=("MiniCPM3", "SarvamMLA")),
    Fusion("fused_wqa_wkv", ("wq_a", "wkv")),  # deepseek_v4
    Fusion("qkvr", ("wq_du", "wk_dv", "wv_dv", "wr_du")),  # inkling
    Fusion("w13", ("w1", "w3"), models=("Lfm2",)),
    Fusion("gate_up_proj", ("w1", "w3")),  # internlm2.py, deepseek_v4, pixtral.py; experts of mixtral.py
    Fusion("gate_up_proj", ("c_fc_0", "c_fc_1")),  # exaone.py
    Fusion("gate_up_proj", ("fc12", "fc11")),  # bert_with_rope.py
    Fusion("qkv_proj", ("query", "key", "value")),  # bert.py, roberta.py, telechat2.py
    Fusion("qkv_proj", ("wq", "wk", "wv")),  # pixtral.py, molmo2.py
    Fusion("qkv_proj", ("linear_q", "linear_k", "linear_v")),  # funasr.py
    Fusion("qkv_proj", ("to_q", "to_k", "to_v")),  # cosmos3.py
    Fusion("qkv_proj", ("query_net", "key_net", "value_net")),  # cohere_asr.py
    Fusion("kv_proj", ("key_proj", "value_proj")),  # qwen4_exp
    Fusion("fc13", ("fc1", "fc3")),  # aimv2.py, dots_ocr.py
    # Built without quantization; sparse attention's indexer and compressor.
    Fusion("wk_weights_proj", ("wk", "weights_proj")),
    Fusion("fused_wkv_wgate", ("wkv", "wgate")),
)


@dataclass(frozen=True)
class FusedGroup:
    """Matrices that share one weight global scale and one input global scale.

    Attributes:
        name: vLLM's name of the fused module (`model.layers.0.mlp.gate_up_proj`). A matrix that stands alone has its
            own name.
        members: module names, in the order in which they are fused.
    """

    name: str
    members: tuple[str, ...]


class Fusions:
    """The fused groups of a model in servers, from the names of all its modules.

    A matrix is fused where another member stands beside it, in its own layer or under the same path of another layer: a
    full-attention layer of Gemma 4 has no v_proj, and layers that share keys and values may store a q_proj alone.

    Args:
        modules: all modules of the model that own a weight, quantized or not.
        config: config.json. Some rows of the table apply only to some architectures.
    """

    def __init__(self, modules: Iterable[str], config: Mapping[str, Any]) -> None:
        architectures = config.get("architectures")
        first = architectures[0] if isinstance(architectures, (list, tuple)) and architectures else ""
        self._architecture = str(first)
        self._layers: dict[str, set[str]] = {}
        self._paths: dict[str, set[str]] = {}
        self._found: dict[str, Fusion | None] = {}
        for module in modules:
            parent, _, leaf = module.rpartition(".")
            self._layers.setdefault(parent, set()).add(leaf)
            self._paths.setdefault(_path(parent), set()).add(leaf)

    def fusion(self, module: str) -> Fusion | None:
        """The fusion of a module, or None if it stands alone."""
        if module not in self._found:
            self._found[module] = self._find(module)
        return self._found[module]

    def _find(self, module: str) -> Fusion | None:
        parent, _, leaf = module.rpartition(".")
        beside = self._layers.get(parent, set())
        around = self._paths.get(_path(parent), set())
        for fusion in FUSIONS:
            if leaf not in fusion.members or not parent or not fusion.beside <= beside or fusion.apart & beside:
                continue
            if fusion.parent and parent.rpartition(".")[2] != fusion.parent:
                continue
            if fusion.models and not self._architecture.startswith(fusion.models):
                continue
            if fusion.other_models and self._architecture.startswith(fusion.other_models):
                continue
            if len(around.intersection(fusion.members)) > 1:
                return fusion
        return None

    def name(self, module: str) -> str:
        """The name of the layer that servers build of a module: the fused name, or its own name if it stands alone."""
        fusion = self.fusion(module)
        return module if fusion is None else f"{module.rpartition('.')[0]}.{fusion.name}"

    def members(self, module: str) -> tuple[str, ...]:
        """Last parts of the names that make up a module's fused layer, stored or not, or nothing if it stands alone."""
        fusion = self.fusion(module)
        return () if fusion is None else fusion.members

    def groups(self, modules: Iterable[str]) -> tuple[FusedGroup, ...]:
        """Group modules, in the order of first appearance. A member that the model lacks (v_proj where K is V) is not
        invented."""
        groups: dict[str, list[str]] = {}
        for module in modules:
            groups.setdefault(self.name(module), []).append(module)
        return tuple(
            FusedGroup(name, tuple(sorted(group, key=self._rank))) for name, group in groups.items()
        )  # fmt: skip

    def _rank(self, module: str) -> int:
        leaf, members = module.rpartition(".")[2], self.members(module)
        return members.index(leaf) if leaf in members else 0


def members_called(name: str) -> tuple[str, ...]:
    """Last parts that make up a fused layer by its name alone, in most models. It may be empty."""
    return next((fusion.members for fusion in FUSIONS if fusion.name == name and not fusion.beside), ())


def _path(parent: str) -> str:
    """A parent's name with its layer's, or expert's, number left open."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", parent)
