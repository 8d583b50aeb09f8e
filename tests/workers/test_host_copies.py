"""Host memory for checkpoints is kept from one to the next; what CUDA alone does, pinning, is left out here."""

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill_workers.megatron.checkpoint.host_copies import HostCopies


def test_the_memory_of_one_snapshot_is_that_of_the_next() -> None:
    copies, parameter = HostCopies(pinned=False), torch.arange(6.0)
    first = copies.copy("a", parameter)
    copies.wait()
    parameter += 1
    assert first.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "training goes on beside it"
    second = copies.copy("a", parameter)
    assert second.data_ptr() == first.data_ptr() and second.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_each_name_has_memory_of_its_own_shape_and_type() -> None:
    copies = HostCopies(pinned=False)
    a, b = copies.copy("a", torch.ones(3)), copies.copy("b", torch.zeros(3))
    assert a.tolist() == [1.0] * 3 and b.tolist() == [0.0] * 3
    assert copies.copy("a", torch.ones(2, 2)).shape == (2, 2), "a range of the distributed optimiser may change"
    assert copies.copy("b", torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_no_snapshot_is_taken_while_the_last_one_is_written() -> None:
    """It would be copied over what the writer reads."""
    from distill_workers.megatron.checkpoint.writer import CheckpointWriter
    from distill_workers.megatron.student import MegatronStudent

    def snapshot(**options: bool) -> None:
        raise AssertionError("a snapshot was taken")

    writer = CheckpointWriter()
    writer._writing = Future()
    writing = SimpleNamespace(writer=writer, snapshot=snapshot)
    with pytest.raises(RuntimeError, match="another is under way: finish that first"):
        MegatronStudent.begin_save(writing, Path("/nowhere"))  # type: ignore[arg-type]  # what it uses of a student
