"""Tiny configurations of any architecture that transformers knows, by the names of their keys.

`tiny_configs` takes the defaults of a configuration class and makes every size small: widths, heads, layers, experts,
vocabularies, images. Nothing here knows an architecture. Sizes are multiples of 16, as NVFP4 requires, and agree with
each other because keys of a kind get one value everywhere.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

WIDTH, HEADS, KEY_VALUE_HEADS, LAYERS, VOCABULARY = 64, 4, 2, 4, 512
HEAD_SIZE = WIDTH // HEADS
# The first pattern that matches a key's name gives its value. A value of 0, None or False stays, because it switches
# a part off.
_SIZES: tuple[tuple[str, int | None], ...] = (
    (r"(^|_)vocab_size(_per_layer_input)?$|^vocab_size_", VOCABULARY),
    (r"^(altup_num_inputs|num_mtp_modules|num_nextn_predict_layers|n_ctx_|num_labels|_)", None),
    (r"^num_kv_shared_layers$", 1),
    (r"^(num_experts_per_tok|top_k_experts|moe_topk|moe_top_k|experts_per_token|num_experts_per_token|moe_k)$", 2),
    (r"^(num_selected_experts|router_topk|expert_topk)$", 2),
    (r"^(n_group|topk_group|num_expert_group|num_expert_groups|topk_groups|n_groups|mamba_n_groups|ssm_n_groups)$", 1),
    (r"^(num_shared_experts|n_shared_experts|moe_num_shared_experts|num_shared_expert)$", 1),
    (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts|n_experts|moe_num_experts"
     r"|zero_expert_num|num_zero_experts)$", 4),
    (r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index|n_dense_layers)$", 1),
    (r"^(expert|attn|moe)_layer_(offset|period)$|^moe_layer_freq$|^(decoder_sparse_step|moe_layer_interval)$", None),
    (r"^(q_lora_rank|kv_lora_rank|o_lora_rank|attention_rank|low_rank_dim|.*lora_rank|.*_lora_r|lora_r|.*_rank)$", 32),
    (r"^rotary_dim$|^rotary_pct_dim$", HEAD_SIZE // 2),
    (r"^o_groups$", 2),
    (r"^qk_head_dim$", 2 * HEAD_SIZE),
    (r"^(qk_rope_head_dim|qk_nope_head_dim|v_head_dim|rope_head_dim|nope_head_dim)$", HEAD_SIZE),
    (r"^(num_|n_|mamba_num_|mamba_n_|linear_num_|swa_|ssm_num_|.*_)?(key_value|kv|k|v)_heads$", KEY_VALUE_HEADS),
    (r"^num_kv_heads$|^n_head_kv$|^multi_query_group_num$|num_key_value_heads$", KEY_VALUE_HEADS),
    (r"^linear_num_(key|value)_heads$", KEY_VALUE_HEADS),
    (r"^(mamba_n_heads|mamba_num_heads)$|^num_heads$", 8),
    (r"^mamba_d_ssm$", 2 * WIDTH),
    (r"heads$|^n_head$", HEADS),
    (r"head_dim(_k|_v)?$|^head_size$|^d_kv$|_d_head$|^d_head$|^attention_head_size$|^kv_channels$", HEAD_SIZE),
    (r"^(chunk_size|mamba_chunk_size|d_state|mamba_d_state|ssm_state_size|state_size|index_topk|time_step_rank)$", 16),
    (r"^(d_conv|mamba_d_conv|conv_kernel|conv_kernel_size|linear_conv_kernel_dim|conv_L_cache|conv1d_width)$", None),
    (r"^(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|depth|num_blocks)$", LAYERS),
    (r"layers$|^depth$|_depth$", LAYERS),
    (r"^(image_size|img_size|input_size|crop_size|vision_image_size)$", 32),
    (r"^(patch_size|vision_patch_size)$", 8),
    (r"^(sliding_window|attention_window|local_window|window_size|local_attention_window|attention_chunk_size)$", 16),
    (r"^(max_position_embeddings|n_positions|seq_length|max_seq_len|max_sequence_length|max_seq_length|n_ctx"
     r"|context_length|max_source_positions|max_target_positions|original_max_position_embeddings)$", 256),
    (r"intermediate|ffn_dim|ffn_hidden|_inner|^d_ff|^n_inner$|ffn_size|mlp_dim|inner_dim|expert_dim", 2 * WIDTH),
    (r"hidden_size|^d_model$|^n_embd$|embed_dim|^dim$|hidden_dim|embedding_size|_width$|^width$|d_model|lru_width"
     r"|^emb_dim$|projection_dim|^proj_dim$|proj_dim$|output_dim|output_size|cross_attention_dim|.*_embd$", WIDTH),
)  # fmt: skip
_IDS = re.compile(r"_token_(id|index)$|_tokens?_ids?$|token_id$|_token_idx$")
_FILLED = frozenset(
    {"head_dim", "num_key_value_heads", "num_attention_heads", "intermediate_size", "moe_intermediate_size",
     "hidden_size", "num_experts", "n_routed_experts", "num_shared_experts", "n_shared_experts", "num_experts_per_tok",
     "top_k_experts", "n_group", "topk_group"}
)  # fmt: skip
_SECTIONS = ([4, 2, 2], [2, 1, 1])  # of the rotated half of a head, or of half of it
_DERIVED = ("id2label", "label2id", "architectures", "torch_dtype", "dtype", "quantization_config")
_DERIVED += ("transformers_version", "output_attentions")
_MIXED = ["sliding_attention", "full_attention"] * 2
_ROPE: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_THREE = {**_ROPE, "mrope_section": [3, 3, 2]}
# Values by model type for classes whose own defaults cannot be built.
_OWN: Mapping[str, Mapping[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 500}},
    "cohere_compass_text": {"layer_types": _MIXED, "rope_parameters": dict.fromkeys(_MIXED, _THREE)},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 501, "<image>": 500}},
    "ernie4_5_vl_moe_text": {"rope_parameters": _THREE},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "falcon_h1": {"mamba_d_head": 16},
    "mistral4": {"head_dim": 32, "rope_parameters": None},
    "qwen4_exp_text": {
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32]},
    "step3p7_text": {"sliding_window": 16},
    "step3p5": {"sliding_window": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"attention_head_dim": 32, "attention_hidden_size": 128, "mamba_headdim": 32, "n_mamba_heads": 4},
}


def tiny_configs(config_class: Any) -> Iterator[Any]:
    """Small configurations of a class, the most likely first. A class takes the first that it can build.

    Raises:
        Exception: the class raises what it likes where its defaults do not suit it.
    """
    refusals = []
    for fills, heads, sections in itertools.product((False, True), (KEY_VALUE_HEADS, HEADS), _SECTIONS):
        try:
            values = copy.deepcopy(config_class().to_dict())
            yield config_class.from_dict(_Shrinking(heads, fills, sections).shrunk(values))
        except GeneratorExit:
            raise
        except Exception as error:  # each class raises what it likes
            refusals.append(error)
    if len(refusals) == 4 * len(_SECTIONS):
        raise refusals[0]


def _layers_of(values: Mapping[str, Any]) -> int | None:
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"):
        if isinstance(values.get(key), int):
            return int(values[key])
    return None


class _Shrinking:
    """One way to make a configuration small.

    Args:
        heads: of keys and values.
        fills: whether to set sizes that are None by default.
        sections: of a rotary table of several positions.
    """

    def __init__(self, heads: int, fills: bool, sections: list[int]) -> None:
        self._heads, self._fills, self._sections, self._ids = heads, fills, sections, 0

    def shrunk(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Small values of a configuration and of those in it."""
        layers = _layers_of(values)
        places = _places(values, layers)
        result: dict[str, Any] = {}
        for key, value in values.items():
            if key in _DERIVED or key.startswith("_"):
                continue
            if isinstance(value, dict) and value and all(str(one).isdecimal() for one in value):
                result[key] = {
                    places.index(int(at)): self.shrunk(one) for at, one in value.items() if int(at) in places
                }
            elif isinstance(value, dict) and ("model_type" in value or key.endswith("_config")):
                result[key] = self.shrunk(value)
            elif isinstance(value, dict):
                result[key] = {name: self._small(name, one) for name, one in value.items()}
                if key in ("rope_parameters", "rope_scaling") and self._fills:
                    result[key].setdefault("mrope_section", self._sections)
            elif isinstance(value, list) and len(value) == layers and places:
                result[key] = [self._small(key, value[at]) for at in places]
            elif _IDS.search(key) and value is not None:
                result[key] = self._id(value)
            else:
                result[key] = self._small(key, value)
        return {**result, **_OWN.get(str(values.get("model_type")), {})}

    def _id(self, value: Any) -> Any:
        """Special ids at the end of the vocabulary, unless they are at its beginning, so that short ids of a text meet
        none of them."""
        if isinstance(value, int) and 0 <= value < 4:
            return value
        self._ids += 1
        made = VOCABULARY - self._ids
        return [made] if isinstance(value, list) else made

    def _small(self, key: str, value: Any) -> Any:
        if value is None and self._fills and key in _FILLED:
            return self._size(key)
        if isinstance(value, bool) or not value:
            return value
        if key == "mrope_section":
            return self._sections
        if isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value):
            return [self._small(key, one) for one in value]
        if not isinstance(value, int):
            return value
        small = self._size(key)
        return value if small is None else min(value, small) if small != LAYERS else small

    def _size(self, key: str) -> int | None:
        small = next((small for pattern, small in _SIZES if re.search(pattern, key)), None)
        return self._heads if small == KEY_VALUE_HEADS and "heads" in key else small


def _places(values: Mapping[str, Any], layers: int | None) -> list[int]:
    """The layers that are kept: as many of each kind as there is room for, in their order."""
    if layers is None:
        return []
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == layers]
    own = [key for value in values.values() if isinstance(value, dict) for key in value if str(key).isdecimal()]
    kinds = [repr([*(one[at] for one in lists), at in map(int, own)]) for at in range(layers)]
    # The first of each kind, then the second of each, and so on.
    order = sorted(range(layers), key=lambda at: (kinds[:at].count(kinds[at]), at))
    return sorted(order[:LAYERS])
