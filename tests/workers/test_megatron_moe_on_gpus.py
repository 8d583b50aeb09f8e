"""A mixture of experts on GPUs needs Transformer Engine, and says so."""

from types import SimpleNamespace
from typing import Any

import pytest

from distill_workers.megatron.architecture import UnsupportedModel
from distill_workers.megatron.model import check_experts

MIXTURE: Any = SimpleNamespace(experts=SimpleNamespace(count=128))
DENSE: Any = SimpleNamespace(experts=None)


def test_a_mixture_on_a_gpu_without_transformer_engine_is_refused_with_what_is_missing() -> None:
    with pytest.raises(UnsupportedModel, match=r"128 experts .*Transformer Engine is not installed"):
        check_experts(MIXTURE, on_gpu=True, with_engine=False)


@pytest.mark.parametrize(
    ("shape", "on_gpu", "with_engine"), [(MIXTURE, True, True), (MIXTURE, False, False), (DENSE, True, False)]
)
def test_every_other_student_is_taken(shape: Any, on_gpu: bool, with_engine: bool) -> None:
    check_experts(shape, on_gpu=on_gpu, with_engine=with_engine)
