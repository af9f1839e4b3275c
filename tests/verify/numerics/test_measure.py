"""Both models side by side give what each gives alone, whole, and each layer's own error is its own."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nvquant.checkpoint.source import open_checkpoint
from nvquant.errors import InputError
from nvquant.stream.hidden import HiddenBudget
from nvquant.verify.numerics import lanes
from nvquant.verify.numerics.measure import SideBySide
from nvquant.verify.numerics.served import ServedModel
from nvquant.verify.subject import open_subject
from safetensors.torch import save_file
from support.conversions import Conversions, TinyModels, random_samples
from support.emulation import decode_tensors, load_emulation, read_tensors
from support.tiny_models import tiny_llama
from torch import Tensor
from verify.breaking import LAYER, change_scalar, edit_tensors
from verify.checkpoints import Copy
from verify.numerics.measuring import (
    Measured,
    likelihoods,
    measured,
    original,
    predicted,
    whole_models,
)

MODELS = ("llama", "gemma4", "gemma4_e2b", "gemma3_text", "phi3")


@pytest.fixture(scope="session")
def conversions(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Conversions:
    return Conversions(tiny, tmp_path_factory.mktemp("converted"))


@pytest.mark.parametrize("name", MODELS)
def test_kl_nll_and_top1_are_those_of_whole_models(name: str, conversions: Conversions, tiny: TinyModels) -> None:
    samples = random_samples()
    checkpoint = conversions(name, "nvfp4-a16", "modelopt", "mse")
    document = measured(checkpoint, tiny(name), samples).document
    found = document["arithmetics"]["weight_only"]
    kl, nll, top1 = whole_models(original(tiny(name)), load_emulation(checkpoint), samples)
    assert kl > 1e-4  # else nothing is compared
    assert found["kl"]["mean"] == pytest.approx(kl, rel=5e-3, abs=1e-6)
    assert found["nll"] == pytest.approx(nll, abs=1e-5)
    assert found["top1"]["agreement"] == pytest.approx(top1, abs=1e-9)
    assert document["nll_source"] == pytest.approx(-float(likelihoods(original(tiny(name)), samples).mean()), abs=1e-4)
    assert "w4a4" not in document["arithmetics"]


@pytest.mark.parametrize("name", ["llama", "gemma4_e2b"])
def test_a_lane_beside_the_source_computes_what_it_computes_alone(
    name: str, conversions: Conversions, tiny: TinyModels
) -> None:
    checkpoint, samples = conversions(name), random_samples()
    beside, _ = predicted(checkpoint, tiny(name), samples, "w4a4", "weight_only")
    for arithmetic in ("w4a4", "weight_only"):
        alone, _ = predicted(checkpoint, None, samples, arithmetic)  # type: ignore[arg-type]
        assert torch.equal(alone[arithmetic].nll, beside[arithmetic].nll)
    whole = likelihoods(original(tiny(name)), samples)
    torch.testing.assert_close(-beside["source"].nll, whole, rtol=0, atol=1e-4)


def as_its_own_source(
    checkpoint: Path, source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]
) -> Path:
    """A model whose weights are what a checkpoint's decode to."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors" and "index" not in path.name:
            shutil.copyfile(path, folder / path.name)
    state, _ = decode_tensors(read_tensors(checkpoint))
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4_e2b"])
def test_a_source_with_the_decoded_weights_leaves_no_error(
    name: str, conversions: Conversions, tiny: TinyModels, tmp_path: Path
) -> None:
    """Keys and values that layers share are each lane's own, too: else a layer run twice would disturb another one."""
    checkpoint = conversions(name)
    source = as_its_own_source(checkpoint, tiny(name), tmp_path / "decoded", lambda state: None)
    found = measured(checkpoint, source, random_samples())
    weight_only, w4a4 = (found.document["arithmetics"][lane] for lane in ("weight_only", "w4a4"))
    assert weight_only["kl"]["mean"] < 1e-8
    assert weight_only["top1"]["agreement"] == 1.0
    assert abs(weight_only["delta_nll"]) < 1e-5
    assert max(found.own_errors("weight_only")) < 1e-5
    assert max(found.accumulated("weight_only")) < 1e-5
    assert all(matrix["weight_error"] < 1e-6 for matrix in found.document["matrices"])
    # What is left of the other lane is the rounding of inputs.
    assert w4a4["kl"]["mean"] > 1e-4
    assert min(found.own_errors("w4a4")) > 0.01


def test_the_floor_is_small_and_positive(conversions: Conversions, tiny: TinyModels) -> None:
    for name in ("llama", "gemma4"):
        found = measured(conversions(name), tiny(name), random_samples())
        assert 0 < found.kl("floor") < 0.05 * found.kl("weight_only"), name


def test_what_marlin_loses_is_lost_in_one_lane(copy: Callable[[str], Copy], tmp_path: Path) -> None:
    """The source's weights are the decoded ones, less what Marlin loses: the weight-only lane finds no difference."""
    made = copy("llama-ct")
    module = f"{LAYER}.mlp.down_proj"
    with edit_tensors(made.folder) as tensors:
        scales = tensors[f"{module}.weight_scale"]
        scales.data[0], scales.data[1:] = 0x7E, bytes([7]) * (len(scales.data) - 1)

    def lose(state: dict[str, Tensor]) -> None:
        state[f"{module}.weight"].view(-1)[16:] = 0

    kept = measured(made.folder, as_its_own_source(made.folder, made.source, tmp_path / "a", lambda _: None), SAMPLES)
    lost = measured(made.folder, as_its_own_source(made.folder, made.source, tmp_path / "b", lose), SAMPLES)
    assert lost.own_errors("weight_only")[1] < 1e-5 < kept.own_errors("weight_only")[1]
    assert lost.own_errors("w4a4")[1] > kept.own_errors("w4a4")[1]
    (numbers,) = (matrix for matrix in kept.document["matrices"] if matrix["name"] == module)
    assert numbers["flushed_blocks"] == numbers["blocks"] - 1 == 511
    assert "511 flushed by Marlin" in kept.findings["matrices"].looked_at


SAMPLES = random_samples()


@pytest.mark.parametrize("arithmetic", ["weight_only", "w4a4"])
def test_a_fault_in_one_layer_shows_in_its_own_error_and_further_on_only_in_what_accumulates(
    arithmetic: str, copy: Callable[[str], Copy]
) -> None:
    made = copy("llama-ct")
    before = measured(made.folder, made.source, SAMPLES)
    change_scalar(made.folder, [f"{LAYER}.mlp.down_proj.weight_global_scale"], lambda scale: scale / 3)
    after = measured(made.folder, made.source, SAMPLES)
    own, own_after = before.own_errors(arithmetic), after.own_errors(arithmetic)
    assert (own_after[0], own_after[2]) == (own[0], own[2])
    assert own_after[1] > 3 * own[1]
    stream, stream_after = before.accumulated(arithmetic), after.accumulated(arithmetic)
    assert stream_after[0] == stream[0]
    assert stream_after[1] > 2 * stream[1] and stream_after[2] > 2 * stream[2]
    assert after.kl(arithmetic) > 2 * before.kl(arithmetic)


def test_a_fault_of_an_input_scale_shows_in_one_lane_only(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-ct")
    before = measured(made.folder, made.source, SAMPLES)
    amax = next(one["amax"] for one in before.document["inputs"] if one["name"] == f"{LAYER}.self_attn.o_proj")
    change_scalar(made.folder, [f"{LAYER}.self_attn.o_proj.input_global_scale"], lambda _: 2688 / amax * 1000)
    after = measured(made.folder, made.source, SAMPLES)
    assert after.own_errors("weight_only") == before.own_errors("weight_only")
    assert after.kl("weight_only") == before.kl("weight_only")
    assert after.own_errors("w4a4")[1] > 2 * before.own_errors("w4a4")[1]
    assert after.document["layers"][1]["w4a4"]["clipped"] > before.document["layers"][1]["w4a4"]["clipped"] == 0
    (fault,) = after.findings["inputs"].faults
    assert fault.startswith(f"{LAYER}.self_attn.o_proj: 100.0% of its input's blocks are clipped")


def numbers_of(found: Measured) -> dict[str, object]:
    return {key: found.document[key] for key in ("arithmetics", "layers", "matrices", "inputs", "nll_source")}


@pytest.mark.parametrize("name", ["llama", "gemma4_e2b"])
def test_hidden_states_that_wait_on_disk_change_nothing(
    name: str, conversions: Conversions, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    in_memory = measured(conversions(name), tiny(name), SAMPLES)
    budgets: list[HiddenBudget] = []

    def small(*_: object) -> HiddenBudget:
        budgets.append(HiddenBudget(0, 20_000, tmp_path))  # of some 36 kB a lane
        return budgets[-1]

    monkeypatch.setattr(lanes, "hidden_budget", small)
    assert numbers_of(measured(conversions(name), tiny(name), SAMPLES)) == numbers_of(in_memory)
    assert budgets
    assert list(tmp_path.iterdir()) == []  # the files had no names


def open_files(folder: Path) -> list[str]:
    """Which files of a folder this process has open."""
    gc.collect()
    links = list(Path("/proc/self/fd").iterdir())
    targets = [str(link.resolve()) for link in links if link.is_symlink()]
    return [target for target in targets if target.startswith(str(folder.resolve()))]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_both_readers_are_closed_when_something_fails(conversions: Conversions, tiny: TinyModels) -> None:
    checkpoint, source = conversions("llama"), tiny("llama")
    threads = set(threading.enumerate())

    def fail(done: int, _total: int, words: str) -> None:
        if words == "comparing layers" and done == 2:
            raise InputError("stopped on purpose")

    run = SideBySide(
        ServedModel(open_subject(checkpoint)), open_checkpoint(source), SAMPLES, ["weight_only"], "cpu", fail
    )
    with pytest.raises(InputError, match="stopped on purpose"):
        run.run()
    run.close()
    assert [thread.name for thread in set(threading.enumerate()) - threads if thread.is_alive()] == []
    assert open_files(checkpoint) == open_files(source) == []


def test_another_number_of_layers_is_refused(conversions: Conversions, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", num_layers=2)
    with pytest.raises(InputError, match=r"has 2 decoder layers, .* has 3: name the model that"):
        measured(conversions("llama"), other, SAMPLES)


def test_a_head_of_another_size_is_refused(conversions: Conversions, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", vocab_size=640)
    with pytest.raises(InputError, match="the heads of the two models have different shapes"):
        measured(conversions("llama"), other, SAMPLES)
