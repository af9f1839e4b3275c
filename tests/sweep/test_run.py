"""A sweep in its folder: it resumes, refuses another one, and its recipes are those of its budgets."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from nvquant.checkpoint.source import open_checkpoint
from nvquant.convert.config import quantization_config
from nvquant.errors import InputError
from nvquant.recipe.load import load_recipe
from nvquant.recipe.schema import Recipe
from nvquant.serving.server import ServeOptions
from nvquant.sweep import run
from nvquant.sweep.candidates import candidates_of
from nvquant.sweep.document import SweepDocument
from nvquant.sweep.output import write_results
from nvquant.sweep.recipes import as_yaml, recipe_for
from nvquant.sweep.targets import Target
from nvquant.sweep.walking import Subject, Window
from nvquant.verify.numerics.stage import NumericsOptions
from nvquant.verify.run import Verification, VerifyOptions
from support.conversions import COMPRESSED_TENSORS, MODELOPT, TinyModels, converted, planned, random_samples
from support.emulation import load_emulation, token_logprobs
from sweep.sweeping import sweep_of

LAYOUTS = (COMPRESSED_TENSORS, MODELOPT)


class Killed(BaseException):
    """Ends a sweep at any point."""


@pytest.mark.parametrize("fold", [False, True])
def test_a_sweep_that_ended_resumes_behind_its_last_window(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fold: bool
) -> None:
    monkeypatch.setattr(Subject, "most_lanes", lambda _self: 0)
    whole = sweep_of(tiny("llama"), tmp_path / "whole", fold=fold).measure()
    made: list[frozenset[int]] = []

    class Watched(Window):
        def run(self) -> run.Measured:  # type: ignore[name-defined]
            made.append(self._layers)
            if len(made) == 3:
                raise Killed
            return super().run()

    monkeypatch.setattr(run, "Window", Watched)
    with pytest.raises(Killed):
        sweep_of(tiny("llama"), tmp_path / "out", fold=fold).measure()
    kept = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert {group["layer"] for group in kept["groups"]} == {0, 1}
    assert sweep_of(tiny("llama"), tmp_path / "out", fold=fold).measure() == whole
    assert made == [{0}, {1}, {2}, {2}]
    assert (tmp_path / "out" / "sweep.json").read_bytes() == (tmp_path / "whole" / "sweep.json").read_bytes()


def test_a_finished_sweep_is_not_measured_again_for_other_budgets(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_of(tiny("llama"), tmp_path)
    first, _ = sweep.choose(sweep.measure(), [Target("bits", 5.0)])
    monkeypatch.setattr(run, "Window", None)
    again = sweep_of(tiny("llama"), tmp_path)
    second, _ = again.choose(again.measure(), [Target("bits", 6.0), Target("kl", first.ends[0])])
    assert (second.groups, second.ends, second.curve) == (first.groups, first.ends, first.curve)
    assert [recipe.name for recipe in second.recipes] == [
        "nvfp4-full-6bits", f"nvfp4-full-kl{first.ends[0]:g}"
    ]  # fmt: skip


def test_another_sweep_or_foreign_files_in_the_folder_are_refused(tiny: TinyModels, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    sweep_of(tiny("llama"), folder).measure()
    for other in ({"quantizer": "rtn"}, {"fold": True}, {"samples": random_samples((9,))}, {"layout": MODELOPT}):
        with pytest.raises(InputError, match="contains another sweep"):
            sweep_of(tiny("llama"), folder, **other).measure()  # type: ignore[arg-type]
    folded = tmp_path / "folded"
    sweep_of(tiny("llama"), folded, fold=True).measure()
    with pytest.raises(InputError, match="contains another sweep"):
        sweep_of(tiny("llama"), folded).measure()
    assert sweep_of(tiny("llama"), folded, restart=True).measure() == sweep_of(tiny("llama"), folder).measure()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="exists, but nvquant sweep did not write it"):
        sweep_of(tiny("llama"), tmp_path / "foreign").measure()
    (folder / "sweep.json").write_text('{"groups": 3}')
    with pytest.raises(InputError, match=r"sweep\.json|another sweep"):
        sweep_of(tiny("llama"), folder).measure()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recipes_keep_their_budgets_and_load_from_their_files(tiny: TinyModels, tmp_path: Path, layout: str) -> None:
    source, base = tiny("gemma4_text"), planned(tiny("gemma4_text"), "nvfp4-full", layout)
    sweep = sweep_of(source, tmp_path, layout=layout)
    size = base.file_bytes + 30_000
    document, found = sweep.choose(
        sweep.measure(), [Target("bits", 5.5), Target("size", size), Target("kl", 0.5 * sweep.measure().ends[0])]
    )
    write_results(tmp_path, document, found)
    for one in found:
        recipe = load_recipe(str(tmp_path / one.record.file))
        assert recipe == one.recipe
        plan = planned(source, recipe, layout)
        schemes = {group.name: plan.selection.schemes[group.members[0]] for group in plan.groups}
        counts = [list(schemes.values()).count(scheme) for scheme in ("nvfp4", "fp8")]
        assert counts == [one.record.groups.get(scheme, 0) for scheme in ("nvfp4", "fp8")]
        assert plan.file_bytes == one.record.file_bytes
        stored = sum(c.weight_bytes[schemes.get(c.group.name, "bf16")] for c in candidates_of(base))
        assert one.record.bits == pytest.approx(8 * stored / sum(c.weights for c in candidates_of(base)))
    bits, sized, kl = (one.record for one in found)
    assert 5.0 < bits.bits <= 5.5
    assert base.file_bytes < sized.file_bytes <= size
    assert kl.kl <= 0.5 * document.ends[0] < document.ends[0]
    lines = (tmp_path / "curve.csv").read_text().splitlines()
    assert len(lines) == 1 + len(document.curve)
    assert (tmp_path / "curve.svg").read_text().count('class="chosen"') == 3


def test_bits_are_four_and_a_half_in_nvfp4_and_eight_in_fp8(tiny: TinyModels) -> None:
    for layout, fp8 in ((COMPRESSED_TENSORS, None), (MODELOPT, 8.0)):
        for candidate in candidates_of(planned(tiny("llama"), "nvfp4-full", layout)):
            bits = {scheme: 8 * size / candidate.weights for scheme, size in candidate.weight_bytes.items()}
            assert (bits["nvfp4"], bits["bf16"]) == (4.5, 16)
            columns = 128 if candidate.group.name.endswith("down_proj") else 64
            assert bits["fp8"] == (fp8 or 8 + 32 / columns)  # a float32 scale for each row


@pytest.mark.parametrize(
    "name",
    ["llama", "gemma4_text", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("gemma4", "phi3", "qwen2"))],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_choice_has_a_recipe_whose_config_vllm_reads_as_planned(tiny: TinyModels, layout: str, name: str) -> None:
    plan = planned(tiny(name), "nvfp4-full", layout)
    candidates = candidates_of(plan)
    draw = random.Random(name)
    for _ in range(12):
        schemes = {c.group.name: draw.choice(["nvfp4", "fp8", "bf16"]) for c in candidates}
        recipe = recipe_for(plan, candidates, schemes, "any", "words")
        again = Recipe.model_validate(load_yaml(as_yaml(recipe)))
        made = planned(tiny(name), again, layout)
        assert {group.name: made.selection.schemes[group.members[0]] for group in made.groups} == {
            group: scheme for group, scheme in schemes.items() if scheme != "bf16"
        }
        config = quantization_config(made)  # it compares vLLM's reading with the plan
        targets = [target for group in config["config_groups"].values() for target in group["targets"]]
        assert len(set(targets)) == len(targets)


def load_yaml(text: str) -> object:
    import yaml

    return yaml.safe_load(text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mixed_checkpoint_passes_verification(tiny: TinyModels, tmp_path: Path, layout: str) -> None:
    source = tiny("gemma4_text")
    sweep = sweep_of(source, tmp_path / "sweep", layout=layout, fold=True)
    document, (mixed,) = sweep.choose(sweep.measure(), [Target("bits", 9.0)])
    assert set(mixed.record.groups) == {"nvfp4", "fp8", "bf16"} or set(mixed.record.groups) == {"fp8", "bf16"}
    assert mixed.recipe.fold == "auto"
    made = converted(source, tmp_path / "out", mixed.recipe, layout, "mse", fold=True)
    report = verified(made, source, tmp_path)
    assert report.passed, [check.detail for check in report.checks if not check.passed]
    assert isinstance(document, SweepDocument)
    if layout == COMPRESSED_TENSORS:
        assert_transformers_reads(made)


def assert_transformers_reads(checkpoint: Path) -> None:
    """transformers decodes each module under the config group that its name matches."""
    ids = random_samples((40,))[0].tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    own, expected = (torch.tensor(token_logprobs(one, ids)) for one in (model, load_emulation(checkpoint)))
    assert float((own - expected).abs().mean()) < 0.05


def verified(made: Path, source: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    from support.conversions import write_ids

    ids = write_ids(tmp_path / "ids.jsonl", random_samples((40, 40)))
    options = VerifyOptions(
        ("structure", "numerics"), NumericsOptions(ids, 2, 40), ServeOptions(), None, False
    )  # fmt: skip
    verification = Verification(made, open_checkpoint(source), options, lambda *_: None)
    for _ in verification.run():
        pass
    return verification.report()


def test_a_quantized_head_is_no_group_and_stays_in_the_recipe(tiny: TinyModels, tmp_path: Path) -> None:
    recipe = load_recipe("nvfp4-full").model_copy(update={"head": "fp8"})
    sweep = sweep_of(tiny("llama"), tmp_path, recipe)
    document, (one,) = sweep.choose(sweep.measure(), [Target("bits", 6.0)])
    assert one.recipe.head == "fp8"
    assert all("lm_head" not in group.name for group in document.groups)
