"""Short responses are asked for together, in one call of an engine.

A call of an engine's actor and an HTTP request to its server cost more CPU than a response of a few tokens does: 7.5 ms
a response, and 3.3 together (bench/handover.py). So all requests for short responses that are given slots of an engine
at one moment, such as those for the siblings of a prompt, go over as one. The longest of them has soon ended. A longer
one would hold the slots of the others, and its request is nothing beside it, so it goes alone. (Requests that go over
together and are answered one by one cost as much as alone: that was measured too.)
"""

import asyncio

from distill_workers.engine.request import EngineRefused, Request, Response, ResponseGenerator

SHORT_TOKENS = 32
"""Most tokens of a short response: tenths of a second."""

Asked = tuple[Request, asyncio.Future[Response]]


class RequestBatcher:
    """Requests on their way to one engine."""

    def __init__(self, engine: ResponseGenerator) -> None:
        self._engine = engine
        self._short: list[Asked] = []
        """Those that go over next."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def generate(self, request: Request) -> Response:
        """Raises EngineRefused, EngineUnavailable."""
        if request.max_new_tokens > SHORT_TOKENS:
            [response] = await self._engine.generate([request])
            return response
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Response] = loop.create_future()
        if not self._short:
            loop.call_soon(self._send)  # after all that are given a slot in this turn of the loop
        self._short.append((request, answer))
        return await answer

    def _send(self) -> None:
        asked, self._short = self._short, []
        task = asyncio.create_task(self._hand_over(asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _hand_over(self, asked: list[Asked]) -> None:
        try:
            responses = await self._engine.generate([request for request, _ in asked])
        except EngineRefused as error:
            if len(asked) > 1:
                # Which of them it was is not said.
                await asyncio.gather(*(self._hand_over([one]) for one in asked))
            else:
                settle(asked[0][1], error)
        except Exception as error:
            for _, answer in asked:
                settle(answer, error)
        else:
            for (_, answer), response in zip(asked, responses, strict=True):
                settle(answer, response)


def settle(answer: asyncio.Future[Response], value: Response | Exception) -> None:
    """Unless whoever waited for it has been cancelled."""
    if answer.done():
        return
    if isinstance(value, Exception):
        answer.set_exception(value)
    else:
        answer.set_result(value)
