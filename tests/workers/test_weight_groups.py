"""A weight group as NCCL has it: members wait for each other when they leave, and a failure ends the group alone."""

import asyncio
import os
import threading
from datetime import timedelta
from typing import Any

import pytest
from conftest import spec_of

from distill_workers.weight_sync.broadcast import DistributedSync


class Member:
    """An engine whose calls return only when all members of the barrier have come."""

    incarnation = 1

    def __init__(self, barrier: threading.Barrier) -> None:
        self._barrier = barrier

    async def leave_group(self, name: str) -> None:
        await asyncio.to_thread(self._barrier.wait)

    async def end_update(self) -> None:
        await asyncio.to_thread(self._barrier.wait)


class Group:
    """A process group of the trainer."""

    def __init__(self) -> None:
        self.aborted = threading.Event()

    def abort(self) -> None:
        self.aborted.set()


@pytest.fixture
def sync(tmp_path: Any) -> DistributedSync:
    """The trainer's side, in a group of three."""
    made = DistributedSync(spec_of(tmp_path, tmp_path), "127.0.0.1")
    made._group, made._name = Group(), "weights"
    return made


async def test_all_members_leave_a_group_at_once(sync: DistributedSync, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(3, timeout=10)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda group: barrier.wait())
    await sync._disband({0: Member(barrier), 1: Member(barrier)})
    assert not barrier.broken


async def test_a_failed_push_ends_on_all_engines_at_once(
    sync: DistributedSync, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier, ended = threading.Barrier(2, timeout=10), []
    monkeypatch.setattr("torch.distributed.destroy_process_group", ended.append)
    await sync._clean_up({0: Member(barrier), 1: Member(barrier)})
    assert not barrier.broken and len(ended) == 1


async def test_a_group_whose_members_do_not_leave_is_aborted(
    sync: DistributedSync, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, release = sync._group, threading.Event()
    monkeypatch.setattr("distill_workers.weight_sync.broadcast.LEAVE_SECONDS", 0.05)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda group: release.wait(30))
    try:
        await sync._disband({})
        assert await asyncio.to_thread(group.aborted.wait, 10)
        # The next group is not behind the thread that hangs.
        assert await asyncio.get_running_loop().run_in_executor(sync._thread, lambda: 7) == 7
    finally:
        release.set()


@pytest.mark.parametrize("users", [None, "1"])
def test_an_error_of_nccl_ends_the_weight_group_alone_and_what_the_user_has_set_holds_elsewhere(
    sync: DistributedSync, monkeypatch: pytest.MonkeyPatch, users: str | None
) -> None:
    name, seen = "TORCH_NCCL_ASYNC_ERROR_HANDLING", []
    monkeypatch.delenv(name, raising=False)
    if users is not None:
        monkeypatch.setenv(name, users)

    def create(*arguments: Any, **options: Any) -> tuple[Group, None]:
        seen.append(os.environ[name])
        return Group(), None

    monkeypatch.setattr("distill_workers.weight_sync.broadcast._new_process_group_helper", create)
    monkeypatch.setattr("distill_workers.weight_sync.broadcast.PrefixStore", lambda name, store: store)
    sync._new_group("weights", None, 3, timedelta(seconds=1))  # type: ignore[arg-type]  # no store is used
    assert seen == ["2"] and os.environ.get(name) == users
