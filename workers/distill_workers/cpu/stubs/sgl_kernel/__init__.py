"""A stand-in for SGLang's kernel package, which has no build for CPUs: names resolve, a call raises."""

from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0.0.0+stub"


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU build")

    return missing
