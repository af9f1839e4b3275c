"""`nvquant doctor` on machines with and without GPUs: what it says, what it asks for, its exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import Command, Ended
from support.conversions import TinyModels, converted
from support.nvidia_smi import RECORDED_H100, RTX_5090, put_nvidia_smi, row
from support.synthetic_gemma4 import write_synthetic_gemma4
from support.vllm_server import vllm_python
from test_layering import loaded_by

TOKEN = "hf_" + "s" * 34
GEMMA_CONTEXT = "65536"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_gemma4(tmp_path_factory.mktemp("gemma") / "gemma-4-31b")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No GPU and no vLLM, whatever this machine has; a home for the hub's files."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path


def statuses(ended: Ended) -> dict[str, tuple[str, str]]:
    """(status, words and hint) of every line."""
    checks = json.loads(ended.stdout)["checks"]
    return {check["name"]: (check["status"], f"{check['words']} {check['hint'] or ''}") for check in checks}


def test_without_gpu_and_vllm_it_says_how_to_get_one(nvquant: Command) -> None:
    ended = nvquant("doctor")
    assert ended.code == 3
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("warning  GPU") and "CPU build emulates NVFP4" in lines[0]
    assert any(line.startswith("lacks    vLLM") for line in lines)
    assert "integrations/vllm_cpu/README.md" in ended.stdout
    assert lines[-1] == "Missing: vLLM."


def test_a_cpu_with_a_vllm_for_it_has_all_that_is_needed(nvquant: Command, tiny: TinyModels) -> None:
    ended = nvquant("doctor", tiny("llama"), "--vllm", vllm_python(), "--json", "--context", "100")
    found = statuses(ended)
    assert ended.code == 0, ended.stdout
    assert json.loads(ended.stdout)["ok"] is True
    assert found["vLLM"][0] == "ok" and "CPU build" in found["vLLM"][1]
    assert found["memory"][0] == "ok" and "RAM that is available" in found["memory"][1]
    assert found["architecture"] == ("ok", "transformers knows llama ")


def test_a_cpu_build_without_the_plugin_lacks_it(nvquant: Command, tmp_path: Path) -> None:
    script = tmp_path / "python3"  # the real environment, without what is beside vLLM in it
    script.write_text(f'#!/bin/sh\nexec {vllm_python()} -c "$2" | sed s/nvquant_cpu/other/\n')
    script.chmod(0o755)
    ended = nvquant("doctor", "--vllm", script)
    assert ended.code == 3
    assert "lacks    vLLM plugin" in ended.stdout and "install integrations/vllm_cpu there" in ended.stdout


def test_a_recorded_h100_runs_weights_only(nvquant: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path / "bin", monkeypatch, [RECORDED_H100])
    found = statuses(nvquant("doctor", "--json"))
    assert found["GPU"][0] == "ok" and "Marlin" in found["GPU"][1] and "Hopper" in found["GPU"][1]
    assert found["driver"] == ("ok", "580.159.04 ")
    assert found["memory"] == ("ok", "NVIDIA H100 80GB HBM3: 85.0 GB of 85.5 GB free, 3.35 TB/s ")


def test_an_old_driver_and_an_old_gpu(nvquant: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(
        tmp_path / "bin", monkeypatch, [row(0, "Tesla V100-SXM2-32GB", "7.0", "32768", "32000", "535.54.03")]
    )
    ended = nvquant("doctor", "--json")
    found = statuses(ended)
    assert ended.code == 3
    assert found["GPU"][0] == "lacks" and "another GPU, or a BF16 checkpoint" in found["GPU"][1]
    assert found["driver"][0] == "warning" and "580 or newer" in found["driver"][1]


def fit_of(nvquant: Command, gemma: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    ended = nvquant("doctor", gemma, "--json", *arguments)
    return ended.code, statuses(ended)["memory"][1], json.loads(ended.stdout)["memory"]


def test_a_31b_in_bf16_does_not_fit_a_32_gb_card(
    nvquant: Command, gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvidia_smi(tmp_path / "bin", monkeypatch, [RTX_5090])
    code, words, memory = fit_of(nvquant, gemma, "--context", GEMMA_CONTEXT, "--kv-cache-dtype", "fp8")
    assert code == 3
    assert "no context fits" in words and "4 such GPUs with --tensor-parallel 4 (1 here)" in words
    assert memory["fits"] is False and memory["kv_bytes"] == 10 * 4096 * 65536 + 50 * 8192 * 1024
    assert memory["longest"] == {"16 bits": 0, "fp8": 0}


def test_where_only_an_fp8_cache_fits_it_says_so(
    nvquant: Command, gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvidia_smi(tmp_path / "bin", monkeypatch, [row(0, "NVIDIA A100-SXM4-80GB", "8.0", "66000", "65000")])
    code, words, memory = fit_of(nvquant, gemma, "--context", GEMMA_CONTEXT)
    assert code == 3
    assert memory["longest"]["fp8"] >= 65536 > memory["longest"]["16 bits"] > 0
    assert "--kv-cache-dtype fp8" in words and "a context of at most" in words


def test_a_card_that_others_fill_is_a_warning(
    nvquant: Command, gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvidia_smi(tmp_path / "bin", monkeypatch, [row(0, "NVIDIA H200", "9.0", "143771", "20000")])
    ended = nvquant("doctor", gemma)
    assert "warning  memory                only 21.0 GB of 150.8 GB are free on NVIDIA H200" in ended.stdout
    assert "lacks    memory" not in ended.stdout


def test_a_context_beyond_the_model_s_lacks(nvquant: Command, gemma: Path) -> None:
    found = statuses(nvquant("doctor", gemma, "--context", "300000", "--json"))
    assert found["context"][0] == "lacks" and "262,144" in found["context"][1]


def test_the_known_faults_of_a_version_are_told(
    nvquant: Command, gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvidia_smi(tmp_path / "bin", monkeypatch, [RTX_5090])
    uvx = tmp_path / "bin" / "uvx"
    uvx.write_text("#!/bin/sh\nexit 1\n")  # only looked for, never run
    uvx.chmod(0o755)
    ended = nvquant("doctor", gemma, "--vllm", f"{uvx} vllm@0.25.1", "--kv-cache-dtype", "fp8")
    assert "ok       vLLM                  0.25.1" in ended.stdout
    assert "issue 51828" in ended.stdout  # Gemma 4, Blackwell, FP8 KV cache
    ended = nvquant("doctor", gemma, "--vllm", f"{uvx} vllm@0.33.0", "--kv-cache-dtype", "fp8")
    assert "issue 51828" not in ended.stdout


def test_a_token_is_present_but_never_shown(nvquant: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for arguments in ((), ("--json",)):
        ended = nvquant("doctor", *arguments)
        assert "present (HF_TOKEN)" in ended.stdout
        assert TOKEN[3:] not in ended.stdout + ended.stderr


def test_json_and_lines_say_the_same(nvquant: Command) -> None:
    lines, document = nvquant("doctor"), json.loads(nvquant("doctor", "--json").stdout)
    assert document["ok"] is False and document["memory"] is None
    assert document["machine"]["gpus"] == [] and document["machine"]["ram_bytes"] > 0
    for check in document["checks"]:
        assert any(line.startswith(f"{check['status']:<8} {check['name']:<21}") for line in lines.stdout.splitlines())
        assert check["status"] in ("ok", "warning", "lacks")


@pytest.mark.parametrize("given", ["no-such-folder", "."])
def test_a_folder_that_is_no_checkpoint_is_refused(nvquant: Command, tmp_path: Path, given: str) -> None:
    ended = nvquant("doctor", tmp_path / given)
    assert ended.code == 2 and ended.stdout == ""
    assert ended.stderr.startswith("Error: ") and "Traceback" not in ended.stderr


def test_a_vllm_that_is_not_there_lacks(nvquant: Command) -> None:
    ended = nvquant("doctor", "--vllm", "/no/such/vllm")
    assert ended.code == 3
    assert "--vllm /no/such/vllm does not exist or is not executable" in ended.stdout


def test_it_loads_nothing_heavy(tmp_path: Path, tiny: TinyModels) -> None:
    folder = converted(tiny("llama"), tmp_path / "tiny-nvfp4")
    arguments = ["doctor", str(folder), "--json", "--vllm", sys.executable]
    assert loaded_by(f"from nvquant.cli.main import main; main({arguments!r})") <= {"pydantic", "yaml"}
