"""What SGLang's protocol sends to learn about a server: nothing that could end one which somebody else runs."""

from typing import Any

import pytest

from distill_workers.teacher.protocol import BadScore, TeacherRequest
from distill_workers.teacher.sglang_protocol import SGLangProtocol

REFUSAL = "SGLang answered 400: token_ids_logprob: valid range is [0, 151936)."


async def detected(protocol: SGLangProtocol) -> list[TeacherRequest]:
    """The requests by which a protocol detects from a server that refuses an impossible id, as SGLang 0.5.23 does."""
    sent: list[TeacherRequest] = []

    async def send(ask: TeacherRequest) -> Any:
        sent.append(ask)
        if "token_ids_logprob" in ask.body:
            raise BadScore("refused", REFUSAL)
        return {}

    await protocol.detect(send)
    return sent


async def test_a_server_of_somebody_else_never_gets_an_impossible_token_id() -> None:
    protocol = SGLangProtocol(ours=False)
    (ask,) = await detected(protocol)
    assert ask.body["input_ids"] == [1, 1] and "token_ids_logprob" not in ask.body
    assert protocol.vocabulary is None


@pytest.mark.parametrize("reason", ["refused", "malformed"])
async def test_a_server_of_somebody_else_that_refuses_is_left_to_the_preflight(reason: str) -> None:
    async def send(ask: TeacherRequest) -> Any:
        raise BadScore(reason, "no")

    await SGLangProtocol(ours=False).detect(send)


async def test_a_server_of_our_own_tells_its_vocabulary_by_a_refusal() -> None:
    protocol = SGLangProtocol()
    await detected(protocol)
    assert protocol.vocabulary == 151936


async def test_the_stated_vocabulary_of_an_endpoint_bounds_what_is_sent_and_what_comes_back() -> None:
    protocol = SGLangProtocol(ours=False, vocabulary=151936)
    await detected(protocol)
    assert protocol.vocabulary == 151936


@pytest.mark.parametrize(
    "answer",
    [
        {"prompt_token_ids": [9707, 151664], "meta_info": {}},
        {"meta_info": {"input_token_logprobs": [[None, 9707, None], [-1.0, 151664, None]]}},
    ],
    ids=["0.5.23", "before"],
)
async def test_a_text_is_sent_without_ids_and_answered_with_the_servers_own(answer: Any) -> None:
    protocol = SGLangProtocol(ours=False)
    request = protocol.text_request("Hello<|end|>")
    assert request.body["text"] == "Hello<|end|>" and "input_ids" not in request.body
    assert protocol.read_text_ids(answer) == [9707, 151664]
    with pytest.raises(BadScore, match="malformed"):
        protocol.read_text_ids({"text": "?"})
