"""Whether a 31B and its context fit, against what is known of real cards, and the longest context that does."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvquant.bench.fit import fit, longest_context, ranks_that_fit
from nvquant.bench.subject import Subject, open_subject
from nvquant.checkpoint.source import Checkpoint, open_checkpoint
from nvquant.plan.ceiling import Ceiling
from support.conversions import Conversions, TinyModels, planned
from support.synthetic_gemma4 import write_synthetic_gemma4

GB, MIB = 10**9, 1 << 20
RTX_5090, RTX_PRO_6000 = 32607 * MIB, 97887 * MIB


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_gemma4(tmp_path_factory.mktemp("gemma") / "gemma-4-31b")


def subject_of(gemma: Path, recipe: str | None) -> Subject:
    """The 31B, or what a conversion of it would hold."""
    source = open_checkpoint(gemma)
    if recipe is None:
        return Subject(source)
    from nvquant.checkpoint.headers import Header, TensorInfo

    infos = {
        entry.name: TensorInfo(entry.name, entry.dtype, entry.shape, 0, entry.nbytes)
        for shard in planned(gemma, recipe).shards
        for entry in shard.entries
    }
    header = Header(gemma / "all.safetensors", infos, {}, 0, 0)
    return Subject(
        Checkpoint(gemma, source.config, {"all.safetensors": header}, dict.fromkeys(infos, "all.safetensors"))
    )


def test_a_32_gb_card_serves_the_full_recipe_at_64k_with_an_fp8_cache_and_the_mlp_recipe_not(gemma: Path) -> None:
    full, mlp = (fit(subject_of(gemma, recipe), 65536, RTX_5090, 1) for recipe in ("nvfp4-full", "nvfp4"))
    assert full.fits and full.fits_by_default
    assert not mlp.fits and mlp.longest == {"16 bits": 0, "fp8": 0}
    assert round(full.weights_bytes / GB, 1) == 20.4  # the vision tower included
    assert round(full.kv_bytes / GB, 1) == 3.1
    assert full.needed_bytes == full.weights_bytes + full.kv_bytes + full.other_bytes


def test_the_longest_context_just_fits(gemma: Path) -> None:
    subject = subject_of(gemma, "nvfp4-full")
    found = fit(subject, 8192, RTX_5090, 2)
    longest = found.longest["16 bits"]
    assert 8192 < longest < found.longest["fp8"] <= 262144
    assert fit(subject, longest, RTX_5090, 2).fits
    assert not fit(subject, longest + 1, RTX_5090, 2).fits


def test_a_card_with_room_for_all_is_limited_by_the_model(gemma: Path) -> None:
    assert fit(subject_of(gemma, "nvfp4-full"), 8192, RTX_PRO_6000, 1).longest["fp8"] == 262144


def test_no_room_is_no_context(gemma: Path) -> None:
    subject = subject_of(gemma, None)
    assert longest_context(subject, -1, 2) == 0
    assert longest_context(subject, 10**6, 2) == 0


def test_weights_and_cache_are_split_over_ranks(gemma: Path) -> None:
    subject = subject_of(gemma, None)
    one, two = (fit(subject, 8192, RTX_5090, 2, ranks) for ranks in (1, 2))
    assert two.weights_bytes == -(-one.weights_bytes // 2)
    assert two.kv_bytes == one.kv_bytes // 2
    assert ranks_that_fit(subject, 8192, RTX_5090, 2) == 4  # 31 GB of weights leave no room on two
    assert ranks_that_fit(subject, 8192, RTX_PRO_6000, 2) == 1
    assert ranks_that_fit(subject, 8192, 4 * GB, 2) is None


def test_a_cpu_holds_packed_weights_decoded(tmp_path: Path) -> None:
    tiny = TinyModels(tmp_path)
    source, packed = tiny("llama"), Conversions(tiny, tmp_path)("llama", "nvfp4-full")
    bf16, subject = open_subject(source), open_subject(packed)
    scales = sum(info.nbytes for name, info in subject.infos.items() if "scale" in name)
    assert subject.decoded_bytes == bf16.weights_bytes + scales
    assert subject.weights_bytes < bf16.weights_bytes == bf16.decoded_bytes
    assert (bf16.scheme, subject.scheme) == ("BF16", "NVFP4 W4A4")
    assert fit(subject, 64, GB, 2, is_cpu=True).weights_bytes == subject.decoded_bytes


@pytest.mark.parametrize(
    ("recipe", "layout", "scheme", "arithmetic"),
    [
        ("nvfp4-full", "compressed-tensors", "NVFP4 W4A4", "w4a4"),
        ("nvfp4-full", "modelopt", "NVFP4 W4A4", "w4a4"),
        ("nvfp4-a16", "compressed-tensors", "NVFP4 weight-only", "weight_only"),
    ],
)
def test_what_a_checkpoint_is_for_known_faults(
    tmp_path: Path, recipe: str, layout: str, scheme: str, arithmetic: str
) -> None:
    subject = open_subject(Conversions(TinyModels(tmp_path), tmp_path)("llama", recipe, layout))
    situation = subject.situation("0.32.0", (9, 0), False, "fp8", tensor_parallel=2)
    assert subject.scheme == scheme
    assert situation.arithmetics == {arithmetic}
    assert (situation.layout, situation.model_type, situation.has_experts) == (layout, "llama", False)
    assert situation.has_fp8_kv_cache and not situation.is_blackwell


def test_the_ceiling_of_a_converted_checkpoint_reads_less(tmp_path: Path) -> None:
    tiny = TinyModels(tmp_path)
    ceilings: list[Ceiling] = [
        open_subject(folder).ceiling("auto")
        for folder in (tiny("llama"), Conversions(tiny, tmp_path)("llama", "nvfp4-full"))
    ]
    assert ceilings[0].weight_bytes > ceilings[1].weight_bytes > 0
    assert ceilings[0].tokens_per_second(1e12, 10) < ceilings[1].tokens_per_second(1e12, 10)
