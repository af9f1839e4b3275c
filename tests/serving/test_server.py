"""Starting a server: the environment it gets, what it may not be told, and how each failure is said."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nvquant.errors import InputError
from nvquant.serving.environment import own_settings, server_environment
from nvquant.serving.server import LOG_NAME, NO_LOAD_CHECK, ServeOptions, ServerDied, serving
from serving.http_server import running

# A program that answers as vLLM does, with the flags that it was given; a real server, if a small one.
SMALL_SERVER = """\
import http.server, json, os, sys
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
at = sys.argv.index("--served-model-name")
names = [word for word in sys.argv[at + 1 : at + 3]]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        models = {"data": [{"id": name, "max_model_len": int(flags["max-model-len"])} for name in names]}
        content = json.dumps(models if self.path == "/v1/models" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
print("INFO 11-26 16:58:51 [x.py:1] Using MarlinNvFp4LinearKernel for NVFP4 GEMM", flush=True)
json.dump([sys.argv[1:], dict(os.environ)], open(os.path.join(os.path.dirname(__file__), "started.json"), "w"))
http.server.HTTPServer(("127.0.0.1", int(flags["port"])), Handler).serve_forever()
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-nvfp4"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], str]:
    """Writes a program named vllm, and gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "vllm"
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    return write


@pytest.fixture
def small_server(program: Callable[[str], str], tmp_path: Path) -> str:
    (tmp_path / "small_server.py").write_text(SMALL_SERVER)
    return program(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {tmp_path / "small_server.py"} "$@"\n')


def started(tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    words, environment = json.loads((tmp_path / "started.json").read_text())
    return words, environment


def test_a_server_is_started_asked_and_ended(
    checkpoint: Path, small_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "CpuNvFp4LinearKernel")
    said: list[str] = []
    options = ServeOptions(vllm=small_server, flags=("--max-num-seqs=4",))
    with serving(checkpoint, options, tmp_path / "proof", said.append) as server:
        assert server.model == "tiny-nvfp4"
        assert server.client.models()[0].id == "tiny-nvfp4"
        assert [kernel.name for kernel in server.facts.kernels] == ["MarlinNvFp4LinearKernel"]
        assert server.log == tmp_path / "proof" / LOG_NAME
        assert server.process is not None and len(server.process.pids()) == 1
        assert server.process.memory_bytes() > 1 << 20
    assert server.process.exit_code is not None
    assert said[0] == "starting vLLM"
    words, environment = started(tmp_path)
    assert words[:2] == ["serve", str(checkpoint)]
    assert '--model-loader-extra-config={"enable_weights_track": true}' in words
    assert {"--max-num-seqs=4", "--max-model-len=2048", "--kv-cache-dtype=auto"} <= set(words)
    assert "--skip-tokenizer-init" not in words
    # The caller's Python settings and threads are not the server's; what the user sets for vLLM is.
    assert environment.get("PYTHONPATH") is None
    assert environment.get("OMP_NUM_THREADS") != "77"
    assert environment["VLLM_DISABLED_KERNELS"] == "CpuNvFp4LinearKernel"
    # The command can be run again as it is told.
    assert shlex.split(server.command)[-len(words) :] == words


def test_a_server_without_tokenizer_files_is_not_asked_to_load_them(
    checkpoint: Path, small_server: str, tmp_path: Path
) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with serving(checkpoint, ServeOptions(vllm=small_server), tmp_path / "proof", lambda _: None):
        assert "--skip-tokenizer-init" in started(tmp_path)[0]


WEIGHT_ONLY = {"quant_method": "compressed-tensors", "config_groups": {"g": {"input_activations": None}}}


@pytest.mark.parametrize(
    ("quantization", "checked"),
    [
        ({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}, False),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {"g": {"input_activations": None}}},
            False,
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {"g": {"input_activations": {}}}}, True),
        (WEIGHT_ONLY, True),
        ({**WEIGHT_ONLY, "experts": 8}, False),
    ],
)
def test_the_check_for_unloaded_tensors_is_off_only_where_vllm_would_refuse_a_whole_checkpoint(
    checkpoint: Path, small_server: str, tmp_path: Path, quantization: dict[str, Any], checked: bool
) -> None:
    config = {
        "quantization_config": quantization,
        "num_experts": quantization.get("experts", 0),
        "num_experts_per_tok": 2,
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    with serving(checkpoint, ServeOptions(vllm=small_server), tmp_path / "proof", lambda _: None) as server:
        assert any("enable_weights_track" in word for word in started(tmp_path)[0]) == checked
        assert server.notes == ([] if checked else [NO_LOAD_CHECK])


def test_an_error_in_the_block_ends_the_server(checkpoint: Path, small_server: str, tmp_path: Path) -> None:
    pids: list[int] = []
    with (
        pytest.raises(ZeroDivisionError),
        serving(checkpoint, ServeOptions(vllm=small_server), tmp_path / "proof", lambda _: None) as server,
    ):
        assert server.process is not None
        pids += server.process.pids()
        raise ZeroDivisionError
    assert pids and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_server_that_never_answers_is_given_up(
    checkpoint: Path, program: Callable[[str], str], tmp_path: Path
) -> None:
    sleeper = program("#!/bin/sh\necho 'INFO 11-26 16:58:51 [x.py:1] Starting to load model /m...'\nexec sleep 600\n")
    options = ServeOptions(vllm=sleeper, ready_seconds=2)
    with (
        pytest.raises(ServerDied, match=r"still building the model after 2 s. Give it more time with --ready-seconds"),
        serving(checkpoint, options, tmp_path / "proof", lambda _: None),
    ):
        pass


def test_a_server_that_dies_tells_the_root_cause_and_a_hint(
    checkpoint: Path, program: Callable[[str], str], tmp_path: Path
) -> None:
    log = Path(__file__).parent / "logs" / "missing-scale.log"
    dying = program(f"#!/bin/sh\ncat {log}\nexit 1\n")
    with (
        pytest.raises(ServerDied) as caught,
        serving(checkpoint, ServeOptions(vllm=dying), tmp_path / "proof", lambda _: None),
    ):
        pass
    assert "model.layers.1.mlp.down_proj.weight_scale" in caught.value.cause
    assert str(caught.value).startswith("vLLM stopped while preparing weights: ValueError: Following weights")
    assert caught.value.log.read_text() == log.read_text()


@pytest.mark.parametrize(
    ("script", "cause"),
    [("kill -9 $$", "ended by SIGKILL"), ("echo nonsense; exit 3", "code 3, its log ends with: nonsense")],
)
def test_a_death_without_an_error_is_told_as_it_was(
    checkpoint: Path, program: Callable[[str], str], tmp_path: Path, script: str, cause: str
) -> None:
    with (
        pytest.raises(ServerDied, match=cause),
        serving(checkpoint, ServeOptions(vllm=program(f"#!/bin/sh\n{script}\n")), tmp_path / "proof", lambda _: None),
    ):
        pass


def test_a_port_that_another_program_uses_is_refused(checkpoint: Path, small_server: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        options = ServeOptions(vllm=small_server, port=other.getsockname()[1])
        with (
            pytest.raises(InputError, match="in use by another program"),
            serving(checkpoint, options, tmp_path / "proof", lambda _: None),
        ):
            pass


def test_another_server_on_our_port_is_not_taken_for_ours(
    checkpoint: Path, program: Callable[[str], str], tmp_path: Path
) -> None:
    # What takes the port between its choice and the server's: here the command itself serves something else.
    (tmp_path / "other.py").write_text(SMALL_SERVER.replace("names = [", 'names = ["other"] or ['))
    other = program(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {tmp_path / "other.py"} "$@"\n')
    with (
        pytest.raises(ServerDied, match="another program answers on port"),
        serving(checkpoint, ServeOptions(vllm=other), tmp_path / "proof", lambda _: None),
    ):
        pass


def test_an_address_where_nobody_answers_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with (
        pytest.raises(InputError, match="no server answers there"),
        serving(checkpoint, ServeOptions(url=url), tmp_path, lambda _: None),
    ):
        pass


def test_a_server_that_runs_already_is_asked_and_left_running(checkpoint: Path, tmp_path: Path) -> None:
    replies = {
        "/v1/models": (200, {"data": [{"id": "theirs", "max_model_len": 4096}]}),
        "/version": (200, {"version": "0.31.0"}),
    }
    with running(replies) as site:
        with serving(checkpoint, ServeOptions(url=site.url), tmp_path, lambda _: None) as server:
            assert (server.model, server.process, server.log) == ("theirs", None, None)
            assert (server.facts.version, server.facts.max_model_len) == ("0.31.0", 4096)
            assert server.facts.kernels == ()
        assert server.client.models()


@pytest.mark.parametrize("flag", ["--port=1", "--model=x", "--max_model_len=5", "--model-loader-extra-config={}"])
def test_what_nvquant_decides_itself_is_no_flag(checkpoint: Path, small_server: str, tmp_path: Path, flag: str) -> None:
    options = ServeOptions(vllm=small_server, flags=(flag,))
    with (
        pytest.raises(InputError, match="Drop the flag"),
        serving(checkpoint, options, tmp_path / "proof", lambda _: None),
    ):
        pass


def test_settings_for_a_cpu_yield_to_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = own_settings(True, kv_cache_bytes=3 << 30, tensor_parallel=1, ready_seconds=60)
    assert settings["VLLM_CPU_KVCACHE_SPACE"] == "6"
    assert int(settings["OMP_NUM_THREADS"]) <= max(1, (os.cpu_count() or 1) // 2)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    assert server_environment(settings)["VLLM_CPU_KVCACHE_SPACE"] == "40"
    assert "VLLM_CPU_KVCACHE_SPACE" not in own_settings(False, 0, 1, 60)


SECRET = "s3cr3tw0rd"


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "GITHUB_TOKEN", "ACTIONS_RUNTIME_TOKEN", "PGPASSWORD"),
        *("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "OPENAI_API_KEY", "WANDB_API_KEY", "VLLM_API_KEY", "DB_PASS"),
        *("CI_JOB_TOKEN", "SSH_AUTH_SOCK", "GOOGLE_APPLICATION_CREDENTIALS", "npm_config__auth", "UV_INDEX_X_PASSWORD"),
    ],
)
def test_no_secret_of_the_environment_reaches_a_server(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("MY_INDEX", f"https://me:{SECRET}@host/")
    assert SECRET not in str(server_environment({}, "/usr/bin/vllm"))


def test_what_a_server_needs_of_the_environment_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CUDA_VISIBLE_DEVICES", "VLLM_CPU_KVCACHE_SPACE", "TOKENIZERS_PARALLELISM", "LD_LIBRARY_PATH", "TMPDIR")
    for name in names:
        monkeypatch.setenv(name, "x")
    assert all(server_environment({}).get(name) == "x" for name in (*names, "PATH") if name != "PATH")
    assert "PATH" in server_environment({})
    monkeypatch.setenv("UV_INDEX_X_PASSWORD", SECRET)
    assert server_environment({}, "/usr/bin/uvx")["UV_INDEX_X_PASSWORD"] == SECRET


def test_a_key_in_the_command_is_shown_nowhere(checkpoint: Path, small_server: str, tmp_path: Path) -> None:
    flags = (f"--api-key={SECRET}", "--hf-token", SECRET)
    with serving(
        checkpoint, ServeOptions(vllm=small_server, flags=flags), tmp_path / "proof", lambda _: None
    ) as server:
        assert SECRET in str(started(tmp_path)[0])  # the server itself has it
        assert SECRET not in server.command and "--api-key=… --hf-token …" in server.command
        assert server.log is not None
        with server.log.open("a") as log:
            log.write(f"non-default args: {{'api_key': ['{SECRET}']}}\n")
    assert SECRET not in server.log.read_text() and "non-default args" in server.log.read_text()


@pytest.mark.parametrize(
    ("hint", "sentence"),
    [
        ("use --vllm-flag", "Use --vllm-flag."),
        ("vLLM 0.33 has the mend", "vLLM 0.33 has the mend."),
        ("config.json names it", "config.json names it."),
    ],
)
def test_a_hint_is_a_sentence_and_names_keep_their_letters(hint: str, sentence: str) -> None:
    assert str(ServerDied("stopped", "no room", hint, Path("log"))) == f"vLLM stopped: no room. {sentence}"
