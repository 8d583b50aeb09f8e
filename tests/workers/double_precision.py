"""Training in float64: what differs there between two splits of a step is a fault, and no processor's rounding.

In float32 two orders of the same sum differ by some 2^-24 of their terms. Adam divides by the root of the second
moment: where a gradient is small, its rounding error moves the parameter as far as the gradient does, so that the
difference after some steps depends on which kernels a processor has. In float64 the same errors begin 2^29 times
smaller, and parity can be asserted far above them and far below any fault: see PARITY.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from distill_api.spec.job_spec import Spec

_engine: Any = torch.autograd.Variable._execution_engine

PARITY = 1e-9
"""Relative difference that two orders of the same sums stay below, after some steps.

A gradient is the sum of at most n = 2^18 terms (tokens of a step x vocabulary) whose magnitudes sum to about 1. In any
order its rounding error is below n * 2^-53 = 3e-11, and as the errors are independent about sqrt(n) * 2^-53 = 6e-14.
Adam moves a parameter by at most learning rate / epsilon = 1e-3 / 1e-6 times the error of its gradient, also where the
gradient is 0: by 6e-11 in a step, 2e-10 in three, and the tensors compared have norms of about 1 or more. Measured are
2e-15 with AVX2. A term that is wrong or missing changes a gradient by 1 in n at least, 4e-6, before Adam enlarges it.
"""


ROUNDING = 2**-24 * math.sqrt(321 * 40)
"""Relative error of a loss and of a gradient's norm in float32: 7e-6.

Each of the some 40 matrix products and norms that a number passes through on its way to the gradient of the first layer
and back adds the error of a sum of at most 321 terms (the vocabulary), in any order about sqrt(321) * 2^-24 of it, and
independent errors add up as their squares. A mean over the tokens of a step averages over them: 1e-7 was measured.
"""


class DoublePrecision(TorchFunctionMode):
    """Inside, whatever asks torch for float32 gets float64: sums, norms, softmax, buffers of gradients, rotations.

    Megatron and transformers convert to float32 in many places, as they are made for narrower types. What only reads
    bytes as another type is left as it is.
    """

    UNTOUCHED = (torch.Tensor.view, torch.frombuffer)

    def __init__(self) -> None:
        super().__init__()
        self._defaults: list[torch.dtype] = []

    def __enter__(self) -> "DoublePrecision":
        self._defaults.append(torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch.set_default_dtype(self._defaults.pop())

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in self.UNTOUCHED:
            return function(*args, **kwargs)
        if function is torch.Tensor.float:
            return args[0].double()
        if function is torch.Tensor.backward:
            # A mode is off while it handles a call, and this call runs the backward passes of all others.
            with self:
                return _engine.run_backward(
                    tensors=(args[0],),
                    grad_tensors=(torch.ones_like(args[0]),),
                    keep_graph=False,
                    create_graph=False,
                    inputs=(),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
        found = function(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
        if isinstance(found, str):
            # Megatron's optimisers name the types that they take, and cpu.megatron_shim calls this one CUDA's itself.
            return found.replace("torch.cuda.", "torch.").replace("torch.DoubleTensor", "torch.FloatTensor")
        return found


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def train_in_float64() -> None:
    """From here on, in this process, a student with spec.precision float32 is one of float64."""
    narrow = Spec.dtype.fget  # type: ignore[attr-defined]  # a property
    Spec.dtype = property(  # type: ignore[method-assign,assignment]  # for the life of the process
        lambda spec: "float64" if narrow(spec) == "float32" else narrow(spec)
    )
    DoublePrecision().__enter__()


def transformers_model(folder: Path) -> Any:
    """The checkpoint as a model of transformers in float64. What is computed with it belongs in DoublePrecision."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    # The product of groups of matrices, which experts are computed with otherwise, has no float64.
    model.set_experts_implementation("eager")
    with DoublePrecision():
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model
