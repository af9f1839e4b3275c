"""Known faults are told to those whom they concern, by version, GPU and checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
from nvquant.serving.faults import KNOWN_FAULTS, Situation, known_faults, version_key

GEMMA_ON_PRO_6000 = Situation(
    vllm="0.32.0",
    capability=(12, 0),
    model_type="gemma4_text",
    layout="compressed-tensors",
    arithmetics=frozenset({"w4a4"}),
    is_tied=True,
    columns_per_rank=frozenset({5376, 8192, 21504}),
)


def sources(situation: Situation) -> str:
    return "; ".join(fault.source for fault in known_faults(situation))


def test_a_good_combination_has_no_known_fault() -> None:
    assert known_faults(GEMMA_ON_PRO_6000) == []
    assert known_faults(Situation(vllm="0.32.0", is_cpu=True, arithmetics=frozenset({"w4a4"}))) == []


def test_a_fault_ends_with_the_version_that_repairs_it() -> None:
    assert "issue 55397" in sources(replace(GEMMA_ON_PRO_6000, vllm="0.31.2"))
    assert "issue 55397" not in sources(replace(GEMMA_ON_PRO_6000, vllm="0.32.0"))
    assert "issue 55397" not in sources(replace(GEMMA_ON_PRO_6000, vllm="0.25.0"))


def test_tied_models_in_the_modelopt_layout() -> None:
    tied = Situation(vllm="0.24.0", capability=(9, 0), layout="modelopt", is_tied=True)
    assert "issue 48238" in sources(tied)
    assert "issue 48238" not in sources(replace(tied, layout="compressed-tensors"))
    assert "issue 48238" not in sources(replace(tied, is_tied=False))


def test_columns_that_no_longer_divide_after_splitting() -> None:
    assert "issue 48898" in sources(replace(GEMMA_ON_PRO_6000, columns_per_rank=frozenset({2688, 1000})))


def test_the_fp8_cache_of_gemma4_on_blackwell_and_hopper() -> None:
    fp8 = replace(GEMMA_ON_PRO_6000, vllm="0.28.0", kv_cache_dtype="fp8")
    assert "issue 51828" in sources(fp8)
    assert "PRs 48666" in sources(replace(fp8, capability=(9, 0)))
    assert "PR 46329" in sources(replace(fp8, kv_cache_dtype="nvfp4"))


def test_an_unknown_version_gets_only_what_no_version_is_known_to_repair() -> None:
    unknown = replace(GEMMA_ON_PRO_6000, vllm=None, columns_per_rank=frozenset({1000}))
    assert [fault.fixed_in for fault in known_faults(unknown)] == [None]


@pytest.mark.parametrize(
    ("version", "key"),
    [("0.32.0", (0, 32, 0)), ("0.32.0+cpu", (0, 32, 0)), ("v0.33.0rc1", (0, 33, 0)), ("dev", None), (None, None)],
)
def test_versions_are_compared_by_their_numbers(version: str | None, key: tuple[int, ...] | None) -> None:
    assert version_key(version) == key


def test_every_fault_says_where_it_is_told() -> None:
    assert all(fault.source and not fault.hint.endswith(".") for fault in KNOWN_FAULTS)
