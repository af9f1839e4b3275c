"""What stands ready: a token that is never shown, disk, transformers' table of models, the environment of a vLLM."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from nvquant.bench.inspection import (
    free_bytes,
    hub_cache,
    hub_token,
    installed,
    is_known_to_transformers,
    look_into,
)
from nvquant.serving.command import VllmCommand, find_vllm
from support.vllm_server import vllm_python

TOKEN = "hf_" + "x" * 34


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_STORED_TOKENS_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return tmp_path


def test_no_token_is_none(home: Path) -> None:
    assert hub_token() is None
    (home / "token").write_text("\n")
    assert hub_token() is None


def test_a_token_in_a_file_has_the_name_under_which_it_was_stored(home: Path) -> None:
    (home / "token").write_text(f"{TOKEN}\n")
    found = hub_token()
    assert found is not None and (found.where, found.owner) == (str(home / "token"), None)
    (home / "stored_tokens").write_text(f"[other]\nhf_token = hf_y\n\n[work]\nhf_token = {TOKEN}\n")
    found = hub_token()
    assert found is not None and found.owner == "work"
    assert TOKEN not in repr(found)


def test_a_token_in_the_environment_goes_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "token").write_text("hf_file")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    found = hub_token()
    assert found is not None and found.where == "HF_TOKEN"
    assert TOKEN not in repr(found)


def test_huggingface_hub_finds_the_same_token(home: Path) -> None:
    import subprocess

    (home / "token").write_text(TOKEN)
    code = "import huggingface_hub as h; print(h.get_token()); print(h.constants.HF_HUB_CACHE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    token, cache = done.stdout.split()
    assert token == TOKEN and hub_token() is not None
    assert cache == str(hub_cache())


def test_free_space_of_a_folder_that_is_not_made_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.05)


@pytest.mark.parametrize(
    ("config", "known"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "gemma4", "text_config": {"model_type": "gemma4_text"}}, True),
        ({"model_type": "gemma4", "text_config": {"model_type": "gemma9_text"}}, False),
        ({"model_type": "no_such_model"}, False),
        ({}, None),
    ],
)
def test_what_transformers_knows(config: dict[str, object], known: bool | None) -> None:
    assert is_known_to_transformers(config) is known


def test_transformers_itself_agrees() -> None:
    from transformers import CONFIG_MAPPING

    assert all(is_known_to_transformers({"model_type": kind}) for kind in CONFIG_MAPPING)


def test_versions_of_packages() -> None:
    assert installed("no-such-distribution") is None
    assert installed("click")


def test_an_environment_that_cannot_be_looked_into_is_none(tmp_path: Path) -> None:
    assert look_into(VllmCommand(("uvx", "vllm@0.33.0", "serve"))) is None
    assert look_into(VllmCommand((str(tmp_path / "python"), "-m", "x"))) is None


def test_an_environment_without_vllm_knows_no_architecture() -> None:
    found = look_into(VllmCommand((sys.executable, "-m", "vllm.entrypoints.openai.api_server")))
    assert found is not None
    assert found.architectures == frozenset() and not found.has_cpu_plugin
    assert found.versions["torch"] == installed("torch")


def test_a_real_vllm_is_looked_into() -> None:
    found = look_into(find_vllm(str(vllm_python())))
    assert found is not None
    assert {"LlamaForCausalLM", "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"} <= found.architectures
    assert "NoSuchModel" not in found.architectures
    assert found.has_cpu_plugin
    assert found.versions["compressed-tensors"]


def test_a_script_leads_to_its_python(tmp_path: Path) -> None:
    script = tmp_path / "vllm"
    script.write_text(f"#!{sys.executable}\n")
    script.chmod(0o755)
    found = look_into(VllmCommand((str(script), "serve")))
    assert found is not None and found.versions["torch"]
