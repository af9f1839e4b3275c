"""The order of a run: what is on disk when, what a failure costs, and that no prompt is sent twice.

The servers are small real ones that say what a llama.cpp server said; only the load generator follows a script, since
its figures are not the claim here. tests/cli/test_bench_cli.py has the real ones.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shlex
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nvquant.bench.document import Results, head_of, markdown, plain_table
from nvquant.bench.grid import Grid, Target, find_targets
from nvquant.bench.load import Load, LoadFailed, Measured
from nvquant.bench.plots import draw
from nvquant.bench.run import Bench, Setting
from nvquant.errors import InputError
from nvquant.serving.server import ServeOptions
from serving.http_server import running
from support.conversions import TinyModels

# As llama-server 10434 said it of a Q4_1 file; it has no /version.
MODELS = {
    "data": [
        {
            "id": "SmolLM2-135M-Instruct.Q4_1.gguf",
            "owned_by": "llamacpp",
            "meta": {"n_ctx": 1024, "n_ctx_train": 8192, "n_params": 134515008, "size": 96576768, "ftype": "Q4_1"},
        }
    ]
}
SETTINGS = {"load_generator": "a script", "output_tokens": 16, "dataset": "random"}
Script = Callable[[Load], Measured]


class Scripted:
    """A load generator whose figures a function gives; keeps what it was asked."""

    name = "a script"

    def __init__(self, script: Script) -> None:
        self.script, self.loads = script, list[Load]()

    def run(self, load: Load, folder: Path) -> Measured:
        self.loads.append(load)
        return self.script(load)


def steady(load: Load) -> Measured:
    """Ten milliseconds a token, a hundred for the first."""
    context = load.context or 50
    made = load.requests * load.output_tokens
    return Measured(load.requests, 2.0, load.requests * context, made, 100.0, 120.0, 10.0, 9.5, 14.0)


@pytest.fixture
def url() -> Iterator[str]:
    with running({"/v1/models": (200, MODELS)}) as site:
        yield site.url


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyModels(tmp_path_factory.mktemp("tiny"))("llama")


def bench(
    model: Path,
    url: str,
    folder: Path,
    script: Script = steady,
    grid: Grid | None = None,
    against: tuple[str, ...] = (),
    bandwidth: float | None = 1e9,
) -> tuple[Bench, Scripted]:
    generator = Scripted(script)
    grid = grid or Grid((64, 128), (1, 2), 16, requests=2)
    targets = (Target("Q4_1", find_targets(model, None, ())[0].subject, url), *find_targets(model, None, against)[1:])
    setting = Setting(ServeOptions(), ("auto",), grid, generator, (), bandwidth)
    head = head_of((), bandwidth, True, SETTINGS)
    return Bench(targets, setting, folder, head, lambda words: None), generator


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bench.json").read_text())


def test_the_figures_of_a_point(model: Path, url: str, tmp_path: Path) -> None:
    run, _ = bench(model, url, tmp_path / "out")
    run.run()
    written = document(tmp_path / "out")
    assert written["complete"] is True
    assert [(p["context"], p["users"]) for p in written["points"]] == [(64, 1), (64, 2), (128, 1), (128, 2)]
    point = written["points"][1]
    assert point["decode_tokens_per_second"] == 2 * 1000 / 10
    assert point["prefill_tokens_per_second"] == 2 * 64 / 2.0
    assert (point["ttft_p50_ms"], point["ttft_p99_ms"], point["itl_p50_ms"], point["itl_p99_ms"]) == (100, 120, 9.5, 14)
    assert point["share_of_ceiling"] == pytest.approx(200 / point["ceiling_tokens_per_second"], rel=1e-2)
    assert not point.get("failed") and point["note"] is None


def test_the_ceiling_of_a_checkpoint_at_its_mean_context(model: Path, url: str, tmp_path: Path) -> None:
    run, _ = bench(model, url, tmp_path / "out")
    run.run()
    subject = find_targets(model, None, ())[0].subject
    assert subject is not None
    at = 64 + round((16 - 1) / 2)
    expected = subject.ceiling("auto").tokens_per_second(1e9, at, users=2)
    assert document(tmp_path / "out")["points"][1]["ceiling_tokens_per_second"] == pytest.approx(expected, rel=1e-3)


def test_a_llama_cpp_server_tells_its_file(model: Path, url: str, tmp_path: Path) -> None:
    run, generator = bench(model, url, tmp_path / "out", against=(f"GGUF={url}",))
    run.run()
    servers = document(tmp_path / "out")["servers"]
    assert [server["name"] for server in servers] == ["Q4_1", "GGUF"]
    assert (servers[1]["scheme"], servers[1]["checkpoint_bytes"], servers[1]["vllm"]) == ("GGUF Q4_1", 96576768, None)
    assert servers[1]["read_bytes_per_token"] == 96576768
    assert servers[1]["max_model_len"] == 1024
    assert {load.model for load in generator.loads} == {"SmolLM2-135M-Instruct.Q4_1.gguf"}
    assert not any(load.is_vllm for load in generator.loads)
    assert {load.tokenizer for load in generator.loads} == {model}


def test_no_prompt_is_sent_twice_and_none_is_measured_cold(model: Path, url: str, tmp_path: Path) -> None:
    run, generator = bench(model, url, tmp_path / "out")
    run.run()
    assert len({load.seed for load in generator.loads}) == len(generator.loads)
    told = [(load.context, load.users, load.output_tokens) for load in generator.loads]
    warm, answers, prompts = (64, 2, 8), (64, 1, 16), (64, 1, 1)
    assert told[:3] == [warm, answers, prompts]
    assert told[3:5] == [(64, 2, 16), (64, 2, 1)]
    assert told[5:8] == [(128, 1, 8), (128, 1, 16), (128, 1, 1)]
    assert len(told) == 2 + 2 * 4


def test_without_a_bandwidth_there_is_no_ceiling(model: Path, url: str, tmp_path: Path) -> None:
    run, _ = bench(model, url, tmp_path / "out", bandwidth=None)
    run.run()
    points = document(tmp_path / "out")["points"]
    assert all(p["ceiling_tokens_per_second"] is None and p["share_of_ceiling"] is None for p in points)
    assert "ceiling tok/s" not in plain_table(points)


def test_failed_requests_fail_their_point_and_the_others_go_on(model: Path, url: str, tmp_path: Path) -> None:
    def script(load: Load) -> Measured:
        if load.context == 64 and load.users == 2 and load.output_tokens == 16:
            raise LoadFailed("1 of 2 requests failed: Bad Request")
        return steady(load)

    run, _ = bench(model, url, tmp_path / "out", script)
    run.run()
    points = document(tmp_path / "out")["points"]
    assert [bool(point.get("failed")) for point in points] == [False, True, False, False]
    assert "decode_tokens_per_second" not in points[1]
    assert run.results.failed == 1
    text = (tmp_path / "out" / "bench.md").read_text()
    assert "- Failed: Q4_1, as served KV cache, context 64, 2 users: 1 of 2 requests failed: Bad Request" in text


def test_an_interrupted_run_keeps_what_was_measured(model: Path, url: str, tmp_path: Path) -> None:
    def script(load: Load) -> Measured:
        if load.context == 128:
            raise KeyboardInterrupt
        return steady(load)

    run, _ = bench(model, url, tmp_path / "out", script)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    written = document(tmp_path / "out")
    assert written["complete"] is False
    assert [(p["context"], p["users"]) for p in written["points"]] == [(64, 1), (64, 2)]
    assert "was interrupted" in (tmp_path / "out" / "bench.md").read_text()


def test_every_point_is_on_disk_before_the_next_is_measured(model: Path, url: str, tmp_path: Path) -> None:
    seen = []

    def script(load: Load) -> Measured:
        if load.output_tokens == 16:
            seen.append(len(document(tmp_path / "out")["points"]))
        return steady(load)

    run, _ = bench(model, url, tmp_path / "out", script)
    run.run()
    assert seen == [0, 1, 2, 3]


def test_points_too_long_for_a_running_server_are_refused_before_anything_is_sent(
    model: Path, url: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"A context of 1010 and 16 output tokens .* of 1024 tokens"):
        bench(model, url, tmp_path / "out", grid=Grid((64, 1010), (1,), 16))
    assert not (tmp_path / "out").exists()


def test_points_too_long_for_the_model_are_refused(model: Path, url: str, tmp_path: Path) -> None:
    subject = find_targets(model, None, ())[0].subject
    assert subject is not None and subject.longest_context is not None
    grid = Grid((min(1000, subject.longest_context),), (1,), 16)
    with pytest.raises(InputError, match=f"the limit of BF16, of {subject.longest_context} tokens"):
        bench(model, url, tmp_path / "out", grid=grid, against=(f"BF16={model}",))


def test_an_address_where_nobody_answers_is_refused_before_anything_is_started(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no server answers there"):
        bench(model, "http://127.0.0.1:9", tmp_path / "out")


def test_results_are_not_overwritten(model: Path, url: str, tmp_path: Path) -> None:
    bench(model, url, tmp_path / "out")
    with pytest.raises(InputError, match="already contains results"):
        bench(model, url, tmp_path / "out")


def test_a_data_set_s_context_is_the_measured_one(model: Path, url: str, tmp_path: Path) -> None:
    grid = Grid((64,), (1,), 16, requests=2, dataset="sharegpt", dataset_path="x.json")
    run, generator = bench(model, url, tmp_path / "out", grid=grid)
    run.run()
    assert [point["context"] for point in document(tmp_path / "out")["points"]] == [50]
    assert {(load.dataset, load.dataset_path) for load in generator.loads} == {("sharegpt", "x.json")}


def test_short_answers_are_told(model: Path, url: str, tmp_path: Path) -> None:
    def script(load: Load) -> Measured:
        return Measured(2, 2.0, 128, 2 * 5, 100.0, 120.0, 10.0, 9.5, 14.0)

    run, _ = bench(model, url, tmp_path / "out", script)
    run.run()
    assert document(tmp_path / "out")["points"][0]["note"] == "answers of 5 tokens, not 16"


def test_the_markdown_tables_are_whole(model: Path, url: str, tmp_path: Path) -> None:
    run, _ = bench(model, url, tmp_path / "out", against=(f"a|b={url}",))
    run.run()
    lines = (tmp_path / "out" / "bench.md").read_text().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    bars = {line.replace("\\|", "").count("|") for line in tables[: 2 + 8]}
    assert len(bars) == 1 and "a\\|b" in "\n".join(tables)
    assert markdown(run.results.document).rstrip().splitlines() == lines


@pytest.mark.parametrize("users", [(1, 2), (1,)])
def test_the_pictures_show_every_server(model: Path, url: str, tmp_path: Path, users: tuple[int, ...]) -> None:
    pytest.importorskip("matplotlib")
    grid = Grid((64, 128), users, 16, requests=2)
    run, _ = bench(model, url, tmp_path / "out", against=(f"GGUF={url}",), grid=grid)
    run.run()
    written = draw(run.results.points, tmp_path / "out")
    assert [path.name for path in written] == ["decode.svg", "prefill.svg", "ttft.svg"]
    first = [path.read_bytes() for path in written]
    assert all(b"GGUF" in picture and b"Q4_1" in picture for picture in first)
    assert [path.read_bytes() for path in draw(run.results.points, tmp_path / "out")] == first


def test_nothing_measured_is_no_picture(tmp_path: Path) -> None:
    assert draw([{"failed": "x", "context": 64, "users": 1}], tmp_path) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written to"):
        Results(tmp_path / "file" / "out", head_of((), None, False, SETTINGS))


# A program that answers as vLLM does until it is asked for /die: then it ends as an engine does that ran out of memory.
MORTAL_SERVER = """\
import http.server, json, os, sys
at = sys.argv.index("--served-model-name")
port = next(int(word.split("=")[1]) for word in sys.argv if word.startswith("--port="))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            print("(EngineCore pid=7) ERROR 11-26 16:58:51 [core.py:1200] torch.OutOfMemoryError: CUDA out of memory.", flush=True)
            os._exit(1)
        models = {"data": [{"id": name, "max_model_len": 1024} for name in sys.argv[at + 1 : at + 3]]}
        content = json.dumps(models if self.path == "/v1/models" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
print("(APIServer pid=1) INFO 11-26 16:58:51 [utils.py:1] vLLM API server version 0.32.0", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""  # noqa: E501


def test_a_server_that_ends_fails_what_is_left_of_its_points_and_the_next_is_measured(
    model: Path, url: str, tmp_path: Path
) -> None:
    def script(load: Load) -> Measured:
        if load.context == 64 and load.users == 2 and load.output_tokens == 16 and load.is_vllm:
            with contextlib.suppress(OSError, http.client.HTTPException):
                urllib.request.urlopen(f"{load.url}/die", timeout=10).read()
            raise LoadFailed("2 of 2 requests failed: Server disconnected")
        return steady(load)

    program = tmp_path / "server.py"
    program.write_text(MORTAL_SERVER)
    generator = Scripted(script)
    options = ServeOptions(vllm=shlex.join([sys.executable, str(program), "serve"]), ready_seconds=30)
    setting = Setting(options, ("auto",), Grid((64, 128), (1, 2), 16, 2), generator, (), None)
    targets = find_targets(model, None, (f"next={url}",))
    Bench(targets, setting, tmp_path / "out", head_of((), None, False, SETTINGS), lambda words: None).run()
    points = document(tmp_path / "out")["points"]
    assert [(p["name"], bool(p.get("failed"))) for p in points] == [
        ("llama", False), ("llama", True), ("llama", True), ("llama", True), *[("next", False)] * 4
    ]  # fmt: skip
    assert all("CUDA out of memory" in point["failed"] for point in points[1:4])
    first, second = document(tmp_path / "out")["servers"]
    assert first["vllm"] == "0.32.0" and "CUDA out of memory" in first["failed"]
    assert "failed" not in second and document(tmp_path / "out")["complete"] is True
