"""The client asks as vLLM wants to be asked, and each failure is one clear sentence."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from nvquant.errors import InputError
from nvquant.serving.address import base_url
from nvquant.serving.client import Client
from nvquant.serving.http import ATTEMPTS, ServerError, ServerGone
from serving.http_server import running
from serving.raw_server import endless, recording, redirecting

# As vLLM 0.32.0 answered, shortened.
COMPLETION = {
    "index": 0,
    "text": " 15",
    "finish_reason": "length",
    "token_ids": [216, 33, 37],
    "prompt_logprobs": None,
    "prompt_token_ids": [504, 3575, 282, 4649, 314],
}
METRICS = (
    "# TYPE vllm:cache_config_info gauge\n"
    'vllm:cache_config_info{block_size="128",kv_cache_size_tokens="46592",num_gpu_blocks="364"} 1.0\n'
)


def test_a_completion_carries_text_ids_and_the_prompts_ids() -> None:
    with running({"/v1/completions": (200, {"choices": [COMPLETION]})}) as site:
        answer = Client(site.url, "m").complete("The capital of France is", 3, seed=1)
    assert (answer.text, answer.ids, answer.finish_reason) == (" 15", (216, 33, 37), "length")
    assert answer.prompt_ids == (504, 3575, 282, 4649, 314)
    assert site.requests == [
        (
            "/v1/completions",
            {
                "model": "m",
                "prompt": "The capital of France is",
                "max_tokens": 3,
                "temperature": 0,
                "seed": 1,
                "return_token_ids": True,
            },
        )
    ]


def test_several_prompts_are_asked_at_once_and_answered_in_their_order() -> None:
    choices = [{**COMPLETION, "index": 1, "text": "b"}, {**COMPLETION, "index": 0, "text": "a"}]
    with running({"/v1/completions": (200, {"choices": choices})}) as site:
        answers = Client(site.url, "m").complete_all([[1, 2], [3]], 3)
    assert [answer.text for answer in answers] == ["a", "b"]
    assert site.requests[0][1]["prompt"] == [[1, 2], [3]]


def test_reasoning_counts_as_text_of_a_chat() -> None:
    choice = {"message": {"content": "Paris.", "reasoning": "Easy."}, "finish_reason": "stop", "token_ids": [1]}
    with running({"/v1/chat/completions": (200, {"choices": [choice], "prompt_token_ids": [7, 8]})}) as site:
        answer = Client(site.url, "m").chat([{"role": "user", "content": "?"}], 8)
    assert answer.text == "Easy.\nParis."
    assert answer.prompt_ids == (7, 8)


def test_prompt_logprobs_are_those_of_the_prompts_own_tokens() -> None:
    entries = [
        None,
        {"11": {"logprob": -1.5, "rank": 2}, "99": {"logprob": -0.1, "rank": 1}},
        {"12": {"logprob": -2.0}},
    ]
    with running({"/v1/completions": (200, {"choices": [{**COMPLETION, "prompt_logprobs": entries}]})}) as site:
        client = Client(site.url, "m")
        assert client.prompt_logprobs([10, 11, 12]) == [-1.5, -2.0]
        with pytest.raises(ServerError, match="other tokens"):
            client.prompt_logprobs([10, 11, 13])
        with pytest.raises(ServerError, match="no prompt_logprobs"):
            client.prompt_logprobs([10, 11])


def test_what_a_running_server_tells_of_itself() -> None:
    replies: dict[str, tuple[int, Any]] = {
        "/health": (200, ""),
        "/version": (200, {"version": "0.32.0"}),
        "/v1/models": (200, {"data": [{"id": "m", "max_model_len": 512}]}),
        "/metrics": (200, METRICS),
        "/tokenize": (200, {"tokens": [1, 2]}),
    }
    with running(replies) as site:
        client = Client(site.url, "m")
        assert client.is_healthy()
        assert client.version() == "0.32.0"
        assert client.models()[0].max_model_len == 512
        assert client.kv_cache_tokens() == 46592
        assert client.tokenize("x") == [1, 2]


def test_a_server_that_is_not_vllm_has_no_version_and_no_cache() -> None:
    with running({}) as site:
        assert Client(site.url, "m").version() is None
        assert Client(site.url, "m").kv_cache_tokens() is None
        assert not Client(site.url, "m").is_healthy()


def test_blocks_of_the_cache_are_counted_where_it_does_not_give_tokens() -> None:
    with running({"/metrics": (200, METRICS.replace("kv_cache_size_tokens", "x"))}) as site:
        assert Client(site.url, "m").kv_cache_tokens() == 128 * 364


def test_the_servers_own_words_are_told() -> None:
    error = {"error": {"message": "This model's maximum context length\n is 512 tokens.", "code": 400}}
    with running({"/v1/completions": (400, error)}) as site, pytest.raises(ServerError) as caught:
        Client(site.url, "m").complete("x", 1)
    assert str(caught.value) == (
        f"{site.url}/v1/completions answered 400: This model's maximum context length is 512 tokens."
    )
    assert len(site.requests) == 1  # the same question would get the same answer


def test_a_busy_server_is_asked_again() -> None:
    statuses = iter([503, 429, 200])
    with running(lambda *_: (next(statuses), {"choices": [COMPLETION]})) as site:
        assert Client(site.url, "m").complete("x", 3).text == " 15"
    assert len(site.requests) == 3


def test_a_server_that_stays_busy_is_given_up() -> None:
    with running({"/v1/completions": (503, "overloaded")}) as site, pytest.raises(ServerError, match="503: overloaded"):
        Client(site.url, "m").complete("x", 3)
    assert len(site.requests) == ATTEMPTS


def test_a_question_that_may_have_been_started_is_not_asked_twice() -> None:
    with running(lambda *_: None) as site:
        with pytest.raises(ServerGone, match="cannot be reached"):
            Client(site.url, "m").complete("x", 3)
        assert len(site.requests) == 1
        with pytest.raises(ServerGone):
            Client(site.url, "m").models()
        assert len(site.requests) == 1 + ATTEMPTS  # reading may be repeated


def test_nobody_at_the_address() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}", "m")
    assert not client.is_healthy()
    with pytest.raises(ServerGone, match="Connection refused"):
        client.complete("x", 1)


def test_an_answer_that_takes_too_long() -> None:
    def slowly(*_: object) -> tuple[int, str]:
        time.sleep(2)
        return 200, "{}"

    with running(slowly) as site, pytest.raises(ServerError, match=r"gave no complete answer in 1 s"):
        Client(site.url, "m", seconds=0.6).complete("x", 1)


@pytest.mark.parametrize(
    ("body", "said"),
    [("<html>", r"with JSON\."), (json.dumps([1]), "vLLM's form"), (json.dumps({"choices": []}), "without choices")],
)
def test_an_answer_of_another_kind_of_server(body: str, said: str) -> None:
    with running({"/v1/completions": (200, body)}) as site, pytest.raises(ServerError, match=said):
        Client(site.url, "m").complete("x", 1)


def test_a_server_that_wants_a_key_says_so() -> None:
    with running({"/v1/models": (401, {"error": "Unauthorized"})}) as site, pytest.raises(ServerError, match="API key"):
        Client(site.url, "m").models()


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("localhost:8000", "http://localhost:8000"),
        ("https://example.org/llm/v1", "https://example.org/llm"),
    ],
)
def test_addresses_are_taken_as_people_write_them(given: str, base: str) -> None:
    assert base_url(given) == base


@pytest.mark.parametrize("given", ["", "ftp://x", "http://"])
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(InputError, match="--url"):
        base_url(given)


def test_an_answer_that_never_ends_is_cut_by_size_and_by_time() -> None:
    with endless(b" " * (1 << 20), 0.0) as url, pytest.raises(ServerError, match="answered with more than"):
        Client(url, "m").models()
    with endless(b" ", 0.1) as url:
        client = Client(url, "m", seconds=1)
        for ask in (client.models, lambda: client.complete("x", 1)):
            started = time.monotonic()
            with pytest.raises(ServerError, match="gave no complete answer in 1 s"):
                ask()
            assert time.monotonic() - started < 10
        assert client.version() is None


def test_headers_that_never_end_are_cut_too() -> None:
    with endless(b"", 0.1, head=b"HTTP/1.1 200 OK\r\nX-Slow: ", drip=b"x") as url:
        with pytest.raises(ServerError, match="gave no complete answer in 1 s"):
            Client(url, "m", seconds=1).models()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(status: int) -> None:
    with running({}) as other, redirecting(status, other.url) as url:
        client = Client(url, "m")
        assert not client.is_healthy()
        for ask in (client.models, lambda: client.complete("x", 1)):
            with pytest.raises(ServerError, match=f"answered {status}, which redirects to another address"):
                ask()
        assert other.requests == []


def test_no_token_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijk")
    with recording() as (url, seen):
        Client(url, "m").is_healthy()
        with pytest.raises(ServerError):
            Client(url, "m").complete("x", 1)
    assert len(seen) == 2 and "hf_" not in str(seen) and "authorization" not in str(seen).lower()


@pytest.mark.parametrize(
    "choice",
    [
        *(5, None, "a", []),
        *({"text": 5}, {"text": "a", "token_ids": ["a"]}, {"text": "a", "token_ids": [None]}),
        *(
            {"text": "a", "token_ids": [-1]},
            {"text": "a", "token_ids": [1 << 40]},
            {"text": "a", "token_ids": {"a": 1}},
        ),
        *({"text": "a", "token_ids": [True]}, {"text": "a", "token_ids": [1.5]}, {"text": "a", "index": None}),
        *({"text": "a", "finish_reason": {"x": 1}}, {"text": "a", "finish_reason": "x" * 1000}),
        *({"message": 5}, {"message": {"content": 5}}, {"message": {"content": ["a"]}}),
        *({"prompt_logprobs": [1]}, {"prompt_logprobs": [{"1": 5}]}, {"prompt_logprobs": [{"1": {"logprob": "x"}}]}),
        *({"prompt_logprobs": [{"1": {"logprob": True}}]}),
    ],
)
def test_an_answer_of_another_form_is_refused_where_it_comes_in(choice: Any) -> None:
    replies = {path: (200, {"choices": [choice]}) for path in ("/v1/completions", "/v1/chat/completions")}
    with running(replies) as site:
        client = Client(site.url, "m")
        asked: list[Callable[[], object]] = [
            lambda: client.complete("x", 1),
            lambda: client.chat([{"role": "user", "content": "x"}], 1),
            lambda: client.prompt_logprobs([1]),
        ]
        for ask in asked:
            with pytest.raises(ServerError, match="did not answer with JSON in vLLM's form"):
                ask()


@pytest.mark.parametrize(
    "body",
    [
        *("null", "[]", "1e999", "NaN", "9" * 5000, "[" * 200_000, '{"a":' * 100_000, "", "\x00"),
        '{"data": 5}',
        '{"data": [5]}',
        '{"data": [{}]}',
        '{"data": [{"id": null}]}',
        '{"data": [{"id": ""}]}',
        json.dumps({"data": [{"id": "m" * 10_000}]}),
    ],
)
def test_models_of_another_form(body: str) -> None:
    with running({"/v1/models": (200, body)}) as site, pytest.raises(ServerError, match=r"did not answer with JSON"):
        Client(site.url, "m").models()


@pytest.mark.parametrize("limit", ["x", -5, 0, 10**30, 1.5, True, None, [5]])
def test_a_limit_that_is_no_natural_number_is_none(limit: Any) -> None:
    with running({"/v1/models": (200, {"data": [{"id": "m", "max_model_len": limit}]})}) as site:
        assert Client(site.url, "m").models()[0].max_model_len is None


@pytest.mark.parametrize("value", ["²", "9" * 5000, "-1", "0x10", "", "1_0"])
def test_a_metric_that_is_no_natural_number_is_none(value: str) -> None:
    line = f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{value}"}} 1.0\n'
    with running({"/metrics": (200, line)}) as site:
        assert Client(site.url, "m").kv_cache_tokens() is None


def test_the_words_of_an_error_are_bounded_and_visible() -> None:
    words = "\x1b[31mX\x1b]0;pwn\x07\n::error::" + "A" * 1_000_000
    for body in (words, {"error": {"message": words}}, {"error": words}, {"message": 5}):
        with running({"/v1/models": (400, body)}) as site, pytest.raises(ServerError) as caught:
            Client(site.url, "m").models()
        said = str(caught.value)
        assert len(said) < 600 and "\x1b" not in said and "\n" not in said


@pytest.mark.parametrize(
    "given",
    [
        *(
            "http://[::1",
            "http://127.0.0.1:99999",
            "http://127.0.0.1:x",
            "http://127.0.0.1:0",
            "http://" + "a" * 70 + ".b",
        ),
        *("file:///etc/passwd", "http://127.0.0.1:9/\r\nX: y", "http://\x1b[31m", "http://a b/"),
        *("http://127.0.0.1:9/?a=b#c", "http://xn--\udcff/", "http://é.example", "http://h/%\n", "http://h\\other/"),
    ],
)
def test_an_address_is_held_to_its_form(given: str) -> None:
    with pytest.raises(InputError, match="is not the address of a server"):
        base_url(given)


@pytest.mark.parametrize("given", ["http://user:secretpw@127.0.0.1:9", "user:secretpw@h:80", "http://u:secret@pw@h"])
def test_a_password_in_an_address_is_refused_and_not_shown(given: str) -> None:
    with pytest.raises(InputError, match="user name or a password") as caught:
        base_url(given)
    assert "secret" not in str(caught.value) and "pw" not in str(caught.value)
