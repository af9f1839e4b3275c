"""NVFP4 experts of a mixture that decode their weights when they are loaded, and multiply in the model's own dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import modular_kernel as modular
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation_supported
from vllm.model_executor.layers.fused_moe.oracle import nvfp4 as oracle
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    dequantize_to_dtype,
    ref_nvfp4_quant_dequant,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static

from .kernels import BLOCK_COLUMNS


class CpuNvFp4WeightOnlyExperts(modular.FusedMoEExpertsModular):
    """W4A16: decoded weights, untouched inputs. One expert after the other, each on its tokens."""

    schemes = (kNvfp4Static, None)

    @staticmethod
    def activation_format() -> modular.FusedMoEActivationFormat:
        """Tokens as they come, [tokens, hidden size]."""
        return modular.FusedMoEActivationFormat.Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        """`apply` rounds the inputs itself."""
        return True

    @staticmethod
    def _supports_current_device() -> bool:
        return True  # `install` registers the class on a CPU only

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @classmethod
    def _supports_quant_scheme(cls, weight_key: Any, activation_key: Any) -> bool:
        return (weight_key, activation_key) == cls.schemes

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return bool(apply_moe_activation_supported(activation))

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return not moe_parallel_config.use_all2all_kernels

    def finalize_weight_and_reduce_impl(self) -> Any:
        """`apply` has weighted and added the experts' outputs."""
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(self, M: int, N: int, K: int, *_: Any, **_more: Any) -> tuple[tuple[int, ...], ...]:  # noqa: N803
        """No workspace, and an output of [tokens, hidden size]."""
        return (0,), (0,), (M, K)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the packed weights, uint8 [experts, rows, columns / 2], by their values in the model's dtype.

        Both layouts have the same names by then: `w13_weight_scale_2` is the multiplier of all rows of an expert.
        """
        for name in ("w13", "w2"):
            packed, scales = getattr(layer, f"{name}_weight").data, getattr(layer, f"{name}_weight_scale").data
            multipliers = getattr(layer, f"{name}_weight_scale_2").data
            values = [
                dequantize_to_dtype(*of_expert, layer.params_dtype, BLOCK_COLUMNS, swizzle=False)
                for of_expert in zip(packed, scales, multipliers, strict=True)
            ]
            setattr(layer, f"{name}_weight", torch.nn.Parameter(torch.stack(values), requires_grad=False))

    def round_inputs(self, inputs: torch.Tensor, number: int) -> torch.Tensor:
        """The inputs of the first (1) or second (2) product, [tokens, columns], as they are multiplied."""
        return inputs

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Add each expert's output for its tokens, times the router's weight, to `output`, [tokens, hidden size]."""
        total = torch.zeros(hidden_states.shape, dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            place = expert if expert_map is None else int(expert_map[expert])
            if place < 0:
                continue
            token, choice = (topk_ids == expert).nonzero(as_tuple=True)
            weight = topk_weights[token, choice].unsqueeze(1)
            inputs = hidden_states[token]
            if apply_router_weight_on_input:
                inputs = inputs * weight.to(inputs.dtype)
            gated = torch.nn.functional.linear(self.round_inputs(inputs, 1), w1[place])
            inner = gated.new_empty(len(token), self.adjust_N_for_activation(gated.shape[1], activation))
            self.activation(activation, inner, gated)
            made = torch.nn.functional.linear(self.round_inputs(inner, 2), w2[place])
            total.index_add_(0, token, made.float() if apply_router_weight_on_input else made.float() * weight.float())
        output.copy_(total)


class CpuNvFp4Experts(CpuNvFp4WeightOnlyExperts):
    """W4A4: decoded weights, inputs quantized and dequantized as vLLM's emulation kernel does it."""

    schemes = (kNvfp4Static, kNvfp4Dynamic)

    def round_inputs(self, inputs: torch.Tensor, number: int) -> torch.Tensor:
        """See the class above. The scales are those of the whole layer."""
        scale = self.a1_gscale if number == 1 else self.a2_gscale
        return ref_nvfp4_quant_dequant(inputs, scale, BLOCK_COLUMNS)


def install() -> None:
    """Make vLLM choose these experts on a CPU; calling it again changes nothing."""
    known: Callable[[Any], list[type]] = oracle.backend_to_kernel_cls
    if getattr(known, "has_cpu_experts", False):
        return

    def backend_to_kernel_cls(backend: Any) -> list[type]:
        # Of vLLM's backends, this one alone leaves weights and their scales as they are stored.
        if backend == oracle.NvFp4MoeBackend.EMULATION:
            return [CpuNvFp4Experts, CpuNvFp4WeightOnlyExperts]
        return known(backend)

    backend_to_kernel_cls.has_cpu_experts = True  # type: ignore[attr-defined]
    oracle.backend_to_kernel_cls = backend_to_kernel_cls
