"""No step of the trainer makes more of the size of its parameters than docs/guides/sizing.md counts."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from distill_workers.megatron import memory
from distill_workers.megatron.logits import logits

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made which is none of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        given = {a.data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return made


def test_the_check_of_a_gradient_makes_nothing_of_its_size() -> None:
    gradient, nothing = torch.randn(100_000), torch.empty(0)
    with Allocations() as counted:
        assert memory.all_finite([gradient, nothing], CPU)
    assert 0 < counted.largest <= 64


def test_the_count_of_allocations_sees_a_copy() -> None:
    with Allocations() as counted:
        torch.randn(1000).double()
    assert counted.largest == 8000


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 57, 99])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(value: float, place: int) -> None:
    gradient = torch.randn(100)
    gradient[place] = value
    assert not memory.all_finite([torch.zeros(3), gradient], CPU)


def test_the_greatest_numbers_are_finite() -> None:
    most = torch.finfo(torch.float32).max
    assert memory.all_finite([torch.full((1000,), most), torch.full((1000,), -most)], CPU)


def adam(kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(4))]}, {"params": [torch.nn.Parameter(torch.ones(2))]}]
    return kind(groups, lr=0.1)  # type: ignore[call-arg]  # every kind has it


def test_on_a_gpu_adamw_is_one_kernel_for_all_groups() -> None:
    inner = adam()
    memory.fuse(SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner)]), CUDA)
    assert [(g["fused"], g["foreach"]) for g in inner.param_groups] == [(True, False)] * 2
    inner.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert inner.param_groups[-1]["fused"] is True


def test_on_a_cpu_adamw_stays_as_its_recorded_runs_had_it() -> None:
    inner = adam()
    memory.fuse(SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner)]), CPU)
    assert [(g["fused"], g["foreach"]) for g in inner.param_groups] == [(None, None)] * 2


def test_an_optimiser_with_kernels_of_its_own_is_left_alone() -> None:
    inner = adam(torch.optim.SGD)
    memory.fuse(SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner)]), CUDA)
    assert {g["fused"] for g in inner.param_groups} == {None}


def test_a_fused_step_is_the_same_step_and_makes_no_tensor_of_the_parameters_size() -> None:
    torch.manual_seed(0)
    found, largest = [], []
    for fused in (False, True):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 10_000))
        inner = torch.optim.AdamW([weight], lr=0.1, foreach=not fused)
        if fused:
            memory.fuse(SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner)]), CUDA)
        for _ in range(3):
            weight.grad = torch.linspace(1, 2, 10_000)
            with Allocations() as counted:
                inner.step()
        found.append(weight.detach())
        largest.append(counted.largest)
    torch.testing.assert_close(found[0], found[1])
    assert largest[0] >= 40_000 > 64 >= largest[1]


def test_the_step_of_a_restored_parameter_lies_beside_it() -> None:
    parameter = torch.zeros(3, device="meta")
    restored = memory.step_count(7.0, parameter)
    assert restored.device == parameter.device and restored.dtype == torch.float32
    assert memory.step_count(7.0, torch.zeros(3)).item() == 7.0


class Operations(TorchDispatchMode):
    """The names of the operations that were called, and the types of what they made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        made = function(*arguments, **(options or {}))
        if isinstance(made, torch.Tensor):
            self.seen.append((str(function), made.dtype))
        return made


def test_on_a_gpu_logits_of_a_bfloat16_head_are_never_rounded_to_bfloat16() -> None:
    with FakeTensorMode():
        hidden, head = (torch.empty(4, 8, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        buffer = torch.empty(4, 4, device="cuda")
        with Operations() as called:
            found = logits(hidden, head, buffer)
    products = [(name, dtype) for name, dtype in called.seen if ".mm" in name or "copy" in name]
    assert products == [("aten.mm.dtype_out", torch.float32)] and found.dtype == torch.float32
