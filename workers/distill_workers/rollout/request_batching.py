"""Requests for short responses are sent to an engine in batches, one call for each batch.

A call of an engine's actor and an HTTP request to its server cost more CPU than a response of a few tokens does: 7.5 ms
a response, and 3.3 ms in a batch (bench/handover.py). So all requests for short responses that get slots of an engine
in one iteration of the event loop, such as those for the samples of a group, are sent as one batch, whose longest
response soon ends. A longer response would hold the slots of the others, and the cost of its request is negligible, so
it is sent alone. Sending a batch and answering its requests one by one was measured too: it costs as much as sending
each request alone.
"""

import asyncio

from distill_workers.engine.request import EngineRefused, Request, Response, ResponseGenerator

SHORT_TOKENS = 32
"""A response of at most so many tokens is short: it takes tenths of a second."""

PendingRequest = tuple[Request, asyncio.Future[Response]]


class RequestBatcher:
    """A batcher of the requests to one engine."""

    def __init__(self, engine: ResponseGenerator) -> None:
        self._engine = engine
        self._next_batch: list[PendingRequest] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def generate(self, request: Request) -> Response:
        """Return the engine's response to `request`. Raises EngineRefused, EngineUnavailable."""
        if request.max_new_tokens > SHORT_TOKENS:
            [response] = await self._engine.generate([request])
            return response
        loop = asyncio.get_running_loop()
        response_future: asyncio.Future[Response] = loop.create_future()
        if not self._next_batch:
            # Called after every task that gets a slot in this iteration of the loop has added its request.
            loop.call_soon(self._send_batch)
        self._next_batch.append((request, response_future))
        return await response_future

    def _send_batch(self) -> None:
        batch, self._next_batch = self._next_batch, []
        task = asyncio.create_task(self._send(batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, batch: list[PendingRequest]) -> None:
        try:
            responses = await self._engine.generate([request for request, _ in batch])
        except EngineRefused as error:
            if len(batch) > 1:
                # The engine does not say which request it refused, so each is sent alone.
                await asyncio.gather(*(self._send([pending]) for pending in batch))
            else:
                resolve(batch[0][1], error)
        except Exception as error:
            for _, response_future in batch:
                resolve(response_future, error)
        else:
            for (_, response_future), response in zip(batch, responses, strict=True):
                resolve(response_future, response)


def resolve(response_future: asyncio.Future[Response], result: Response | Exception) -> None:
    """Set the result or the exception of a future, unless its awaiter has been cancelled."""
    if response_future.done():
        return
    if isinstance(result, Exception):
        response_future.set_exception(result)
    else:
        response_future.set_result(result)
