"""The client asks as vLLM wants to be asked, and each failure is one clear sentence."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest
from nvquant.errors import InputError
from nvquant.serving.client import ATTEMPTS, Client, ServerError, ServerGone, base_url
from serving.http_server import running

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
        assert client.models()[0]["max_model_len"] == 512
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

    with running(slowly) as site, pytest.raises(ServerError, match=r"gave no answer in 0 s|gave no answer in 1 s"):
        Client(site.url, "m", seconds=0.6).complete("x", 1)


@pytest.mark.parametrize(
    ("body", "said"),
    [("<html>", "not JSON"), (json.dumps([1]), "another form"), (json.dumps({"choices": []}), "without choices")],
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
