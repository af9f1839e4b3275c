"""What of the source's card data is kept, what is new, and that no card breaks it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from nvquant.publish.frontmatter import card_data, split_card

SOURCE: dict[str, Any] = {
    "license": "other",
    "license_name": "gemma",
    "license_link": "https://example.org/terms",
    "language": ["en", "de"],
    "tags": ["text-generation", "bf16", "PyTorch"],
    "pipeline_tag": "image-text-to-text",
    "library_name": "transformers",
    "datasets": ["org/corpus"],
    "base_model": "org/pretrained",
    "base_model_relation": "finetune",
    "model-index": [{"name": "x", "results": []}],
    "metrics": ["accuracy"],
    "extra_gated_prompt": "You agree to everything.",
    "new_version": "org/next",
}


def made(source: dict[str, Any], base_model: str | None = "org/base", layout: str = "compressed-tensors") -> Any:
    return yaml.safe_load(card_data(source, base_model, layout))


def test_what_is_still_true_of_the_source_is_kept() -> None:
    data = made(SOURCE)
    kept = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name", "datasets")
    assert {key: data[key] for key in kept} == {key: SOURCE[key] for key in kept}
    assert data["tags"] == ["text-generation", "nvfp4", "compressed-tensors", "vllm", "nvquant"]


def test_results_relations_and_gates_of_the_source_are_dropped() -> None:
    data = made(SOURCE)
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "quantized")
    assert not set(data) & {"model-index", "metrics", "extra_gated_prompt", "new_version"}


def test_a_source_that_is_not_known_is_not_named() -> None:
    data = made(SOURCE, base_model=None)
    assert not set(data) & {"base_model", "base_model_relation"}
    assert data["license"] == "other"


def test_the_modelopt_layout_is_for_vllm_since_transformers_does_not_read_it() -> None:
    data = made(SOURCE, layout="modelopt")
    assert data["library_name"] == "vllm" and "modelopt" in data["tags"] and "compressed-tensors" not in data["tags"]
    assert made({})["library_name"] == "vllm"


def test_norwegian_stays_a_language() -> None:
    source, _ = split_card("---\nlanguage:\n- en\n- no\n---\n")
    assert source["language"] == ["en", False]  # so YAML 1.1 reads it
    assert made(source)["language"] == ["en", "no"]
    assert made({"language": False})["language"] == "no"


@pytest.mark.parametrize("tags", [None, 7, "alone", [None, 3, "alone", {"a": 1}]])
def test_tags_of_any_form_become_a_list(tags: Any) -> None:
    assert [tag for tag in made({"tags": tags})["tags"] if tag != "alone"] == [
        *("nvfp4", "compressed-tensors", "vllm", "nvquant")
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no data",
        "---\nunclosed: 1\n",
        "---\n: : [\n---\nbody",
        "---\n- a list\n---\nbody",
        "---\n2001-99-99\n---\n",
    ],
)
def test_a_card_without_readable_data_has_none(text: str) -> None:
    assert split_card(text)[0] == {}


def test_a_card_is_split_into_data_and_body() -> None:
    assert split_card("\ufeff---\r\nlicense: mit\r\n---\r\n# Title\r\n---\r\n") == (
        {"license": "mit"},
        "# Title\r\n---\r\n",
    )
    assert split_card("# Title\n---\na: 1\n---\n") == ({}, "# Title\n---\na: 1\n---\n")


@pytest.mark.parametrize("key", ["ignore_metadata_errors", "eval_results", "model_name", "12", "a: b\n---"])
def test_no_key_of_the_source_gets_out_of_the_data(key: str) -> None:
    text = card_data({key: "x"}, "org/base", "modelopt")
    assert set(yaml.safe_load(text)) <= {"tags", "library_name", "base_model", "base_model_relation", key}
    assert "\n---" not in text
