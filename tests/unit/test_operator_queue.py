"""The work queue: one worker per key, each key once, again later after an error."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable

from distill_operator.kinds import Kind
from distill_operator.runtime.ownership import Key
from distill_operator.runtime.work_queue import Retry, WorkQueue

A, B = Key(Kind.DISTILLATION_JOB, "ns", "a"), Key(Kind.DISTILLATION_JOB, "ns", "b")


async def run(
    handler: Callable[[Key], Awaitable[float | None]], act: Callable[[WorkQueue], Awaitable[None]]
) -> WorkQueue:
    queue = WorkQueue(handler, concurrency=4, spacing_seconds=0.01, jitter=lambda: 1.0)
    workers = asyncio.create_task(queue.run())
    await act(queue)
    queue.stop()
    await asyncio.wait_for(workers, 30)
    return queue


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.005)


async def test_a_key_added_many_times_is_handled_once() -> None:
    handled: list[Key] = []

    async def handle(key: Key) -> None:
        handled.append(key)

    async def act(queue: WorkQueue) -> None:
        for _ in range(100):
            queue.add(A)
        assert queue.depth == 1
        await asyncio.sleep(0.05)

    await run(handle, act)
    assert handled == [A]


async def test_a_key_is_never_handled_twice_at_once_and_different_keys_are() -> None:
    now: list[Key] = []
    most = 0

    async def handle(key: Key) -> None:
        nonlocal most
        assert key not in now
        now.append(key)
        most = max(most, len(now))
        await asyncio.sleep(0.02)
        now.remove(key)

    async def act(queue: WorkQueue) -> None:
        for _ in range(8):
            queue.add(A)
            queue.add(B)
            await asyncio.sleep(0.01)

    await run(handle, act)
    assert most == 2


async def test_a_key_added_while_it_is_handled_is_handled_once_more() -> None:
    handled: list[Key] = []

    async def handle(key: Key) -> None:
        handled.append(key)
        await asyncio.sleep(0.02)

    async def act(queue: WorkQueue) -> None:
        queue.add(A)
        await asyncio.sleep(0.005)
        for _ in range(5):
            queue.add(A)
        await until(lambda: len(handled) >= 2)
        await asyncio.sleep(0.1)

    await run(handle, act)
    assert handled == [A, A]


async def test_events_one_after_the_other_are_handled_once_in_each_spacing() -> None:
    """A start tells of itself by forty events, milliseconds apart, each of which would be handled by itself."""
    handled: list[float] = []
    loop = asyncio.get_running_loop()

    async def handle(key: Key) -> None:
        handled.append(loop.time())

    queue = WorkQueue(handle, concurrency=4, spacing_seconds=0.2)
    workers = asyncio.create_task(queue.run())
    queue.add(A)
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(handled) == 1, "the first is handled at once"
    while loop.time() - handled[0] < 0.5:
        last = loop.time()
        queue.add(A)
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.4)
    queue.stop()
    await asyncio.wait_for(workers, 30)
    assert handled[-1] >= last, "the last is not missed"
    assert all(after - before >= 0.19 for before, after in itertools.pairwise(handled))
    assert not queue.keys()


async def test_a_key_that_was_quiet_for_the_spacing_is_handled_at_once_again() -> None:
    handled: list[float] = []
    loop = asyncio.get_running_loop()

    async def handle(key: Key) -> None:
        handled.append(loop.time())

    async def act(queue: WorkQueue) -> None:
        queue.add(A)
        async with asyncio.timeout(10):
            while A in queue._entries:
                await asyncio.sleep(0.005)
        queue.add(A)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(handled) == 2

    await run(handle, act)


async def test_the_time_that_a_handler_asks_for_is_kept_and_an_event_comes_first() -> None:
    handled: list[float] = []
    loop = asyncio.get_running_loop()

    async def handle(key: Key) -> float | None:
        handled.append(loop.time())
        return 0.1 if len(handled) == 1 else 60.0

    async def act(queue: WorkQueue) -> None:
        queue.add(A)
        await until(lambda: len(handled) == 2)
        assert handled[1] - handled[0] >= 0.1
        queue.add(A)
        await until(lambda: len(handled) == 3)

    await run(handle, act)
    assert len(handled) == 3


async def test_an_error_is_tried_again_later_and_other_keys_do_not_wait() -> None:
    handled: list[Key] = []

    async def handle(key: Key) -> None:
        handled.append(key)
        if key == A:
            raise RuntimeError("no")

    async def act(queue: WorkQueue) -> None:
        queue.add(A)
        queue.add(B)
        await until(lambda: len(handled) == 2)
        assert sorted(handled) == [A, B]
        await until(lambda: len(handled) == 3)

    queue = await run(handle, act)
    assert handled.count(A) == 2
    assert queue.retries == 2


async def test_a_conflict_is_tried_again_at_once_and_is_no_error() -> None:
    handled: list[Key] = []

    async def handle(key: Key) -> None:
        handled.append(key)
        if len(handled) == 1:
            raise Retry

    async def act(queue: WorkQueue) -> None:
        queue.add(A)
        await until(lambda: len(handled) == 2)

    queue = await run(handle, act)
    assert (len(handled), queue.retries) == (2, 0)


async def test_a_conflict_that_lasts_is_tried_again_ever_later_and_counted() -> None:
    handled: list[float] = []
    loop = asyncio.get_running_loop()

    async def handle(key: Key) -> None:
        handled.append(loop.time())
        if len(handled) < 4:
            raise Retry

    async def act(queue: WorkQueue) -> None:
        queue.add(A)
        await until(lambda: len(handled) == 4)

    queue = await run(handle, act)
    first, second, third = (after - before for before, after in itertools.pairwise(handled))
    assert first < 0.4 and second >= 0.5 and third >= 1.0
    assert (queue.conflicts, queue.retries) == (3, 0)


async def test_a_handler_that_hangs_shows() -> None:
    done = asyncio.Event()

    async def handle(key: Key) -> None:
        if key == A:
            await done.wait()

    async def act(queue: WorkQueue) -> None:
        assert queue.busy_seconds == 0.0
        queue.add(A)
        queue.add(B)
        await asyncio.sleep(0.06)
        assert queue.busy_seconds >= 0.05
        done.set()
        await until(lambda: queue.busy_seconds == 0.0)

    await run(handle, act)


async def test_nothing_is_kept_of_a_key_that_needs_no_more_looks() -> None:
    async def handle(key: Key) -> None:
        return None

    async def act(queue: WorkQueue) -> None:
        queue.add(A)
        await asyncio.sleep(0.05)
        assert not queue.keys()

    await run(handle, act)


async def test_stopping_lets_a_handler_finish_and_starts_no_other() -> None:
    handled: list[Key] = []

    async def handle(key: Key) -> None:
        await asyncio.sleep(0.1)
        handled.append(key)

    async def act(queue: WorkQueue) -> None:
        queue.add(A)
        await asyncio.sleep(0.02)
        queue.stop()
        queue.add(B)

    await run(handle, act)
    assert handled == [A]


def test_delays_after_errors_grow_to_a_bound_and_are_spread() -> None:
    async def handle(key: Key) -> None:
        return None

    widest = WorkQueue(handle, concurrency=1, jitter=lambda: 1.0)
    narrow = WorkQueue(handle, concurrency=1, jitter=lambda: 0.0)
    assert [widest.retry_seconds(n) for n in (1, 2, 3, 20, 10_000)] == [0.5, 1.0, 2.0, 60.0, 60.0]
    assert narrow.retry_seconds(3) == 1.0
