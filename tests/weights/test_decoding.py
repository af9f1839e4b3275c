"""Every form that models are released in is decoded to the values of a judge written with tables and float64, in reads
of any range, from headers alone until a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from nvquant.checkpoint.headers import Header
from nvquant.checkpoint.shard_bytes import LocalBytes
from nvquant.checkpoint.source import open_checkpoint, tensor_bytes
from nvquant.errors import InputError
from nvquant.weights.decoding import check_scales, decoded, decoded_form, stored_bytes
from safetensors.torch import save_file
from support.quantized_sources import Form, Stored, fp8_form, integer_form, mxfp4_form, nvfp4_form
from torch import Tensor

ROWS, COLS = 320, 192  # 2.5 and 1.5 blocks of 128
MODULE = "model.layers.0.mlp.up_proj"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
CT = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
E8M0 = torch.float8_e8m0fnu

FP8_FORMS = {
    "blocks": fp8_form((128, 128), FP8),
    "blocks of another size": fp8_form((64, 32), {"quant_method": "fp8", "weight_block_size": [64, 32]}),
    "blocks under BF16": fp8_form((128, 128), FP8, dtype=torch.bfloat16),
    "blocks under UE8M0": fp8_form((128, 128), FP8 | {"scale_fmt": "ue8m0"}, name="scale", dtype=E8M0),
    "blocks of compressed-tensors": fp8_form((128, 128), CT, name="weight_scale"),
    "blocks of modelopt": fp8_form(
        (128, 128), {"quant_method": "modelopt"}, name="weight_scale", shape=lambda s: s[:, None, :, None]
    ),
    "rows": fp8_form((1, 0), CT, name="weight_scale", dtype=torch.bfloat16),
    "rows of fbgemm": fp8_form((1, 0), {"quant_method": "fbgemm_fp8"}, name="weight_scale"),
    "rows of modelopt": fp8_form((1, 0), {"quant_method": "modelopt"}, name="weight_scale", shape=torch.flatten),
    "one scale": fp8_form(
        None,
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        name="weight_scale",
        shape=lambda scales: scales.reshape(()),
        extras={"input_scale": torch.ones(())},
    ),
    "one scale with an axis": fp8_form(None, FP8, shape=torch.flatten, extras={"activation_scale": torch.ones(1)}),
    "MXFP8": fp8_form((1, 32), {"quant_method": "modelopt"}, name="weight_scale", dtype=torch.uint8),
}


MXFP4_FORMS = {
    "compressed-tensors": mxfp4_form(CT | {"format": "mxfp4-pack-quantized"}),
    "under E8M0 by dtype": mxfp4_form(CT | {"format": "mxfp4-pack-quantized"}, dtype=E8M0),
    "blocks of gpt-oss": mxfp4_form(
        {"quant_method": "mxfp4"},
        names=("weight_blocks", "weight_scales"),
        shape=lambda name, tensor: tensor.unflatten(1, (-1, 16)) if name.endswith("blocks") else tensor,
    ),
    "bytes of DeepSeek V4": mxfp4_form(
        FP8 | {"expert_dtype": "fp4"},
        names=("weight", "scale"),
        dtype=E8M0,
        shape=lambda name, tensor: tensor.view(torch.int8) if name == "weight" else tensor,
    ),
}


def integers(bits: int, group: int, **changes: object) -> dict[str, object]:
    """compressed-tensors' claim of packed integers."""
    numbers = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group, "symmetric": True, **changes}
    return CT | {"format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": numbers}}}


OTHER_FORMS = {
    "INT4 in groups of 32": ("INT4", integer_form(4, 32, integers(4, 32))),
    "INT4 in groups that end in a part": ("INT4", integer_form(4, 128, integers(4, 128))),
    "INT4 in rows": ("INT4", integer_form(4, COLS, integers(4, -1, strategy="channel"))),
    "INT8 in groups of 64": ("INT8", integer_form(8, 64, integers(8, 64))),
    "NVFP4 of compressed-tensors": ("NVFP4", nvfp4_form(CT | {"format": "nvfp4-pack-quantized"}, is_modelopt=False)),
    "NVFP4 of modelopt": ("NVFP4", nvfp4_form({"quant_method": "modelopt", "quant_algo": "NVFP4"}, is_modelopt=True)),
}


def matrix(rows: int = ROWS, cols: int = COLS, seed: int = 0) -> Tensor:
    """Values of many sizes, so that scales differ."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(rows, 1, generator=generator).exp() * torch.randn(1, cols, generator=generator).exp()
    return (torch.randn(rows, cols, generator=generator) * sizes * 0.02).bfloat16()


def folder_of(root: Path, tensors: Stored, claim: object) -> Path:
    """A checkpoint of these tensors."""
    root.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, root / "model.safetensors")
    (root / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": claim}))
    return root


def stored_in(root: Path, form: Form, weight: Tensor) -> tuple[Path, Tensor]:
    """A checkpoint of one matrix beside a norm, and the matrix that it means."""
    stored = form.encode(weight)
    tensors = {f"{MODULE}.{end}": tensor for end, tensor in stored.items()}
    return folder_of(root, {"model.norm.weight": torch.ones(8), **tensors}, form.claim), form.decode(stored)


def is_decoded(folder: Path, wanted: Tensor, form: str) -> None:
    """The checkpoint has the matrix and nothing else, in every way of reading."""
    source = decoded(open_checkpoint(folder))
    name = f"{MODULE}.weight"
    assert decoded_form(source) == form
    assert set(source.infos()) == set(source.files) == {name, "model.norm.weight"}
    info = source.info(name)
    assert (info.dtype, info.shape, info.nbytes) == ("BF16", tuple(wanted.shape), 2 * wanted.numel())
    assert "quantization_config" not in source.config
    assert torch.equal(source.read(name).view(torch.int16), wanted.view(torch.int16))
    assert torch.equal(source.read("model.norm.weight"), torch.ones(8))
    rows = [wanted.shape[0] - 1, 0, 5, 6, 7]
    assert torch.equal(source.read_rows(name, rows), wanted[rows])
    whole = bytes(tensor_bytes(wanted))
    for begin, end in (
        (0, 1),
        (1, 2),
        (2 * wanted.shape[1] - 1, 2 * wanted.shape[1] + 1),
        (777, 40_001),
        (3, len(whole)),
    ):
        buffer = memoryview(bytearray(end - begin))
        source.read_into(name, buffer, begin)
        assert bytes(buffer) == whole[begin:end]
    files = sum((path.stat().st_size for path in folder.glob("*.safetensors")), 0)
    assert stored_bytes(source, name) < files


@pytest.mark.parametrize("form", FP8_FORMS)
def test_fp8_is_decoded(form: str, tmp_path: Path) -> None:
    folder, wanted = stored_in(tmp_path / "model", FP8_FORMS[form], matrix())
    assert len(wanted.unique()) > 200
    is_decoded(folder, wanted, "MXFP8" if form == "MXFP8" else "FP8")


@pytest.mark.parametrize("form", MXFP4_FORMS)
def test_mxfp4_is_decoded_exactly(form: str, tmp_path: Path) -> None:
    folder, wanted = stored_in(tmp_path / "model", MXFP4_FORMS[form], matrix())
    assert len(wanted.unique()) > 50
    is_decoded(folder, wanted, "MXFP4")


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_integers_and_nvfp4_are_decoded(name: str, tmp_path: Path) -> None:
    words, form = OTHER_FORMS[name]
    folder, wanted = stored_in(tmp_path / "model", form, matrix())
    assert len(wanted.unique()) > 200
    is_decoded(folder, wanted, words)
    check_scales(decoded(open_checkpoint(folder)))


@pytest.mark.parametrize("name", ["INT4 in groups of 32", "INT8 in groups of 64", "NVFP4 of compressed-tensors"])
def test_compressed_tensors_decodes_alike(name: str, tmp_path: Path) -> None:
    """By its own compressors, which compute in the scales' dtype: equal to a step of BF16."""
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    words, form = OTHER_FORMS[name]
    stored = form.encode(matrix())
    folder = folder_of(tmp_path / "model", {f"{MODULE}.{end}": tensor for end, tensor in stored.items()}, form.claim)
    own = decoded(open_checkpoint(folder)).read(f"{MODULE}.weight")
    if words == "NVFP4":
        made = NVFP4PackedCompressor.decompress(stored, preset_name_to_scheme("NVFP4A16", ["Linear"]))
    else:
        scheme = QuantizationScheme(**form.claim["config_groups"]["group_0"])
        made = PackedQuantizationCompressor.decompress(stored, scheme)
    assert torch.allclose(own.float(), made["weight"].float(), rtol=2.0**-7, atol=0)


def test_a_stored_shape_that_contradicts_is_refused(tmp_path: Path) -> None:
    _, form = OTHER_FORMS["INT4 in groups of 32"]
    stored = {f"{MODULE}.{end}": tensor for end, tensor in form.encode(matrix()).items()}
    stored[f"{MODULE}.weight_shape"] = torch.tensor([ROWS, COLS - 3])
    source = decoded(open_checkpoint(folder_of(tmp_path / "model", stored, form.claim)))
    with pytest.raises(InputError, match="weight_shape contradicts the shapes of the codes and scales beside it"):
        check_scales(source)


FAULTS = {
    "integers with a zero point": (
        "INT4 in groups of 32",
        {"weight_zero_point": torch.zeros(ROWS // 8, COLS // 32, dtype=torch.int32)},
        "weight_zero_point is a part of integers that are not symmetric or in another order",
    ),
    "integers in another order": (
        "INT4 in groups of 32",
        {"weight_g_idx": torch.zeros(COLS, dtype=torch.int32)},
        "weight_g_idx is a part of integers",
    ),
    "NVFP4 without its global scale": ("NVFP4 of modelopt", {"weight_scale_2": None}, "without a global scale"),
    "packed codes without scales": ("NVFP4 of compressed-tensors", {"weight_scale": None}, "without a scale"),
    "a global scale without its codes": (
        "NVFP4 of compressed-tensors",
        {"weight_packed": None},
        "up_proj.*_scale is a scale or a part of quantized weights that the model lacks",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_other_forms_that_do_not_fit_are_refused(fault: str, tmp_path: Path) -> None:
    name, changes, words = FAULTS[fault]
    form = OTHER_FORMS[name][1]
    stored = {key: tensor for key, tensor in {**form.encode(matrix()), **changes}.items() if tensor is not None}
    folder = folder_of(tmp_path / "model", {f"{MODULE}.{end}": tensor for end, tensor in stored.items()}, form.claim)
    with pytest.raises(InputError, match=words):
        decoded(open_checkpoint(folder))


@pytest.mark.parametrize("bits", [3, 5])
def test_integers_of_other_sizes_are_refused(bits: int, tmp_path: Path) -> None:
    _, form = OTHER_FORMS["INT4 in groups of 32"]
    stored = {f"{MODULE}.{end}": tensor for end, tensor in form.encode(matrix()).items()}
    folder = folder_of(tmp_path / "model", stored, integers(bits, 32))
    with pytest.raises(InputError, match=f"declares integers of {bits} bits, and nvquant decodes 4 or 8"):
        decoded(open_checkpoint(folder))


def test_the_experts_of_gpt_oss_are_decoded_with_rows_and_columns_exchanged(tmp_path: Path) -> None:
    """Against transformers' own dequantization, whose rows are the model's."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    form, name = MXFP4_FORMS["blocks of gpt-oss"], "model.layers.0.mlp.experts.gate_up_proj"
    stored = [form.encode(matrix(seed=seed)) for seed in range(3)]
    blocks, scales = (torch.stack([one[end] for one in stored]) for end in ("weight_blocks", "weight_scales"))
    wanted = convert_moe_packed_tensors(blocks, scales)
    assert wanted.shape == (3, COLS, ROWS)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.ones(3, ROWS)}
    source = decoded(open_checkpoint(folder_of(tmp_path / "model", tensors, {"quant_method": "mxfp4"})))
    assert set(source.infos()) == {name, f"{name}_bias"}
    assert torch.equal(source.read(name), wanted)
    assert torch.equal(source.read_rows(name, [2, 0]), wanted[[2, 0]])
    whole = bytes(tensor_bytes(wanted.contiguous()))
    one = 2 * COLS * ROWS
    for begin, end in ((5, 7), (one - 3, one + 3), (777, 2 * one + 9)):
        buffer = memoryview(bytearray(end - begin))
        source.read_into(name, buffer, begin)
        assert bytes(buffer) == whole[begin:end]


def test_a_stack_of_fp8_matrices_is_decoded(tmp_path: Path) -> None:
    """Partial blocks, one scale a matrix, under names without `weight`."""
    form = FP8_FORMS["blocks"]
    stored = [form.encode(matrix(seed=seed)) for seed in range(3)]
    name = "model.layers.0.mlp.experts.up_proj"
    for scales, end in (
        (torch.stack([one["weight_scale_inv"] for one in stored]), "_scale_inv"),
        (torch.tensor([0.5, 2.0, 3.0]), "_scale"),
        (torch.tensor([0.5, 2.0, 3.0]).reshape(3, 1, 1), "_scale_inv"),
    ):
        codes = torch.stack([one["weight"] for one in stored])
        folder = folder_of(tmp_path / f"model{scales.shape}", {name: codes, name + end: scales}, FP8)
        source = decoded(open_checkpoint(folder))
        each = [
            form.decode({"weight": codes[at], "weight_scale_inv": scales[at]})
            if scales.ndim == 3 and scales.numel() > 3
            else (codes[at].double() * float(scales[at])).float().bfloat16()
            for at in range(3)
        ]
        assert torch.equal(source.read(name), torch.stack(each))
        assert torch.equal(source.read_rows(name, [1]), torch.stack(each)[[1]])


def test_headers_alone_are_read_before_a_weight(tmp_path: Path) -> None:
    """`plan` opens a source whose weights lie elsewhere: the reader refuses every byte of data."""
    folder, _ = stored_in(tmp_path / "model", FP8_FORMS["blocks"], matrix())
    opened = open_checkpoint(folder)
    path = folder / "model.safetensors"
    data_start = opened.shards[path.name].data_start
    head = path.read_bytes()[:data_start]
    path.write_bytes(head)
    source = decoded(opened)
    assert source.info(f"{MODULE}.weight").shape == (ROWS, COLS)
    with pytest.raises(InputError, match="changed while it was being read"):
        source.read(f"{MODULE}.weight")


@dataclass(frozen=True)
class Recorded(LocalBytes):
    """Local shards that note the size of every read, by tensor."""

    sizes: list[tuple[str, int]]

    def fill(self, name: str, header: Header, begin: int, buffer: memoryview) -> None:
        """See `ShardBytes`."""
        self.sizes.append((name, len(buffer)))
        super().fill(name, header, begin, buffer)


def test_a_read_of_some_rows_reads_their_codes_and_scales_alone(tmp_path: Path) -> None:
    """A piece of a large tensor takes the memory of a piece, and a remote source sends no more."""
    folder, _ = stored_in(tmp_path / "model", FP8_FORMS["blocks"], matrix())
    content = Recorded([])
    source = decoded(replace(open_checkpoint(folder), content=content))
    buffer = memoryview(bytearray(2 * COLS * 3))
    source.read_into(f"{MODULE}.weight", buffer, 2 * COLS * 127)  # rows 127, 128 and 129 lie in two blocks
    assert content.sizes == [(f"{MODULE}.weight", 3 * COLS), (f"{MODULE}.weight_scale_inv", 2 * 2 * 4)]


def test_scales_of_a_cache_are_dropped_and_an_unquantized_neighbour_stays(tmp_path: Path) -> None:
    form = FP8_FORMS["one scale"]
    stored = {f"{MODULE}.{end}": tensor for end, tensor in form.encode(matrix()).items()}
    attention = "model.layers.0.self_attn"
    plain = matrix(64, 64)
    extra = {
        f"{attention}.k_proj.k_scale": torch.ones(()),
        f"{attention}.v_scale": torch.ones(1),
        f"{attention}.o_proj.weight": plain,
        "model.layers.0.router.scale": torch.ones(64),  # a parameter of the model
    }
    source = decoded(open_checkpoint(folder_of(tmp_path / "model", stored | extra, form.claim)))
    assert set(source.infos()) == {f"{MODULE}.weight", f"{attention}.o_proj.weight", "model.layers.0.router.scale"}
    assert torch.equal(source.read(f"{attention}.o_proj.weight"), plain)


def test_the_claim_vanishes_at_every_level(tmp_path: Path) -> None:
    folder, _ = stored_in(tmp_path / "model", FP8_FORMS["blocks"], matrix())
    config = {
        "torch_dtype": "float8_e4m3fn",
        "expert_dtype": "fp4",
        "text_config": {"quantization_config": dict(FP8), "hidden_size": 192, "dtype": "bfloat16"},
        "vision_config": {"depth": 2},
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert decoded(open_checkpoint(folder)).config == {
        "torch_dtype": "bfloat16",
        "text_config": {"hidden_size": 192, "dtype": "bfloat16"},
        "vision_config": {"depth": 2},
    }


def without(name: str) -> Callable[[Stored], Stored]:
    return lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(name)}


def as_(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Stored], Stored]:
    return lambda tensors: {key: change(value) if key.endswith(name) else value for key, value in tensors.items()}


BROKEN = {
    "a scale without its weight": (
        "blocks",
        without("up_proj.weight"),
        "up_proj.weight_scale_inv is a scale or a part of quantized weights that the model lacks",
    ),
    "a weight without its scale": ("blocks", without("_inv"), "up_proj.weight is stored as F8_E4M3 without a scale"),
    "an input scale beside an unquantized weight": (
        "one scale",
        lambda tensors: as_("up_proj.weight", lambda t: t.bfloat16())(without("weight_scale")(tensors)),
        "up_proj.input_scale is a scale or a part",
    ),
    "a scale beside an unquantized weight": (
        "blocks",
        as_("up_proj.weight", lambda t: t.bfloat16()),
        "up_proj.weight_scale_inv is a scale or a part",
    ),
    "two scales": (
        "blocks",
        lambda tensors: tensors | {f"{MODULE}.weight_scale": torch.ones(())},
        "has two scales",
    ),
    "too few scales": (
        "blocks",
        as_("_inv", lambda scales: scales[:-1].clone()),
        r"weight_scale_inv \(F32 \[2, 2\]\) is no scale that nvquant knows for .* \(F8_E4M3 \[320, 192\]\)",
    ),
    "FP8 with five bits of exponent": (
        "blocks",
        as_("up_proj.weight", lambda t: t.float().to(torch.float8_e5m2)),
        "is no scale that nvquant knows",
    ),
    "integers for scales": ("blocks", as_("_inv", lambda scales: scales.to(torch.int32)), "is no scale"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_codes_and_scales_that_do_not_fit_are_refused(fault: str, tmp_path: Path) -> None:
    form, edit, words = BROKEN[fault]
    stored = {f"{MODULE}.{end}": tensor for end, tensor in FP8_FORMS[form].encode(matrix()).items()}
    folder = folder_of(tmp_path / "model", edit({"model.norm.weight": torch.ones(8), **stored}), FP8_FORMS[form].claim)
    with pytest.raises(InputError, match=words):
        decoded(open_checkpoint(folder))


SETTINGS: list[dict[str, object]] = [
    {"transform_config": {"config_groups": {"u": {}}}},
    {"sparsity_config": {"format": "sparse-24-bitmask"}},
]


@pytest.mark.parametrize("claim", SETTINGS)
def test_weights_that_are_more_than_codes_and_scales_are_refused(claim: dict[str, object], tmp_path: Path) -> None:
    form = FP8_FORMS["rows"]
    stored = {f"{MODULE}.{end}": tensor for end, tensor in form.encode(matrix()).items()}
    folder = folder_of(tmp_path / "model", stored, {**CT, **claim})
    with pytest.raises(InputError, match="which nvquant does not decode: convert from the original BF16 model"):
        decoded(open_checkpoint(folder))


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    for form, bad in (("blocks under UE8M0", 255), ("MXFP8", 255)):
        folder, _ = stored_in(tmp_path / form, FP8_FORMS[form], matrix())
        opened = open_checkpoint(folder)
        name = f"{MODULE}.{'scale' if form != 'MXFP8' else 'weight_scale'}"
        info = opened.info(name)
        blob = bytearray((folder / "model.safetensors").read_bytes())
        blob[info.end - 1] = bad
        (folder / "model.safetensors").write_bytes(blob)
        with pytest.raises(InputError, match=f"{name} contains the E8M0 byte 255, which is no number"):
            decoded(open_checkpoint(folder)).read(f"{MODULE}.weight")
