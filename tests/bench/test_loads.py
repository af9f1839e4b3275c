"""Load generators: their command lines, and what is made of results that real runs left."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest
from nvquant.bench import guidellm_load, vllm_load
from nvquant.bench.load import Load, LoadFailed, call, last_words
from nvquant.bench.vllm_load import DRIVER, VllmBench, bench_command
from nvquant.errors import EnvironmentLack, InputError
from nvquant.serving.command import COMMAND_MODULE, SERVER_MODULE, VllmCommand

RECORDED = Path(__file__).parents[1] / "data" / "bench"
LOAD = Load("http://127.0.0.1:8000", "smollm2", Path("/models/smollm2"), 64, 16, users=2, requests=4, seed=7)


def recorded(name: str) -> dict[str, Any]:
    return json.loads((RECORDED / f"{name}.json").read_text())


def test_vllm_s_figures_are_those_of_its_own_times() -> None:
    result = recorded("vllm_bench")
    measured = vllm_load.parse_result(result, LOAD)
    gaps = [1000 * gap for answer in result["itls"] for gap in answer]
    assert measured.requests == len(result["ttfts"]) == 4
    assert (measured.input_tokens, measured.output_tokens) == (4 * 64, 4 * 16)
    assert measured.ttft_p50_ms == pytest.approx(1000 * median(result["ttfts"]))
    assert measured.itl_p50_ms == pytest.approx(median(gaps))
    assert measured.itl_p50_ms < measured.itl_p99_ms <= max(gaps)
    assert measured.tpot_mean_ms == pytest.approx(1000 * mean(mean(answer) for answer in result["itls"]), rel=1e-3)
    assert measured.output_tokens_per_second == pytest.approx(result["output_throughput"])


def test_an_answer_of_one_token_has_no_time_between_tokens() -> None:
    measured = vllm_load.parse_result(recorded("vllm_bench_one_token"), LOAD.changed(output_tokens=1))
    assert (measured.tpot_mean_ms, measured.itl_p50_ms, measured.output_tokens) == (0, 0, 4)
    assert measured.input_tokens_per_second == pytest.approx(256 / measured.seconds)


def test_failed_requests_of_vllm_give_no_figures() -> None:
    with pytest.raises(LoadFailed, match=r"4 of 4 requests failed: Bad Request"):
        vllm_load.parse_result(recorded("vllm_bench_failed"), LOAD)


@pytest.mark.parametrize(("completed", "failed"), [(3, 1), (3, 0), (4, 1)])
def test_one_failed_request_gives_none_either(completed: int, failed: int) -> None:
    result = recorded("vllm_bench") | {"completed": completed, "failed": failed}
    with pytest.raises(LoadFailed, match=r"of 4 requests failed"):
        vllm_load.parse_result(result, LOAD)


@pytest.mark.parametrize("key", ["completed", "duration", "p99_ttft_ms", "mean_tpot_ms", "p50_itl_ms"])
@pytest.mark.parametrize("value", [None, "soon"])
def test_a_result_of_another_form_is_refused(key: str, value: object) -> None:
    result = recorded("vllm_bench")
    with pytest.raises(LoadFailed, match="unknown form"):
        vllm_load.parse_result(result | {key: value}, LOAD)
    del result[key]
    with pytest.raises(LoadFailed, match=key):
        vllm_load.parse_result(result, LOAD)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf")])
def test_a_duration_that_cannot_be_is_refused(seconds: float) -> None:
    with pytest.raises(LoadFailed, match="is impossible"):
        vllm_load.parse_result(recorded("vllm_bench") | {"duration": seconds}, LOAD)


def test_guidellm_s_figures_are_read() -> None:
    measured = guidellm_load.parse_result(recorded("guidellm"), LOAD)
    metrics = recorded("guidellm")["benchmarks"][0]["metrics"]
    assert (measured.requests, measured.input_tokens, measured.output_tokens) == (4, 256, 64)
    assert measured.ttft_p50_ms == metrics["time_to_first_token_ms"]["successful"]["percentiles"]["p50"]
    # Two ways to the mean time of a token after the first.
    assert measured.tpot_mean_ms == pytest.approx(metrics["inter_token_latency_ms"]["successful"]["mean"], rel=0.01)
    own = metrics["time_per_output_token_ms"]["successful"]["mean"]  # counts the first token too
    assert own == pytest.approx((measured.tpot_mean_ms * 15 + metrics["time_to_first_token_ms"]["successful"]["mean"]) / 16, rel=0.01)  # fmt: skip # noqa: E501


def test_guidellm_s_answers_of_one_token_are_read() -> None:
    measured = guidellm_load.parse_result(recorded("guidellm_one_token"), LOAD.changed(output_tokens=1))
    assert (measured.output_tokens, measured.tpot_mean_ms, measured.itl_p99_ms) == (4, 0, 0)


def test_failed_requests_of_guidellm_give_no_figures() -> None:
    with pytest.raises(LoadFailed, match=r"4 of 4 requests failed: Client error '400 Bad Request' for url"):
        guidellm_load.parse_result(recorded("guidellm_failed"), LOAD)
    with pytest.raises(LoadFailed, match=r"2 of 6 requests failed"):
        guidellm_load.parse_result(recorded("guidellm"), LOAD.changed(requests=6))


@pytest.mark.parametrize("result", [{}, {"benchmarks": []}, {"benchmarks": [{"metrics": {}}]}, {"benchmarks": None}])
def test_a_guidellm_result_of_another_form_is_refused(result: dict[str, Any]) -> None:
    with pytest.raises(LoadFailed, match="unknown form"):
        guidellm_load.parse_result(result, LOAD)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("/venv/bin/vllm", "serve"), ("/venv/bin/vllm", "bench", "serve")),
        (("uvx", "vllm@0.33.0", "serve"), ("uvx", "vllm@0.33.0", "bench", "serve")),
        (("/p/python", "-m", COMMAND_MODULE, "serve"), ("/p/python", "-m", COMMAND_MODULE, "bench", "serve")),
        (("/p/python", "-m", COMMAND_MODULE), ("/p/python", "-m", COMMAND_MODULE, "bench", "serve")),
        (("/p/python", "-m", SERVER_MODULE), ("/p/python", "-c", DRIVER)),
        (("env", "A=1", "/p/python", "-m", SERVER_MODULE), ("env", "A=1", "/p/python", "-c", DRIVER)),
    ],
)
def test_the_generator_of_the_vllm_that_serves(words: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert bench_command(VllmCommand(words, version="0.32.0")) == VllmBench(expected, "0.32.0")


def test_a_command_without_a_known_end_is_refused() -> None:
    with pytest.raises(InputError, match="--load-generator guidellm"):
        bench_command(VllmCommand(("docker", "run", "image")))


def test_servers_other_than_vllm_are_asked_where_they_have_no_tokenize() -> None:
    ours, other = (vllm_load.flags(LOAD.changed(is_vllm=is_vllm), Path("/out")) for is_vllm in (True, False))
    assert ours[1:3] == ["--base-url=http://127.0.0.1:8000", "--endpoint=/v1/completions"]
    assert other[1:3] == ["--base-url=http://127.0.0.1:8000/v1", "--endpoint=/completions"]
    assert ours[3:] == other[3:]


def test_a_data_set_is_handed_on_with_its_path() -> None:
    flags = vllm_load.flags(LOAD.changed(dataset="sharegpt", dataset_path="/d.json", context=None), Path("/out"))
    assert {"--dataset-name=sharegpt", "--dataset-path=/d.json", "--output-len=16"} <= set(flags)
    assert not [flag for flag in flags if "random" in flag]


def test_a_generator_that_lacks_a_package_says_how_to_get_it(tmp_path: Path) -> None:
    generator = VllmBench((sys.executable, "-c", "import no_such_package"))
    with pytest.raises(EnvironmentLack, match=r"No module named 'no_such_package'.*pip install 'vllm\[bench\]'"):
        generator.run(LOAD, tmp_path)


def test_a_generator_that_fails_is_quoted(tmp_path: Path) -> None:
    generator = VllmBench((sys.executable, "-c", "raise ValueError('no tokenizer there')"))
    with pytest.raises(LoadFailed, match=r"exit code 1: ValueError: no tokenizer there"):
        generator.run(LOAD, tmp_path)


def test_a_result_of_an_earlier_run_is_not_taken_for_this_one(tmp_path: Path) -> None:
    (tmp_path / vllm_load.RESULT).write_text((RECORDED / "vllm_bench.json").read_text())
    with pytest.raises(LoadFailed, match="exit code 0"):
        VllmBench((sys.executable, "-c", "pass")).run(LOAD, tmp_path)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=r"no-such-program does not start \(No such file or directory\)"):
        call(["no-such-program"], {}, tmp_path / "said")


def test_guidellm_that_is_not_installed_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EnvironmentLack, match=r"pip install guidellm.*--guidellm"):
        guidellm_load.find_guidellm(None)
    with pytest.raises(EnvironmentLack, match="no program /no/guidellm"):
        guidellm_load.find_guidellm("/no/guidellm")
    assert guidellm_load.find_guidellm(f"{sys.executable} -m guidellm").words == (sys.executable, "-m", "guidellm")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("INFO fine\nValueError: bad\n - leaked thing\n", "ValueError: bad"),
        ("Usage: x\n\nError: Invalid value\n", "Error: Invalid value"),
        ("one\ntwo\n\n", "two"),
        ("", "no output"),
    ],
)
def test_the_last_words_of_a_program(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "said").write_text(text)
    assert last_words(tmp_path / "said") == words
