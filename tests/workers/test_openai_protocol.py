"""Answers in the form that vLLM documents for prompt_logprobs, and in that of OpenAI's echo: what is right is read, and
what cannot be right fails the sample.

No vLLM runs here, as it has no build for this machine: the answers are made by its sources (vllm/entrypoints/openai,
0.10 to 0.20). The echo form is tested with a real SGLang in test_teacher_endpoints.
"""

from collections.abc import Callable
from typing import Any

import pytest

from distill_workers.teacher.openai_protocol import OpenAIProtocol
from distill_workers.teacher.protocol import BadScore, TeacherRequest

PROMPT, RESPONSE = [5, 6, 7], [8, 9]


def vllm(body: dict[str, Any]) -> dict[str, Any]:
    """As vLLM answers: every position but the first has its own token, and the n likeliest."""
    positions: list[dict[str, Any] | None] = [None]
    for token in body["prompt"][1:]:
        likeliest = {100 + rank: -0.5 * rank for rank in range(1, body["prompt_logprobs"] + 1)}
        entries = {token: (-7.5, 30)} | {i: (value, i - 100) for i, value in likeliest.items()}
        positions.append(
            {str(i): {"logprob": v, "rank": r, "decoded_token": f"<{i}>"} for i, (v, r) in entries.items()}
        )
    choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length", "prompt_logprobs": positions}
    return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}


def echo(body: dict[str, Any]) -> dict[str, Any]:
    ids = body["prompt"]
    logprobs = {"token_logprobs": [None, *[-7.5] * (len(ids) - 1), -0.1], "tokens": [f"<{i}>" for i in [*ids, 3]]}
    return {"choices": [{"index": 0, "text": "", "logprobs": logprobs, "prompt_token_ids": ids}]}


async def wire_of(server: Callable[[dict[str, Any]], Any]) -> OpenAIProtocol:
    protocol = OpenAIProtocol("big")

    async def send(ask: TeacherRequest) -> Any:
        return server(ask.body)

    await protocol.detect(send)
    return protocol


async def test_the_request_is_what_vllm_documents() -> None:
    protocol = await wire_of(vllm)
    assert protocol.score_request(PROMPT, RESPONSE, 3) == TeacherRequest(
        "/v1/completions",
        {"model": "big", "prompt": [5, 6, 7, 8, 9], "temperature": 0, "max_tokens": 1, "prompt_logprobs": 3},
    )


async def test_the_tokens_own_log_probability_is_looked_up_by_its_id_and_the_likeliest_are_in_order() -> None:
    protocol = await wire_of(vllm)
    scores = protocol.read_scores(vllm(protocol.score_request(PROMPT, RESPONSE, 3).body), PROMPT, RESPONSE, 3)
    assert scores.logprobs == [-7.5, -7.5]
    assert scores.top_ids is not None and scores.top_ids.tolist() == [[101, 102, 103]] * 2, "without the token itself"
    assert scores.top_logprobs is not None and scores.top_logprobs.tolist() == [[-0.5, -1.0, -1.5]] * 2
    plain = protocol.read_scores(vllm(protocol.score_request(PROMPT, RESPONSE, None).body), PROMPT, RESPONSE, None)
    assert plain.logprobs == [-7.5, -7.5] and plain.top_ids is None


async def test_the_servers_own_tokenizer_names_each_id() -> None:
    for server in (vllm, echo):
        protocol = await wire_of(server if server is vllm else lambda body: {"choices": [{"text": ""}]})
        names = protocol.read_token_texts(server(protocol.token_texts_request([5, 9, 7]).body), [5, 9, 7])
        assert names == (["<5>", "<9>", "<7>"] if server is vllm else ["<5>", None, "<7>"])


async def test_a_server_that_knows_no_prompt_logprobs_is_asked_to_echo() -> None:
    def refuses(body: dict[str, Any]) -> Any:
        raise BadScore("refused", "unknown field prompt_logprobs")

    for server in (refuses, lambda body: {"choices": [{"text": ""}]}):
        protocol = await wire_of(server)
        ask = protocol.score_request(PROMPT, RESPONSE, None)
        assert ask.body["echo"] is True and ask.body["max_tokens"] == 1
        assert protocol.read_scores(echo(ask.body), PROMPT, RESPONSE, None).logprobs == [-7.5, -7.5]
        with pytest.raises(BadScore, match="an objective that takes the teacher's top-k cannot use it"):
            protocol.score_request(PROMPT, RESPONSE, 8)


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("wrong_count", lambda choice: choice["prompt_logprobs"].pop()),
        ("wrong_count", lambda choice: choice["prompt_logprobs"].append(None)),
        ("wrong_count", lambda choice: choice["prompt_logprobs"][4].pop("102")),
        ("wrong_tokens", lambda choice: choice["prompt_logprobs"][4].pop("9")),
        ("not_finite", lambda choice: choice["prompt_logprobs"][4]["9"].update(logprob=-9999.0)),
        ("not_finite", lambda choice: choice["prompt_logprobs"][4]["9"].update(logprob=float("nan"))),
        ("positive", lambda choice: choice["prompt_logprobs"][4]["9"].update(logprob=0.5)),
        ("malformed", lambda choice: choice["prompt_logprobs"][4]["9"].pop("logprob")),
        ("malformed", lambda choice: choice["prompt_logprobs"].__setitem__(4, None)),
        ("malformed", lambda choice: choice.update(prompt_logprobs=None)),
    ],
)
async def test_an_answer_of_vllm_that_cannot_be_right_fails_the_sample_with_a_reason(
    reason: str, change: Change
) -> None:
    protocol = await wire_of(vllm)
    answer = vllm(protocol.score_request(PROMPT, RESPONSE, 2).body)
    change(answer["choices"][0])
    with pytest.raises(BadScore) as error:
        protocol.read_scores(answer, PROMPT, RESPONSE, 2)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("wrong_count", lambda choice: choice["logprobs"]["token_logprobs"].__delitem__(slice(4, None))),
        ("wrong_tokens", lambda choice: choice["prompt_token_ids"].__setitem__(4, 3)),
        ("not_finite", lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(4, None)),
        ("malformed", lambda choice: choice.update(logprobs=None)),
    ],
)
async def test_an_echo_that_cannot_be_right_fails_the_sample_with_a_reason(reason: str, change: Change) -> None:
    protocol = await wire_of(lambda body: {"choices": [{"text": ""}]})
    answer = echo({"prompt": [*PROMPT, *RESPONSE]})
    change(answer["choices"][0])
    with pytest.raises(BadScore) as error:
        protocol.read_scores(answer, PROMPT, RESPONSE, None)
    assert error.value.reason == reason


@pytest.mark.parametrize("answer", [[], {}, {"choices": []}, {"choices": [3]}, "no"])
async def test_what_is_no_completion_at_all_fails_the_sample(answer: Any) -> None:
    protocol = await wire_of(vllm)
    with pytest.raises(BadScore, match="malformed"):
        protocol.read_scores(answer, PROMPT, RESPONSE, None)


async def test_likeliest_tokens_outside_the_stated_vocabulary_fail_the_sample() -> None:
    protocol = await wire_of(vllm)
    answer = vllm(protocol.score_request(PROMPT, RESPONSE, 3).body)
    protocol.vocabulary = 104
    assert protocol.read_scores(answer, PROMPT, RESPONSE, 3).top_ids is not None
    protocol.vocabulary = 103
    with pytest.raises(BadScore, match="wrong_tokens: token 103 came back from a teacher with a vocabulary of 103"):
        protocol.read_scores(answer, PROMPT, RESPONSE, 3)


async def test_the_ids_of_a_text_are_those_that_the_server_names() -> None:
    protocol = await wire_of(vllm)
    assert protocol.text_request("Hello").body["prompt"] == "Hello"
    entry = {"151664": {"logprob": -1.0, "rank": 1, "decoded_token": "x"}}
    assert protocol.read_text_ids({"choices": [{"prompt_logprobs": [None, entry]}]}) == [151664]
    assert protocol.read_text_ids({"choices": [{"prompt_token_ids": [3, 4], "prompt_logprobs": None}]}) == [3, 4]
    with pytest.raises(BadScore, match="malformed"):
        protocol.read_text_ids({"choices": [{"text": "?"}]})
