"""What a sweep measures is the loss of the checkpoint that a conversion of this group alone writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from nvquant.recipe.schema import QuantizeEntry, Recipe
from nvquant.sweep.document import SweepDocument
from nvquant.sweep.walking import Subject
from support.conversions import COMPRESSED_TENSORS, MODELOPT, TinyModels, converted, random_samples
from support.emulation import load_emulation
from sweep.sweeping import sweep_of


def logprobs(model: transformers.PreTrainedModel) -> list[torch.Tensor]:
    """float64 [tokens - 1, vocabulary] of each sequence."""
    with torch.no_grad():
        return [
            model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            for ids in random_samples()
        ]


def divergence(source: Path, checkpoint: Path) -> float:
    """The mean KL divergence, of the models as transformers computes them in float32."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    pairs = zip(logprobs(whole), logprobs(load_emulation(checkpoint)), strict=True)
    return float(torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in pairs]).mean())


def alone(members: tuple[str, ...], scheme: str) -> Recipe:
    return Recipe(name="alone", quantize=(QuantizeEntry(modules=members, scheme=scheme),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "layout", "layers"),
    [
        ("llama", COMPRESSED_TENSORS, (2,)),
        pytest.param("qwen3", MODELOPT, (1,), marks=pytest.mark.thorough),
        pytest.param("gemma4_text", COMPRESSED_TENSORS, (4, 5), marks=pytest.mark.thorough),
        ("phi3", MODELOPT, (1,)),
    ],
)
def test_a_group_alone_loses_what_its_own_conversion_loses(
    tiny: TinyModels, tmp_path: Path, name: str, layout: str, layers: tuple[int, ...]
) -> None:
    document = sweep_of(tiny(name), tmp_path / "sweep", layout=layout).measure()
    groups = [group for group in document.groups if group.layer in layers]
    assert len(groups) == 4 * len(layers)
    for group in groups:
        for scheme in ("nvfp4", "fp8"):
            made = converted(
                tiny(name), tmp_path / f"{group.name}-{scheme}", alone(group.members, scheme), layout, "mse"
            )
            expected = divergence(tiny(name), made)
            assert group.forms[scheme].kl == pytest.approx(expected, rel=0.02, abs=1e-7), (group.name, scheme)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(("name", "layout"), [("llama", COMPRESSED_TENSORS), ("gemma4_text", MODELOPT)])
def test_all_groups_together_lose_what_the_conversion_of_the_recipe_loses(
    tiny: TinyModels, tmp_path: Path, name: str, layout: str, fold: bool
) -> None:
    document = sweep_of(tiny(name), tmp_path / "sweep", layout=layout, fold=fold).measure()
    made = converted(tiny(name), tmp_path / "out", "nvfp4-full", layout, "mse", fold=fold)
    assert document.ends[0] == pytest.approx(divergence(tiny(name), made), rel=0.02)
    assert document.ends[1] < 0.3 * document.ends[0]
    assert (document.residual is not None) is fold


def test_folds_are_part_of_what_a_group_alone_loses(tiny: TinyModels, tmp_path: Path) -> None:
    plain = sweep_of(tiny("llama"), tmp_path / "plain").measure()
    folded = sweep_of(tiny("llama"), tmp_path / "folded", fold=True).measure()
    pairs = [(a.forms["nvfp4"].kl, b.forms["nvfp4"].kl) for a, b in zip(plain.groups, folded.groups, strict=True)]
    assert all(a != b for a, b in pairs)
    assert all(0.3 < b / a < 3 for a, b in pairs)


def measured_in_windows(
    source: Path, folder: Path, lanes: int, monkeypatch: pytest.MonkeyPatch, fold: bool
) -> SweepDocument:
    monkeypatch.setattr(Subject, "most_lanes", lambda _self: lanes)
    return sweep_of(source, folder, fold=fold).measure()


@pytest.mark.parametrize(("name", "fold"), [("llama", True), ("gemma4_e2b", False)])
def test_windows_of_any_size_give_the_same_numbers(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fold: bool
) -> None:
    """The layers of gemma4_e2b also hand keys and values to later layers."""
    at_once = measured_in_windows(tiny(name), tmp_path / "a", 1000, monkeypatch, fold)
    one_by_one = measured_in_windows(tiny(name), tmp_path / "b", 0, monkeypatch, fold)
    some = measured_in_windows(tiny(name), tmp_path / "c", 1 + 2 + 16, monkeypatch, fold)
    assert at_once == one_by_one == some


def test_a_window_holds_as_many_layers_as_the_memory(tiny: TinyModels, tmp_path: Path) -> None:
    class Roomy(Subject):
        lanes = 0

        def most_lanes(self) -> int:
            return self.lanes

    sweep = sweep_of(tiny("llama"), tmp_path)
    subject = sweep._subject(sweep._begun())
    for lanes, has_ends, expected in ((0, True, [0]), (18, True, [0]), (19, True, [0, 1]), (17, False, [0, 1])):
        roomy = Roomy(**vars(subject))
        Roomy.lanes = lanes
        assert roomy.window([0, 1, 2], has_ends) == expected
    assert subject.most_lanes() > 1000
