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
Backend = str | Callable[..., Callable[..., object]]
"""One of torch's by its name, or what makes a function of a traced graph."""

_BACKEND: ContextVar[Backend | None] = ContextVar("backend", default=None)
_SHAPES = 64  # of one function: batches, draws, phases and models of a process


def fuses(wanted: bool, device: torch.device) -> bool:
    """Whether fusing is wanted where there is something to gain, as on CUDA alone."""
    return wanted and device.type == "cuda"


@contextlib.contextmanager
def fusing(fuses: bool = True, backend: Backend = "inductor") -> Iterator[None]:
    """A block in which `fusible` functions are compiled, if it `fuses`, and else carried out as they are written."""
    before = _BACKEND.set(backend if fuses else None)
    try:
        with _settings_of_torch() if fuses else contextlib.nullcontext():
            yield
    finally:
        _BACKEND.reset(before)


@contextlib.contextmanager
def _settings_of_torch() -> Iterator[None]:
    from torch._dynamo import config as tracing
    from torch._functorch import config as differentiation

    # A chain's steps are differentiated several times over, and need each time what compiled code would give away.
    with tracing.patch(cache_size_limit=_SHAPES), differentiation.patch(donated_buffer=False):
        yield


def fusible(function: Callable[Inputs, Result]) -> Callable[Inputs, Result]:
    """A function that `fusing` compiles: of tensors to tensors, it draws no random numbers and looks at no value.

    Where torch can't compile it, a warning says so, and it is carried out as it is written for good.
    """
    refused: set[Backend] = set()

    @functools.cache
    def compiled(backend: Backend) -> Callable[Inputs, Result]:
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
