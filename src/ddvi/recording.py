"""Functions whose kernels are recorded once and launched as one, as CUDA graphs.

A step of a diffusion posterior is some thousand small kernels, one after the other, and a GPU is through with each of
them sooner than a CPU has launched the next. A recording takes one launch. It repeats the kernels and nothing else:
what Python did beside them, it did when they were recorded. So a function may depend on what changes through its
arguments and through tensors that it changes in place alone, and may not wait for the device.

Random numbers are those that the function would have drawn: torch moves the state of its generator on as far.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ddvi.errors import TrainingError

Function = Callable[..., Tensor]
Replay = Callable[[], None]
Recorder = Callable[[Function, list[Tensor]], tuple[Tensor, Replay]]
"""Carries a function out on tensors, and gives its result and what does so again, from the same tensors into it."""

_WAITS = "synchronizing CUDA operation"  # of torch's warning


@contextlib.contextmanager
def captured() -> Iterator[torch.cuda.CUDAGraph]:
    """Record what a block launches on a CUDA device, where nothing of it is carried out yet."""
    # No recording survives that memory is given back meanwhile, as happens when old recordings are collected.
    collects, graph = gc.isenabled(), torch.cuda.CUDAGraph()
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            yield graph
    finally:
        if collects:
            gc.enable()


def recorder(graphs: bool, device: torch.device) -> Recorder | None:
    """How steps are recorded on a device; None where they aren't, or shouldn't be."""
    return record if graphs and device.type == "cuda" else None


def record(function: Function, inputs: list[Tensor]) -> tuple[Tensor, Replay]:
    """A `Recorder` for tensors on a CUDA device."""
    with captured() as graph:
        output = function(*inputs)
    graph.replay()
    return output, graph.replay


@dataclass(frozen=True)
class _Recording:
    inputs: list[Tensor]
    output: Tensor
    replay: Replay


@final
class Recorded:
    """A function of tensors that is recorded at its third call and replayed from then on, for each shape of them.

    The first call is carried out as it is, so that what is made once is there. The second is watched: a function that
    waits for the device can't be recorded, and is carried out as it is for good. A result holds until the next call.

    Args:
        function: of tensors on a CUDA device.
        recorder: how it is recorded.

    Raises:
        TrainingError: it can't be, though it wasn't seen to wait.
    """

    def __init__(self, function: Function, recorder: Recorder = record) -> None:
        self.function = function
        self.recorder = recorder
        self.waits: bool = False
        """Whether the function has waited for the device."""
        self._calls: Counter[tuple[torch.Size, ...]] = Counter()
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple(each.shape for each in inputs)
        self._calls[shapes] += 1
        if self.waits or self._calls[shapes] == 1:
            return self.function(*inputs)
        if self._calls[shapes] == 2:
            with _watched() as found:
                output = self.function(*inputs)
            self.waits = bool(found)
            return output
        recording = self._recordings.get(shapes)
        if recording is None:
            own = [each.clone() for each in inputs]
            try:
                recording = self._recordings[shapes] = _Recording(own, *self.recorder(self.function, own))
            except RuntimeError as error:
                raise TrainingError(
                    f"a step can't be recorded on this device ({str(error).splitlines()[0]}); train with graphs=false"
                ) from error
            return recording.output
        for mine, given in zip(recording.inputs, inputs, strict=True):
            mine.copy_(given)
        recording.replay()
        return recording.output


@contextlib.contextmanager
def _watched() -> Iterator[list[str]]:
    """Collects what torch says of calls that wait for a CUDA device; other warnings go their way."""
    found: list[str] = []
    if not torch.cuda.is_available():
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found += [str(each.message) for each in caught if _WAITS in str(each.message)]
    for each in caught:
        # Torch says of its own mode that it is a prototype.
        if _WAITS not in str(each.message) and "Synchronization debug mode" not in str(each.message):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
