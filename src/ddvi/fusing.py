"""Functions of tensors whose elementwise operations are fused, by `torch.compile`.

A recorded step of a diffusion posterior (`ddvi.recording`) is still thousands of kernels that have less to do than to
begin. Fused, it is a fraction of them. What a function computes changes by rounding alone. Compiling takes seconds for
each function and shape, so that only a block that asks for it pays; elsewhere it is carried out as it is written.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch

Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")

_BACKEND: ContextVar[str | None] = ContextVar("backend", default=None)


@contextlib.contextmanager
def fusing(fuses: bool = True, backend: str = "inductor") -> Iterator[None]:
    """A block in which `fusible` functions are compiled, if it `fuses`, by one of torch's backends."""
    before = _BACKEND.set(backend if fuses else None)
    try:
        with _differentiable_again() if fuses else contextlib.nullcontext():
            yield
    finally:
        _BACKEND.reset(before)


def _differentiable_again() -> contextlib.AbstractContextManager[None]:
    """A chain's steps are differentiated several times over, and need each time what compiled code would give away."""
    from torch._functorch import config

    return config.patch(donated_buffer=False)


def fusible(function: Callable[Inputs, Result]) -> Callable[Inputs, Result]:
    """A function that `fusing` compiles: of tensors to tensors, it draws no random numbers and looks at no value.

    Where torch can't compile it, a warning says so, and it is carried out as it is written for good.
    """
    refused: set[str] = set()

    @functools.cache
    def compiled(backend: str) -> Callable[Inputs, Result]:
        return torch.compile(function, fullgraph=True, backend=backend)

    @functools.wraps(function)
    def fused(*inputs: Inputs.args, **named: Inputs.kwargs) -> Result:
        backend = _BACKEND.get()
        if backend is None or backend in refused:
            return function(*inputs, **named)
        # What only compiling needs takes a second to import.
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The .grad attribute")  # which torch itself looks at
                return compiled(backend)(*inputs, **named)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            refused.add(backend)
            reason = " ".join(str(error).split("\n\n")[0].split())
            warnings.warn(f"torch can't fuse {function.__qualname__} ({reason}); it runs unfused", stacklevel=2)
            return function(*inputs, **named)

    return fused
