"""Distillation of tiny checkpoints: its gain, its gate, its bytes, its resumption and its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.checkpoint.source import Checkpoint, open_checkpoint
from nvquant.convert.relayout import relayout
from nvquant.convert.stop import Stopped, StopRequest
from nvquant.distill.options import DistillOptions
from nvquant.distill.resident import padded
from nvquant.distill.run import distill
from nvquant.distill.student import Student
from nvquant.distill.training import Training
from nvquant.errors import EnvironmentLack, InputError
from nvquant.format.layouts import LAYOUTS
from nvquant.stream.manifest import MANIFEST_NAME
from nvquant.verify.numerics.served import ServedModel
from nvquant.verify.structure import verify_structure
from nvquant.verify.subject import open_subject
from support.conversions import Conversions, TinyModels, contents, converted, random_samples
from support.distilling import LENGTH, distilled, options_of, write_text
from support.emulation import load_emulation
from torch import Tensor


@pytest.fixture(scope="module")
def make(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Conversions:
    return Conversions(tiny, tmp_path_factory.mktemp("conversions"))


def tensors(folder: Path) -> dict[str, bytes]:
    checkpoint = open_checkpoint(folder)
    return {name: b"".join(bytes(piece) for piece in checkpoint.pieces(name)) for name in checkpoint.infos()}


def changed(one: Path, other: Path) -> set[str]:
    before, after = tensors(one), tensors(other)
    assert list(before) == list(after)
    return {name for name, data in before.items() if after[name] != data}


def without_manifest_and_shards(folder: Path) -> dict[str, str]:
    return {
        name: digest
        for name, digest in contents(folder).items()
        if name != MANIFEST_NAME and not name.endswith(".safetensors")
    }


def failures(folder: Path, source: Path) -> list[str]:
    return [check.detail for check in verify_structure(folder, source).checks if not check.passed]


def emulated(folder: Path, batch: Tensor) -> Tensor:
    """The logits by the judge that shares no code with nvquant."""
    with torch.no_grad():
        logits: Tensor = load_emulation(folder)(input_ids=batch, use_cache=False).logits
    return logits


def divergence(source: Path, folder: Path, samples: list[Tensor]) -> float:
    """Mean KL divergence in nats, of the last tokens too, by the judge."""
    total = count = 0.0
    for ids in samples:
        p, q = (emulated(one, ids[None])[0].double().log_softmax(-1) for one in (source, folder))
        total += float((p.exp() * (p - q)).sum())
        count += len(ids)
    return total / count


@pytest.mark.parametrize(("name", "recipe"), [("llama", "nvfp4-full"), ("qwen3", "nvfp4-a16")])
def test_it_gains_on_text_that_it_has_not_seen(
    make: Conversions, tiny: TinyModels, tmp_path: Path, name: str, recipe: str
) -> None:
    source, checkpoint, output = tiny(name), make(name, recipe), tmp_path / "out"
    record = distilled(checkpoint, source, output, 24, on_other_text=True, scale_rate=0.012, norm_rate=0.006).record
    assert record.is_kept, record.reason
    assert set(record.heldout) == {"even", "odd"}
    assert record.total.after < 0.95 * record.total.before  # type: ignore[operator]
    samples = random_samples([LENGTH] * 8, seed=99)  # and the judge that shares no code agrees
    assert divergence(source, output, samples) < 0.95 * divergence(source, checkpoint, samples)


@pytest.mark.parametrize(
    ("name", "recipe", "layout", "quantizer"),
    [
        ("llama", "nvfp4-full", "compressed-tensors", "gptq"),
        ("llama", "nvfp4-full", "modelopt", "rtn"),
        ("gemma4", "nvfp4-fp8", "modelopt", "mse"),
        ("qwen3", "nvfp4-a16", "compressed-tensors", "mse"),
    ],
)
def test_only_block_scales_and_norms_change_and_every_check_passes(
    make: Conversions, tiny: TinyModels, tmp_path: Path, name: str, recipe: str, layout: str, quantizer: str
) -> None:
    source, checkpoint, output = tiny(name), make(name, recipe, layout, quantizer), tmp_path / "out"
    record = distilled(checkpoint, source, output).record
    assert record.is_kept, record.reason
    names = changed(checkpoint, output)
    assert names == {f"{module}.weight_scale" for module in record.scales} | set(record.norms)
    assert len(record.scales) > 2
    assert record.norms
    assert all("norm" in norm for norm in record.norms)
    dtypes = {name: info.dtype for name, info in open_checkpoint(checkpoint).infos().items()}
    assert {dtypes[name] for name in names} == {"F8_E4M3", "BF16"}
    assert without_manifest_and_shards(output) == without_manifest_and_shards(checkpoint)
    assert failures(output, source) == []
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    assert manifest["distillation"] == record.as_json()
    if recipe != "nvfp4-fp8":  # whose FP8 has another form in the other layout
        target = "modelopt" if layout == "compressed-tensors" else "compressed-tensors"
        relayout(open_checkpoint(output), LAYOUTS[target], tmp_path / "other")
        assert failures(tmp_path / "other", source) == []


def test_folds_and_another_order_of_channels_stay_proved(tiny: TinyModels, tmp_path: Path) -> None:
    source = tiny("llama")
    checkpoint = converted(source, tmp_path / "folded", quantizer="gptq", fold=True)
    record = distilled(checkpoint, source, tmp_path / "out").record
    assert record.is_kept, record.reason
    assert record.norms
    checks = {check.name: check for check in verify_structure(tmp_path / "out", source).checks}
    assert [check.detail for check in checks.values() if not check.passed] == []
    assert checks["folds"].detail.startswith("12 folds")
    assert checks["distilled"].detail.startswith("3,898 tokens in 8 steps, held-out KL 0.")


def test_the_trained_model_computes_what_the_output_stores(
    make: Conversions, tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_text(tmp_path / "rows.jsonl", 3, 3)
    batch, _ = padded([torch.tensor(json.loads(row)["input_ids"]) for row in text.read_text().splitlines()])
    seen: list[Tensor] = []
    close = Student.close

    def see(student: Student) -> None:
        with torch.no_grad():
            seen.append(student.logits(student.hidden(batch).flatten(0, 1), student.resident.head_rows.float()))
        close(student)

    monkeypatch.setattr(Student, "close", see)
    for checkpoint in (make("llama"), make("gemma4", "nvfp4-fp8", "modelopt", "mse")):
        output = tmp_path / checkpoint.name
        assert distilled(checkpoint, tiny(checkpoint.name.partition("-")[0]), output).record.is_kept
        monkeypatch.setattr(Student, "close", close)
        ids = torch.arange(512)
        again = Student(ServedModel(open_subject(output)), ids, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            stored = again.logits(again.hidden(batch).flatten(0, 1), again.resident.head_rows.float())
        again.close()
        monkeypatch.setattr(Student, "close", see)
        assert torch.equal(stored, seen.pop())
        torch.testing.assert_close(stored, emulated(output, batch).flatten(0, 1), rtol=1e-3, atol=1e-3)


def test_a_harmful_training_is_refused_and_nothing_changes(make: Conversions, tiny: TinyModels, tmp_path: Path) -> None:
    checkpoint, output = make("llama"), tmp_path / "out"
    record = distilled(checkpoint, tiny("llama"), output, steps=6, scale_rate=5.0, norm_rate=3.0).record
    assert not record.is_kept
    assert record.reason.startswith("the kind even lost (KL 0.")
    assert (record.scales, record.norms) == ({}, {})
    assert changed(checkpoint, output) == set()
    before, after = (json.loads((one / MANIFEST_NAME).read_text()) for one in (checkpoint, output))
    assert after.pop("distillation") == record.as_json()
    assert before == after
    assert failures(output, tiny("llama")) == []


class StopAfter(StopRequest):
    """A signal that arrives while a number of steps is done."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def count(self, done: int, _total: int, phase: str) -> None:
        if phase.startswith("distilling") and done == self.steps:
            self.number = 15


class KilledError(Exception):
    pass


def killed_after(steps: int) -> Callable[[int, int, str], None]:
    def progress(done: int, _total: int, phase: str) -> None:
        if phase.startswith("distilling") and done == steps:
            raise KilledError

    return progress


def test_a_run_that_ended_early_resumes_and_gives_the_same_bytes(
    make: Conversions, tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, source = make("llama"), open_checkpoint(tiny("llama"))
    options = options_of(tmp_path / "a", steps=8)
    distill(checkpoint, source, options)
    whole = contents(tmp_path / "a")
    steps: list[int] = []
    step = Training._step

    def counted(training: Training, samples: Any) -> float:
        steps.append(len(samples))
        return step(training, samples)

    monkeypatch.setattr(Training, "_step", counted)
    output = replace(options, output=tmp_path / "b", snapshot_steps=3)
    with pytest.raises(KilledError):
        distill(checkpoint, source, replace(output, progress=killed_after(5)))
    assert not (tmp_path / "b").exists()
    stop = StopAfter(6)
    with pytest.raises(Stopped, match=r"Stopped after step 6 of 8\. To resume, run the same command again\."):
        distill(checkpoint, source, replace(output, stop=stop, progress=stop.count))
    assert not distill(checkpoint, source, output).was_finished
    assert len(steps) == 5 + 3 + 2  # from step 0, from the snapshot behind step 3, from the one at the signal
    assert contents(tmp_path / "b") == whole
    assert not (tmp_path / "b.partial").exists()
    assert distill(checkpoint, source, output).was_finished
    assert len(steps) == 10
    with pytest.raises(InputError, match="contains the finished checkpoint of another run: choose another folder, or"):
        distill(checkpoint, source, replace(output, seed=7, tokens=options.tokens // 2))


def test_a_damaged_snapshot_costs_only_time(make: Conversions, tiny: TinyModels, tmp_path: Path) -> None:
    checkpoint, source = make("llama"), open_checkpoint(tiny("llama"))
    options = options_of(tmp_path / "a", steps=5)
    distill(checkpoint, source, options)
    other = replace(options, output=tmp_path / "b", snapshot_steps=2)
    with pytest.raises(KilledError):
        distill(checkpoint, source, replace(other, progress=killed_after(4)))
    (snapshot,) = (tmp_path / "b.partial" / "nvquant_run").glob("training-*.safetensors")
    snapshot.write_bytes(snapshot.read_bytes()[:-1] + b"x")
    distill(checkpoint, source, other)
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_the_other_run_of_a_partial_folder_is_not_resumed(make: Conversions, tiny: TinyModels, tmp_path: Path) -> None:
    checkpoint, source = make("llama"), open_checkpoint(tiny("llama"))
    options = options_of(tmp_path / "a", steps=5)
    with pytest.raises(KilledError):
        distill(checkpoint, source, replace(options, snapshot_steps=1, progress=killed_after(3)))
    with pytest.raises(InputError, match=r"contains another run \(distill\.rates is .*--restart to begin anew"):
        distill(checkpoint, source, replace(options, scale_rate=0.5))
    assert not distill(checkpoint, source, replace(options, restart=True)).was_finished


def refused(checkpoint: Path, source: Checkpoint | Path, output: Path, **changes: Any) -> str:
    source = open_checkpoint(source) if isinstance(source, Path) else source
    with pytest.raises((InputError, EnvironmentLack)) as error:
        distill(checkpoint, source, replace(options_of(output, steps=2), **changes))
    assert not output.exists()
    assert not output.with_name(f"{output.name}.partial").exists()
    assert error.value.hint
    return str(error.value)


def test_wrong_requests_are_refused_in_one_sentence(make: Conversions, tiny: TinyModels, tmp_path: Path) -> None:
    checkpoint, source, output = make("llama"), tiny("llama"), tmp_path / "out"
    assert "is not quantized" in refused(source, source, output)
    assert "was not made from" in refused(checkpoint, tiny("qwen3"), output)
    assert "is quantized" in refused(checkpoint, checkpoint, output)
    words = refused(checkpoint, source, output, memory_budget_bytes=1_000_000)
    assert "GB of host memory, but 0.00 GB may be used: use a larger GPU" in words
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for path in checkpoint.iterdir():
        if path.name != MANIFEST_NAME:
            (foreign / path.name).write_bytes(path.read_bytes())
    assert "nvquant distills only its own checkpoints" in refused(foreign, source, output)
    with pytest.raises(InputError, match="fewer than one sequence of 64"):
        replace(options_of(output), tokens=63)
    with pytest.raises(InputError, match="is the checkpoint itself: choose another folder"):
        distill(checkpoint, open_checkpoint(source), replace(options_of(tmp_path / "x"), output=checkpoint))


def test_a_distilled_checkpoint_is_not_distilled_again(make: Conversions, tiny: TinyModels, tmp_path: Path) -> None:
    source = tiny("llama")
    assert distilled(make("llama"), source, tmp_path / "a").record.is_kept
    assert "is distilled already" in refused(tmp_path / "a", source, tmp_path / "b")
    options: DistillOptions = replace(options_of(tmp_path / "a"), is_in_place=True)
    assert distill(tmp_path / "a", open_checkpoint(source), options).was_finished
