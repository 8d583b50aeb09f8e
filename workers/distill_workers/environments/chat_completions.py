"""Chat completions of OpenAI's API: what an agent asks for, and what it is answered.

https://platform.openai.com/docs/api-reference/chat. What cannot be given is refused with a sentence, but for the
sampling: a student that learns from its own samples is sampled as the job says, whatever the agent asks for.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distill_workers.environments.protocol import AssistantMessage, Message, ToolCall
from distill_workers.environments.tool_calls import parse_message, plain_message
from distill_workers.environments.tools import Tool, what_is_wrong
from distill_workers.environments.user_environment import MOST_CHARACTERS, OPENING_ROLES

MODEL = "student"
"""Name of the one model."""
AS_SAMPLED: Mapping[str, Any] = {
    "temperature": 1,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "top_k": -1,
    "min_p": 0,
    "seed": None,
    "parallel_tool_calls": True,
}
"""Fields of a request that are passed over, and the value of each that asks for nothing else than is given."""
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "chat_template_kwargs": ({},),
}
"""Fields of a request that cannot be given, and the values of each that can."""


class ApiError(Exception):
    """Raised for a request that is refused; the message is a sentence for the agent."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """Return the JSON that OpenAI's clients read."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request for the student's next message."""

    messages: list[Message]
    """As chat templates take them: contents are texts, arguments of tool calls objects."""
    tools: list[Tool] | None = None
    max_tokens: int | None = None
    """Upper bound of the answer in tokens; None without one."""
    stream: bool = False
    with_usage: bool = False
    """Whether a stream ends with the counts of tokens."""
    passed_over: tuple[str, ...] = ()
    """What the agent asks of the sampling, such as "temperature 0.2"."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The student's next message."""

    message: AssistantMessage
    prompt_tokens: int
    completion_tokens: int
    cut_off: bool
    """Whether it was cut off at the most tokens that it might have."""


def read_request(body: Any) -> ChatRequest:
    """Return the request in a body of JSON. Raises ApiError."""
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object")
    model = body.get("model")
    if model != MODEL:
        raise ApiError(
            f"the model {model!r} does not exist; the one model is {MODEL!r}, which OPENAI_MODEL names",
            status=404,
            code="model_not_found",
            param="model",
        )
    for field, allowed in REFUSED.items():
        value = body.get(field)
        if value is not None and value not in allowed:
            raise ApiError(f"{field}: {_shown(value)} cannot be given by the student's endpoint", param=field)
    tools = _tools(body.get("tools"))
    limits = [body[field] for field in ("max_completion_tokens", "max_tokens") if body.get(field) is not None]
    if any(not isinstance(limit, int) or isinstance(limit, bool) or limit < 1 for limit in limits):
        raise ApiError("max_completion_tokens must be a whole number above 0", param="max_completion_tokens")
    options = body.get("stream_options")
    passed_over = [
        f"{field} {_shown(body[field])}"
        for field, same in AS_SAMPLED.items()
        if body.get(field) is not None and body[field] != same
    ]
    return ChatRequest(
        read_messages(body.get("messages")),
        None if body.get("tool_choice") == "none" else tools,
        min(limits, default=None),
        body.get("stream") is True,
        isinstance(options, dict) and options.get("include_usage") is True,
        tuple(passed_over),
    )


def read_messages(value: Any) -> list[Message]:
    """Return the messages of a request, of which nothing but what a chat template reads is left. Raises ApiError."""
    if not isinstance(value, list) or not value:
        raise ApiError("messages must be a list of at least one message", param="messages")
    found = [_message(message, f"messages[{number}]") for number, message in enumerate(value)]
    if (size := len(json.dumps(found))) > MOST_CHARACTERS:
        raise ApiError(f"messages have {size:,} characters; at most {MOST_CHARACTERS:,} are read", param="messages")
    if found[-1]["role"] == "assistant":
        raise ApiError("the last message is the assistant's own, so nothing is asked of it", param="messages")
    return found


def spoken(message: AssistantMessage) -> Message:
    """Return a message of the student as it stands among the messages of a later request."""
    if not message.tool_calls:
        return {"role": "assistant", "content": message.content}
    return {
        "role": "assistant",
        "content": message.content,
        "tool_calls": [_for_template(c) for c in message.tool_calls],
    }


def answered(text: str, number: int, *, with_tools: bool) -> AssistantMessage:
    """Return the student's text as an agent is answered it; `number` makes the ids of its tool calls.

    Without tools there are no calls, and a message with one that cannot be read is a text: the agent sees all of it.
    """
    message = parse_message(text, number)
    return message if with_tools and not message.malformed else plain_message(text)


def answer(completion: Completion, name: str, created: int) -> dict[str, Any]:
    """Return the body of an answer; `name` is its id, `created` in seconds since 1970."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", **_said(completion.message), "refusal": None},
        "logprobs": None,
        "finish_reason": _finish_reason(completion),
    }
    head = {"id": name, "object": "chat.completion", "created": created, "model": MODEL}
    return {**head, "choices": [choice], "usage": _usage(completion)}


def chunks(completion: Completion, name: str, created: int, *, with_usage: bool) -> Iterator[dict[str, Any]]:
    """Yield the same answer as a stream. The message comes in one piece: its tool calls are known at its end alone."""
    head = {"id": name, "object": "chat.completion.chunk", "created": created, "model": MODEL}
    said = _said(completion.message)
    if calls := said.get("tool_calls"):
        said["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
    last = _finish_reason(completion)
    for delta, reason in (({"role": "assistant", **said}, None), ({}, last)):
        yield {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}
    if with_usage:
        yield {**head, "choices": [], "usage": _usage(completion)}


def _finish_reason(completion: Completion) -> str:
    if completion.cut_off:
        return "length"
    return "tool_calls" if completion.message.tool_calls else "stop"


def _usage(completion: Completion) -> dict[str, int]:
    prompt, said = completion.prompt_tokens, completion.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}


def _said(message: AssistantMessage) -> dict[str, Any]:
    found: dict[str, Any] = {"content": message.content}
    if message.thinking:
        found["reasoning_content"] = message.thinking  # as the servers of open models name it
    if message.tool_calls:
        found["content"] = message.content or None
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for call in message.tool_calls
        ]
    return found


def _for_template(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _tools(value: Any) -> list[Tool] | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise ApiError("tools must be a list", param="tools")
    for number, tool in enumerate(value):
        if wrong := what_is_wrong(tool):
            raise ApiError(f"tools[{number}] {wrong}", param="tools")
    return value


def _message(value: Any, where: str) -> Message:
    role = value.get("role") if isinstance(value, dict) else None
    if not isinstance(role, str) or role not in OPENING_ROLES:
        allowed = ", ".join(sorted(OPENING_ROLES))
        raise ApiError(f"{where} has the role {_shown(role)}; allowed are {allowed}", param="messages")
    if role == "developer":  # as OpenAI's newer models call it, and few chat templates do
        role = "system"
    found: Message = {"role": role, "content": _content(value.get("content"), where)}
    for field in ("tool_call_id", "name"):
        if value.get(field) is not None:
            if not isinstance(value[field], str):
                raise ApiError(f"{where}.{field} is no text", param="messages")
            found[field] = value[field]
    if calls := value.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, list):
            raise ApiError(f"{where}.tool_calls must be a list in a message of the assistant", param="messages")
        found["tool_calls"] = [_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls)]
    return found


def _content(value: Any, where: str) -> str:
    """Return a content as a text: an agent may send it in parts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if any(not isinstance(text, str) for text in texts):
        raise ApiError(f"{where} has a content that is no text; the student reads texts alone", param="messages")
    return "".join(map(str, texts))


def _call(value: Any, where: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(f"{where} is no call of a function with a name", param="messages")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise ApiError(f"{where} has arguments that are no JSON: {_shown(arguments)}", param="messages") from None
    if not isinstance(arguments, dict):
        raise ApiError(f"{where} has arguments that are no object", param="messages")
    return _for_template(ToolCall(str(value.get("id", "")), function["name"], arguments))


def _shown(value: Any) -> str:
    return repr(value)[:100]
