"""Taps hand over what passes their sites, once, and leave the model as it is."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import transformers
from nvquant.calibrate.statistics.key_value import KeyValueAmax
from nvquant.calibrate.taps import KeyValueTap, LinearTap, Taps
from support.conversions import TinyModels, experts_in_bf16, planned, random_samples
from torch import Tensor, nn

SITES = {"qk": ["q", "k"], "o": ["o"]}


class Layer(nn.Module):
    """q and k share an input, unless `apart` has another one for k."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.o = (nn.Linear(16, 16) for _ in range(3))
        self.apart: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        one = self.q(x) + self.k(x if self.apart is None else self.apart)
        result: Tensor = self.o(one)
        return result


class Seen:
    """A handle that keeps what it receives, and replaces it by the double where the site is one of `doubled`."""

    def __init__(self, *doubled: str) -> None:
        self.doubled = doubled
        self.inputs: list[tuple[str, Tensor]] = []

    def __call__(self, site: str, inputs: Tensor) -> Tensor | None:
        self.inputs.append((site, inputs))
        return 2 * inputs if site in self.doubled else None

    @property
    def sites(self) -> list[str]:
        return [site for site, _ in self.inputs]


def hooks_of(module: nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in module.modules())


@pytest.mark.parametrize("name", ["gemma4", "gemma4_e2b", "gemma4_moe", "llama"])
def test_an_observing_handle_sees_every_input_once_and_changes_no_logit(tiny: TinyModels, name: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32).eval()
    recipe: Any = experts_in_bf16("nvfp4-full") if name == "gemma4_moe" else "nvfp4-full"
    plan = planned(tiny(name), recipe)
    ids = random_samples((24,))[0].unsqueeze(0)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        hooked: dict[str, Tensor] = {}
        seen = Seen()
        taps = []
        for number, layer in enumerate(model.get_decoder().layers):
            prefix = f"{plan.prefix}.{number}."
            groups = [group for group in plan.groups if group.name.startswith(prefix)]
            tap = LinearTap.of_groups(groups, prefix).on(layer, seen)
            tap.__enter__()
            taps.append(tap)
            for group in groups:
                linear = layer.get_submodule(group.members[0].removeprefix(prefix))
                linear.register_forward_pre_hook(lambda _, args, name=group.name: hooked.update({name: args[0]}))
        assert torch.equal(model(input_ids=ids).logits, wanted)
        for tap in taps:
            tap.__exit__(None, None, None)
    assert sorted(seen.sites) == sorted(group.name for group in plan.groups)
    assert all(inputs is hooked[site] for site, inputs in seen.inputs)


def test_a_replacement_reaches_every_linear_of_the_site() -> None:
    layer, x = Layer(), torch.randn(2, 16)
    seen = Seen("qk")
    with LinearTap(SITES).on(layer, seen):
        found = layer(x)
    assert seen.sites == ["qk", "o"]
    assert seen.inputs[0][1] is x
    assert torch.equal(found, layer(2 * x))
    assert hooks_of(layer) == 0


def test_linears_of_a_site_with_different_inputs_hand_over_each() -> None:
    layer, x = Layer(), torch.randn(2, 16)
    layer.apart = x.clone()
    seen = Seen()
    with LinearTap(SITES).on(layer, seen):
        layer(x)
    assert [(site, inputs is x) for site, inputs in seen.inputs[:2]] == [("qk", True), ("qk", False)]
    assert seen.sites == ["qk", "qk", "o"]


def test_an_input_is_kept_only_until_the_last_linear_has_taken_it() -> None:
    layer, x = Layer(), torch.randn(2, 16)
    kept = weakref.ref(x)
    with LinearTap(SITES).on(layer, lambda site, inputs: None), torch.no_grad():
        layer.q(x)
        layer.k(x)
        del x
        assert kept() is None


def test_a_site_has_passed_once_all_of_its_linears_were_reached() -> None:
    layer, x = Layer(), torch.randn(2, 16)
    passed: list[str] = []
    with LinearTap(SITES).on(layer, Seen(), passed.append):
        layer.q(x)
        assert passed == []
        layer.k(x)
        assert passed == ["qk"]
        layer.k(x)
        layer.o(x)
    assert passed == ["qk", "o"]


def test_an_error_when_a_site_has_passed_ends_the_forward_and_leaves_no_hook() -> None:
    class Ended(Exception):
        pass

    def end(site: str) -> None:
        if site == "qk":
            raise Ended

    layer, seen = Layer(), Seen()
    with pytest.raises(Ended), LinearTap(SITES).on(layer, seen, end):
        layer(torch.randn(2, 16))
    assert seen.sites == ["qk"]
    assert hooks_of(layer) == 0


def test_several_taps_are_one() -> None:
    layer, x = Layer(), torch.randn(2, 16)
    seen, passed = Seen("o"), list[str]()
    both = Taps(LinearTap({"qk": SITES["qk"]}), LinearTap({"o": SITES["o"]}))
    with both.on(layer, seen, passed.append):
        found = layer(x)
    assert (seen.sites, passed) == (["qk", "o"], ["qk", "o"])
    assert torch.equal(found, layer.o(2 * (layer.q(x) + layer.k(x))))
    assert hooks_of(layer) == 0


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, as Llama and Gemma have it: pairs half a head apart."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class ByHand:
    """Keys and values computed by forward hooks on the parts of an attention module, before transformers' interface."""

    def __init__(self, attention: Any) -> None:
        self.attention, self.parts, self.stored = attention, dict[str, Tensor](), dict[str, Any]()
        attention.register_forward_pre_hook(self._begin, with_kwargs=True)
        for leaf in ("k_norm", "v_norm", "k_proj", "v_proj"):
            if isinstance(getattr(attention, leaf, None), nn.Module):
                getattr(attention, leaf).register_forward_hook(
                    lambda _, args, output, leaf=leaf: self.parts.update({leaf: output.detach()})
                )

    def _begin(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.tables = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
        shared = kwargs.get("shared_kv_states")
        if getattr(self.attention, "is_kv_shared_layer", False) and shared is not None:
            self.stored = {kind: tuple(tensor.clone() for tensor in pair) for kind, pair in shared.items()}

    @property
    def amaxes(self) -> tuple[float, float]:
        attention = self.attention
        if getattr(attention, "is_kv_shared_layer", False):
            key, value = self.stored[attention.layer_type]
            return float(key.abs().max()), float(value.abs().max())
        key = self.parts.get("k_norm", self.parts["k_proj"])
        value = self.parts.get("v_norm", self.parts.get("v_proj"))
        assert value is not None
        key = key.reshape(*key.shape[:2], -1, attention.head_dim)
        cos, sin = (table.unsqueeze(2) for table in self.tables)
        return float(rotated(key, cos, sin).abs().max()), float(value.abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4_e2b"])
def test_keys_and_values_are_those_of_the_cache_and_no_logit_changes(
    tiny: TinyModels, name: str, attention: str
) -> None:
    """Also of layers that share the keys and values of another one, and of those that use keys for values."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny(name), dtype=torch.float32, attn_implementation=attention
    ).eval()
    layers = model.get_decoder().layers
    ids = random_samples((40,))[0].unsqueeze(0)
    interface = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    before = dict(interface)
    statistics: dict[str, KeyValueAmax] = {}

    def observe(site: str, tensor: Tensor) -> None:
        assert tensor.shape[-2] == ids.shape[1]
        statistics.setdefault(site, KeyValueAmax()).observe({"source": tensor})

    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        hands = [ByHand(layer.self_attn) for layer in layers]
        with ExitStack() as opened:
            for number, layer in enumerate(layers):
                opened.enter_context(KeyValueTap(f"layers.{number}.").on(layer, observe))
            found = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(found, wanted)
    assert dict(interface) == before
    assert {layer.self_attn.config._attn_implementation for layer in layers} == {attention}
    assert len(statistics) == 2 * len(layers)
    for number, hand in enumerate(hands):
        amaxes = []
        for part in "kv":
            statistic = statistics[f"layers.{number}.self_attn.{part}"]
            statistic.commit()
            amaxes.append(statistic.result(part))
        assert tuple(amaxes) == hand.amaxes
    if name == "gemma4_e2b":
        assert any(hand.stored for hand in hands)


def test_replaced_keys_and_values_are_computed_with(tiny: TinyModels) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    layer, ids = model.model.layers[0], random_samples((12,))[0].unsqueeze(0)
    seen = Seen("self_attn.v")
    with torch.no_grad():
        with KeyValueTap().on(layer, seen):
            doubled = model(input_ids=ids).logits
        layer.self_attn.v_proj.weight.mul_(2)
        assert torch.equal(doubled, model(input_ids=ids).logits)  # a power of two
    assert seen.sites == ["self_attn.k", "self_attn.v"]


def test_an_error_when_keys_have_passed_ends_the_forward_and_restores_the_interface(tiny: TinyModels) -> None:
    class Ended(Exception):
        pass

    def end(site: str) -> None:
        raise Ended

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    interface, seen = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS, Seen()
    before = dict(interface)
    with pytest.raises(Ended), KeyValueTap().on(model.model.layers[0], seen, end):
        model(input_ids=random_samples((12,))[0].unsqueeze(0))
    assert seen.sites == ["self_attn.k", "self_attn.v"]
    assert dict(interface) == before


def test_a_layer_without_the_interface_hands_over_nothing() -> None:
    layer, seen = Layer(), Seen()
    with KeyValueTap().on(layer, seen):
        layer(torch.randn(2, 16))
    assert seen.sites == []
