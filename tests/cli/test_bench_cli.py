"""`nvquant bench`: what it refuses before a start, what a server that cannot start costs, and one real small run."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from serving.http_server import running
from support.commands import Command
from support.conversions import TinyModels
from support.nvidia_smi import RECORDED_H100, put_nvidia_smi
from support.vllm_server import vllm_python
from test_layering import loaded_by

# The last words of vLLM 0.32.0 where the weights leave no room, as its log has them.
NO_ROOM = (
    "(EngineCore pid=7) ERROR 11-26 16:58:51 [core.py:1200] ValueError: No available memory for the cache blocks. Try "
    "increasing `gpu_memory_utilization` when initializing the engine."
)


@pytest.fixture
def model(tiny: TinyModels) -> Path:
    return tiny("llama")


@pytest.fixture
def dying(tmp_path: Path) -> str:
    """A command that ends as vLLM does where the weights leave no room."""
    script = tmp_path / "no-room.sh"
    script.write_text(f"echo {shlex.quote(NO_ROOM)}\nexit 1\n")
    return f"sh {script} serve"


def points_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "bench.json").read_text())["points"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--users", "0"], "is not a list of numbers"),
        (["--users", "1;8"], "is not a list of numbers"),
        (["--contexts", ","], "is not a list of numbers"),
        (["--output-tokens", "1"], "output-tokens"),
        (["--against", "./no-such-folder"], "./no-such-folder is neither a folder nor the address of a server"),
        (["--url", "http://127.0.0.1:9", "--kv-cache-dtype", "auto,fp8"], "drop --kv-cache-dtype"),
        (["--kv-cache-dtype", ","], "--kv-cache-dtype is empty"),
        (["--dataset", "sharegpt"], "requires --dataset-path"),
        (["--guidellm", "guidellm"], "no effect without --load-generator guidellm"),
        (["--load-generator", "guidellm", "--dataset", "sharegpt"], "random prompts only"),
        (["--vllm", "/no/such/vllm"], "/no/such/vllm does not exist or is not executable"),
        (["--vllm", "cat"], None),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    nvquant: Command, model: Path, tmp_path: Path, dying: str, options: list[str], said: str | None
) -> None:
    out = tmp_path / "out"
    if said is None:  # a program that is no vLLM: its start fails, and says so
        ended = nvquant("bench", model, "--contexts", "16", *options, "--output-tokens", "8", "-o", out)
        assert ended.code == 1 and all(point["failed"] for point in points_of(out))
        return
    vllm = () if {"--vllm", "--load-generator"} & set(options) else ("--vllm", dying)
    ended = nvquant("bench", model, *vllm, *options, "-o", out)
    assert ended.code == 2, ended.stderr
    assert said in ended.stderr and "Traceback" not in ended.stderr and ended.stdout == ""
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "said"), [([], "the limit of llama,"), (["--max-model-len", "64"], "--max-model-len")]
)
def test_a_point_too_long_is_refused_before_the_start(
    nvquant: Command, model: Path, tmp_path: Path, dying: str, options: list[str], said: str
) -> None:
    ended = nvquant("bench", model, "--vllm", dying, "--contexts", "32,100000", *options, "-o", tmp_path / "out")
    assert ended.code == 2
    assert said in ended.stderr and "output tokens exceed" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_checkpoint_is_refused(nvquant: Command, tmp_path: Path, dying: str) -> None:
    ended = nvquant("bench", tmp_path / "none", "--vllm", dying)
    assert ended.code == 2 and "none is not a folder" in ended.stderr


def test_without_a_vllm_it_lacks_one(
    nvquant: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    ended = nvquant("bench", model, "-o", tmp_path / "out")
    assert ended.code == 3 and "No vLLM was found" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_server_without_room_fails_its_points_and_the_next_is_tried(
    nvquant: Command, model: Path, tmp_path: Path, dying: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvidia_smi(tmp_path / "bin", monkeypatch, [RECORDED_H100], ["0, 480"])
    out = tmp_path / "out"
    arguments = ("--users", "1,2", "--contexts", "16", "--output-tokens", "8", "--kv-cache-dtype", "auto,fp8")
    ended = nvquant("bench", model, "--against", f"again={model}", "--vllm", dying, *arguments, "-o", out)
    assert ended.code == 1
    points = points_of(out)
    assert [(p["name"], p["kv_cache"], p["users"]) for p in points] == [
        (name, dtype, users) for name in ("llama", "again") for dtype in ("auto", "fp8") for users in (1, 2)
    ]
    assert all("No available memory for the cache blocks" in point["failed"] for point in points)
    assert all("--gpu-memory-utilization=0.95" in point["failed"] for point in points)
    assert ended.stderr.count("Failed: ") == 8
    document = json.loads((out / "bench.json").read_text())
    assert document["complete"] is True
    assert document["machine"]["bandwidth_bytes_per_second"] == 3.35e12
    assert document["machine"]["gpus"][0]["name"] == "NVIDIA H100 80GB HBM3"


def test_a_running_server_that_is_too_short_is_refused(
    nvquant: Command, model: Path, tmp_path: Path, dying: str
) -> None:
    with running({"/v1/models": (200, {"data": [{"id": "m", "max_model_len": 30}]})}) as site:
        ended = nvquant(
            "bench", model, "--url", site.url, "--vllm", dying, "--contexts", "16,32", "--output-tokens", "8"
        )
    assert ended.code == 2
    assert f"A context of 32 and 8 output tokens exceed the limit of the server at {site.url}" in ended.stderr


def test_help_loads_nothing_heavy() -> None:
    assert loaded_by("from nvquant.cli.main import main; main(['bench', '--help'])") <= {"pydantic", "yaml"}
    assert loaded_by("from nvquant.cli.main import main; main(['doctor', '--help'])") <= {"pydantic", "yaml"}


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("beside", [(), pytest.param(("broken",), marks=pytest.mark.thorough)])
def test_a_real_vllm_is_measured_and_one_that_does_not_start_is_reported(
    nvquant: Command,
    smollm2: Path,
    converted_smollm2: Callable[[str, str], Path],
    tmp_path: Path,
    beside: tuple[str, ...],
) -> None:
    python, checkpoint, broken, out = vllm_python(), tmp_path / "nvfp4", tmp_path / "broken", tmp_path / "out"
    checkpoint.symlink_to(converted_smollm2("nvfp4", "modelopt"))
    shutil.copytree(smollm2, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchForCausalLM"]}))

    arguments = ("--users", "2", "--contexts", "32", "--output-tokens", 8, "--prompts", 2, "--bandwidth", 20)
    against = [word for name in beside for word in ("--against", tmp_path / name)]
    ended = nvquant("bench", checkpoint, *against, "--vllm", python, *arguments, "-o", out, "--json")
    document = json.loads((out / "bench.json").read_text())
    assert json.loads(ended.stdout) == document
    assert ended.code == len(beside) and document["complete"] is True

    points = document["points"]
    expected = [("nvfp4", 2, False), *((name, 2, True) for name in beside)]
    assert [(p["name"], p["users"], bool(p.get("failed"))) for p in points] == expected
    assert all("NoSuchForCausalLM" in point["failed"] for point in points[1:])
    for point in points[:1]:
        assert 0 < point["itl_p50_ms"] <= point["itl_p99_ms"]
        assert 0 < point["ttft_p50_ms"] <= point["ttft_p99_ms"]
        assert point["requests"] == 2 and point["output_tokens"] == 8
        assert 0 < point["decode_tokens_per_second"] < point["ceiling_tokens_per_second"]
        # Tokens a second over everything are fewer than while they flow.
        assert 0 < point["output_tokens_per_second"] < point["decode_tokens_per_second"]
        assert point["prefill_tokens_per_second"] > 0
    server = document["servers"][0]
    assert (server["kernel_class"], server["scheme"]) == ("CpuNvFp4LinearKernel", "NVFP4 W4A4")
    assert server["max_model_len"] == 32 + 8 + 16
    assert server["kv_cache_tokens"] > 1000 and server["process_memory_bytes"] > 10**9
    assert "--no-enable-prefix-caching" in server["command"]
    kept = out / "servers" / "nvfp4-auto" / "context-32-users-2"
    assert json.loads((kept / "answers" / "vllm-bench.json").read_text())["completed"] == 2
    assert "| nvfp4 | auto | 32 | 2 |" in (out / "bench.md").read_text()
    assert (out / "decode.svg").exists() == (find_spec("matplotlib") is not None)
