"""The checkpoint as a server reads it: which global scale it keeps, what Marlin loses, how inputs are rounded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.format.marlin import count_flushed_blocks
from nvquant.verify.numerics.emulated import emulated_logprobs
from nvquant.verify.numerics.served import InputRounding, ServedModel
from nvquant.verify.subject import open_subject
from nvquant.weights.base import names_by_layer, stored_names
from support.conversions import random_samples, tensors_in
from support.emulation import decode, load_emulation, token_logprobs
from torch import Tensor, nn
from verify.breaking import LAYER, change_scalar, edit_tensors
from verify.checkpoints import Copy
from verify.numerics.measuring import original

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "reference_vectors.json").read_text())["activations"]
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
TINY_SCALES = 5


def plant_tiny_scales(folder: Path, leaf: str = "mlp.down_proj", byte: int = 1, count: int = TINY_SCALES) -> None:
    """Make some block scales so small that Marlin loses them, and their codes large."""
    with edit_tensors(folder) as tensors:
        packed = f"{LAYER}.{leaf}.weight_packed"
        if packed not in tensors:
            packed = f"{LAYER}.{leaf}.weight"
        tensors[f"{LAYER}.{leaf}.weight_scale"].data[8 : 8 + count] = bytes([byte]) * count
        tensors[packed].data[64 : 64 + 8 * count] = b"\x77" * 8 * count


def decoded(folder: Path, arithmetic: str) -> dict[str, Tensor]:
    """Layer 1 as the lane of an arithmetic computes it."""
    served = ServedModel(open_subject(folder))
    names = names_by_layer(served, served.prefix)[1]
    stored = {name: served.subject.checkpoint.read(name) for name in stored_names(served, names)}
    tensors = served.assemble(names, stored, torch.float32)
    served.flush(1, stored, tensors, arithmetic)  # type: ignore[arg-type]
    return tensors


@pytest.mark.parametrize("name", ["llama-ct", "llama-mo"])
def test_weight_only_loses_what_marlin_flushes_and_w4a4_does_not(name: str, copy: Callable[[str], Copy]) -> None:
    made = copy(name)
    plant_tiny_scales(made.folder)
    module = f"{LAYER}.mlp.down_proj"
    with_rounding, alone = (decoded(made.folder, lane)[f"{module}.weight"] for lane in ("w4a4", "weight_only"))
    lost = torch.zeros(64 * 8, dtype=torch.bool)
    lost[8 : 8 + TINY_SCALES] = True
    zeros = (alone.view(-1, 16) == 0).all(-1)
    assert torch.equal(zeros, lost)
    assert not (with_rounding.view(-1, 16) == 0).all(-1).any()
    assert torch.equal(with_rounding.view(-1, 16)[~lost], alone.view(-1, 16)[~lost])
    subject = open_subject(made.folder)
    assert count_flushed_blocks(subject.histograms[module]) == TINY_SCALES


def test_a_weight_only_matrix_loses_them_in_every_arithmetic(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-a16-ct")
    plant_tiny_scales(made.folder)
    for lane in ("w4a4", "weight_only"):
        weight = decoded(made.folder, lane)[f"{LAYER}.mlp.down_proj.weight"]
        assert int((weight.view(-1, 16) == 0).all(-1).sum()) == TINY_SCALES


def test_what_marlin_flushes_is_told_by_the_largest_scale_of_the_whole_fused_layer(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-a16-ct")
    with edit_tensors(made.folder) as tensors:
        for leaf in ("gate_proj", "up_proj"):
            scales = tensors[f"{LAYER}.mlp.{leaf}.weight_scale"]
            scales.data[:] = bytes([0x08 if leaf == "up_proj" else 0x7E]) * len(scales.data)  # 2^-6 and 448
        tensors[f"{LAYER}.mlp.up_proj.weight_scale"].data[0] = 0x07  # below 2^-6
    weights = decoded(made.folder, "weight_only")
    lost = (weights[f"{LAYER}.mlp.up_proj.weight"].view(-1, 16) == 0).all(-1)
    assert lost[0] and int(lost.sum()) == 1
    # Alone, up_proj's scales would all be kept: relative to 2^-6, the smaller one is none too small.
    histogram = open_subject(made.folder).histograms[f"{LAYER}.mlp.up_proj"]
    assert count_flushed_blocks(histogram) == 0


def test_the_lanes_likelihoods_show_what_marlin_lost(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-a16-mo")
    # All of a matrix's scales but its largest are lost.
    with edit_tensors(made.folder) as tensors:
        scales = tensors[f"{LAYER}.mlp.down_proj.weight_scale"]
        scales.data[0], scales.data[1:] = 0x7E, bytes([7]) * (len(scales.data) - 1)
    (ids,) = random_samples((40,))
    ours = emulated_logprobs(open_subject(made.folder), ids.tolist(), "weight_only")
    with edit_tensors(made.folder) as tensors:  # what is lost, stored as zeros, for an emulation that loses nothing
        packed = tensors[f"{LAYER}.mlp.down_proj.weight"]
        packed.data[8:] = bytes(len(packed.data) - 8)
    wanted = token_logprobs(load_emulation(made.folder), ids.tolist())
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(wanted), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("name", "leaf", "factor"), [
    ("llama-a16-ct", "weight_global_scale", 2.0), ("llama-a16-ct", "weight_global_scale", 0.5),
    ("llama-a16-mo", "weight_scale_2", 2.0), ("llama-a16-mo", "weight_scale_2", 0.5),
])  # fmt: skip
def test_of_differing_global_scales_the_largest_as_stored_is_used(
    name: str, leaf: str, factor: float, copy: Callable[[str], Copy]
) -> None:
    """vLLM takes the maximum of what is stored, be it divisors or multipliers."""
    made = copy(name)
    names = [f"{LAYER}.mlp.{part}.{leaf}" for part in ("gate_proj", "up_proj")]
    change_scalar(made.folder, names[1:], lambda scale: scale * factor)
    (ids,) = random_samples((40,))
    ours = emulated_logprobs(open_subject(made.folder), ids.tolist(), "weight_only")
    with edit_tensors(made.folder) as tensors:
        largest = max(tensors[stored].scalar() for stored in names)
    change_scalar(made.folder, names, lambda _: largest)
    wanted = token_logprobs(load_emulation(made.folder), ids.tolist())
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(wanted), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("name", "leaf"), [("llama-ct", "input_global_scale"), ("llama-mo", "input_scale")])
def test_of_differing_input_scales_the_largest_as_stored_is_used(
    name: str, leaf: str, copy: Callable[[str], Copy]
) -> None:
    made = copy(name)
    change_scalar(made.folder, [f"{LAYER}.self_attn.k_proj.{leaf}"], lambda scale: scale * 3)
    served = ServedModel(open_subject(made.folder))
    stored = {part: tensors_in(made.folder)[f"{LAYER}.self_attn.{part}_proj.{leaf}"] for part in "qkv"}
    largest = max(float(value) for value in stored.values())
    for part in "qkv":
        divisor = served.matrices[f"{LAYER}.self_attn.{part}_proj"].scalars["input_global"]
        assert float(divisor) == pytest.approx(largest if name == "llama-ct" else 1 / largest)


@pytest.mark.parametrize("name", ["llama-fp8-ct", "llama-fp8-mo"])
def test_fp8_is_decoded_by_its_rows_or_its_scalar(name: str, copy: Callable[[str], Copy]) -> None:
    made = copy(name)
    found, stored = decoded(made.folder, "w4a4"), tensors_in(made.folder)
    for leaf in "qkvo":
        module = f"{LAYER}.self_attn.{leaf}_proj"
        expected = stored[f"{module}.weight"].float() * stored[f"{module}.weight_scale"]
        assert torch.equal(found[f"{module}.weight"], expected)


def test_fused_fp8_under_unequal_scales_is_quantized_again_under_the_largest(copy: Callable[[str], Copy]) -> None:
    """As vLLM 0.32 does (`requantize_with_max_scale`), which goes through float16."""
    made = copy("llama-fp8-mo")
    modules = [f"{LAYER}.self_attn.{leaf}_proj" for leaf in "qkv"]
    change_scalar(made.folder, [f"{modules[0]}.weight_scale"], lambda scale: scale * 3)
    found, stored = decoded(made.folder, "w4a4"), tensors_in(made.folder)
    largest = max(stored[f"{module}.weight_scale"] for module in modules)
    for module in modules:
        dequantized = stored[f"{module}.weight"].half() * stored[f"{module}.weight_scale"]
        again = (dequantized.float() / largest).to(torch.float8_e4m3fn).float() * largest
        assert torch.equal(found[f"{module}.weight"], again)
        assert torch.equal(again, stored[f"{module}.weight"].float() * largest) == (module == modules[0])


def test_decoded_matrices_are_those_of_the_formats_definition(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-ct")
    found = decoded(made.folder, "w4a4")
    stored = tensors_in(made.folder)
    for leaf in ("self_attn.q_proj", "mlp.down_proj"):
        module = f"{LAYER}.{leaf}"
        scales = stored[f"{module}.weight_scale"].float() / stored[f"{module}.weight_global_scale"]
        torch.testing.assert_close(
            found[f"{module}.weight"], decode(stored[f"{module}.weight_packed"], scales), rtol=1e-6, atol=0
        )
    assert torch.equal(found[f"{LAYER}.input_layernorm.weight"], stored[f"{LAYER}.input_layernorm.weight"])
    assert set(found) == {name for name in original(made.source).state_dict() if name.startswith(f"{LAYER}.")}


def test_a_weight_only_config_drops_the_input_scales_as_the_server_does(copy: Callable[[str], Copy]) -> None:
    from verify.faults_config import weight_only_config_of_a_w4a4_checkpoint

    made = copy("llama-ct")
    assert ServedModel(open_subject(made.folder)).arithmetics == ("w4a4", "weight_only")
    weight_only_config_of_a_w4a4_checkpoint(made.folder)
    assert ServedModel(open_subject(made.folder)).arithmetics == ("weight_only",)


@contextmanager
def rounded_inputs(folder: Path, rounding: InputRounding, is_counted: bool = True) -> Iterator[tuple[nn.Module, Any]]:
    """Layer 1 of the source, and what enters its linears, by their names."""
    layer = original(folder).model.layers[1]
    seen: dict[str, Tensor] = {}
    with rounding.tap(1, "w4a4").on(layer, rounding.handle(1, is_counted)):
        for name, part in layer.named_modules():
            if isinstance(part, nn.Linear):
                part.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        yield layer, seen


def set_input_scale(folder: Path, leaf: str, divisor: float) -> None:
    change_scalar(folder, [f"{LAYER}.{leaf}.input_global_scale"], lambda _: divisor)


@pytest.mark.parametrize("case", VECTORS, ids=[case["name"] for case in VECTORS])
def test_the_hook_rounds_as_the_reference_vectors_say_bit_for_bit(case: Any, copy: Callable[[str], Copy]) -> None:
    made = copy("llama-ct")
    divisor = float(torch.frombuffer(bytearray.fromhex(case["input_global_scale"]), dtype=torch.float32))
    set_input_scale(made.folder, "mlp.down_proj", divisor)
    x = torch.frombuffer(bytearray.fromhex(case["x"]), dtype=DTYPES[case["dtype"]]).reshape(case["shape"]).float()
    reference = next(entry for entry in case["expected"] if "dequantized_bf16" in entry)
    wanted = torch.frombuffer(bytearray.fromhex(reference["dequantized"]), dtype=torch.float32).reshape(case["shape"])
    times = 128 // x.shape[1]
    with rounded_inputs(made.source, InputRounding(ServedModel(open_subject(made.folder)))) as (layer, seen):
        layer.mlp.down_proj(x.repeat(1, times))
    assert torch.equal(seen["mlp.down_proj"], wanted.repeat(1, times))


def test_inputs_are_as_before_once_the_block_has_ended(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-ct")
    rounding = InputRounding(ServedModel(open_subject(made.folder)))
    with rounded_inputs(made.source, rounding) as (layer, seen):
        pass
    x = torch.randn(3, 64)
    layer.mlp.gate_proj(x)
    assert seen["mlp.gate_proj"] is x
    assert rounding.numbers == {}


def test_clipped_and_lost_blocks_are_counted_as_by_hand(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-ct")
    for leaf in ("q_proj", "k_proj", "v_proj"):
        set_input_scale(made.folder, f"self_attn.{leaf}", 2688 / 10)
    x = torch.zeros(3, 64)
    x[0, 5] = 10.0  # just the calibrated amax
    x[0, 20] = -10.35  # its block scale rounds to 448 still: up to 10 * 464 / 448
    x[0, 40] = 10.37  # beyond
    x[1, 0] = -400.0  # far beyond
    x[1, 17:20] = 1e-9  # its scale rounds to zero: up to 10 / 448 / 1024
    x[1, 33] = 2.0e-5  # so does this one's
    x[1, 50] = 2.4e-5  # and this one's does not
    # the third row's blocks are zeros, which nothing happens to
    rounding = InputRounding(ServedModel(open_subject(made.folder)))
    with rounded_inputs(made.source, rounding) as (layer, seen):
        for leaf in ("q_proj", "k_proj", "v_proj"):  # a fused layer's input is counted once
            getattr(layer.self_attn, leaf)(x)
    numbers = rounding.numbers[f"{LAYER}.self_attn.qkv_proj"]
    assert (numbers.blocks, numbers.clipped, numbers.lost) == (12, 2, 2)
    assert numbers.amax == 400.0
    assert numbers.calibrated == pytest.approx(10.0)
    assert list(rounding.numbers) == [f"{LAYER}.self_attn.qkv_proj"]
    rounded = seen["self_attn.q_proj"]
    assert float(rounded[1, 0]) == pytest.approx(-10.0)
    assert not rounded[1, 16:48].any() and rounded[1, 50] != 0
    assert seen["self_attn.k_proj"] is rounded  # rounded once, too


def test_what_is_only_run_for_a_layers_own_error_is_not_counted(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-ct")
    rounding = InputRounding(ServedModel(open_subject(made.folder)))
    with rounded_inputs(made.source, rounding, is_counted=False) as (layer, seen):
        layer.mlp.gate_proj(torch.randn(3, 64))
    assert rounding.numbers == {}
    assert "mlp.gate_proj" in seen


def test_an_input_scale_of_zero_gives_no_numbers_but_stops_nothing(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-ct")
    set_input_scale(made.folder, "mlp.down_proj", 0.0)
    rounding = InputRounding(ServedModel(open_subject(made.folder)))
    with rounded_inputs(made.source, rounding) as (layer, seen):
        layer.mlp.down_proj(torch.ones(2, 128))
    assert math.isinf(rounding.numbers[f"{LAYER}.mlp.down_proj"].calibrated)
    assert seen["mlp.down_proj"].isnan().all()
