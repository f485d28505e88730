"""The least time of a training step or of inference, from what it must compute and move.

    floor = Σ over matrix products of the best time of a product of that shape
          + bytes that the optimiser moves / memory bandwidth

Products are counted as torch carries them out, and timed in the same layouts; all else (activations, draws, densities,
gathering a batch) is left out, so that no arrangement of the same work reaches the floor. Adam reads a parameter, its
gradient and its two moments, and writes the parameter and the moments: 28 bytes in single precision.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rates import Subject, wait
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import flop_registry

from ddvi.randomness import preserved
from ddvi.recording import captured

_RECORDED = 20
ADAM_PASSES = 7
"""Reads of p, g, m, v and writes of p, m, v."""


class Layout(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self, device: torch.device) -> Tensor:
        """One of this layout, with random values."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return torch.randn(max(extent, 1), dtype=self.dtype, device=device).as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Product:
    """A matrix product (or convolution) as torch was asked for it, tensors by their layouts."""

    operation: Any
    arguments: tuple[Any, ...]
    structure: Any = field(repr=False, compare=False)  # of the arguments, see `torch.utils._pytree`
    flops: int

    def __str__(self) -> str:
        shapes = ["×".join(str(size) for size in part.shape) for part in self.arguments if isinstance(part, Layout)]
        return f"{self.operation} {' · '.join(shapes)}"


Moved = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor that an optimiser updates."""


class Parameter(NamedTuple):
    """A tensor that an optimiser updates."""

    identity: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Work:
    """What a step on so many examples carries out: matrix products, and updates of parameters by the optimisers."""

    examples: int
    products: Counter[Product]
    updates: Counter[Parameter]

    @property
    def flops(self) -> int:
        return sum(product.flops * count for product, count in self.products.items())

    @property
    def moved(self) -> tuple[Moved, ...]:
        """Each parameter that is updated, once."""
        return tuple((part.shape, part.dtype) for part in self.updates)

    @property
    def optimiser_bytes(self) -> int:
        return sum(
            ADAM_PASSES * torch.Size(part.shape).numel() * part.dtype.itemsize * count
            for part, count in self.updates.items()
        )


class _Recorder(TorchDispatchMode):
    """Notes every matrix product, the backward pass's included."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:  # a composite operation may hold a product
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        result = func(*args, **kwargs)
        flat, structure = tree_flatten((args, kwargs))
        arguments = tuple(
            Layout(tuple(part.shape), part.stride(), part.dtype) if isinstance(part, Tensor) else part for part in flat
        )
        self.products[Product(func, arguments, structure, formula(*args, **kwargs, out_val=result))] += 1
        return result


@contextlib.contextmanager
def _noted_updates() -> Iterator[Counter[Parameter]]:
    updates: Counter[Parameter] = Counter()

    def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            updates.update(Parameter(id(p), tuple(p.shape), p.dtype) for p in group["params"] if p.grad is not None)

    handle = register_optimizer_step_post_hook(note)
    try:
        yield updates
    finally:
        handle.remove()


def count(run: Callable[[], object], examples: int) -> Work:
    """What `run` carries out, on so many examples."""
    with _noted_updates() as updates, _Recorder() as recorder:
        run()
    return Work(examples, recorder.products, updates)


@contextlib.contextmanager
def plain(subject: Subject) -> Iterator[None]:
    """The model as its formulas say: without what a faster arrangement computes besides."""
    chains: list[Any] = [part for part in subject.model.posterior.modules() if hasattr(part, "plain_gradient")]
    before = [chain.plain_gradient for chain in chains]
    try:
        for chain in chains:
            chain.plain_gradient = True
        yield
    finally:
        for chain, value in zip(chains, before, strict=True):
            chain.plain_gradient = value


def training_work(subject: Subject) -> Work:
    """Of one step of the trainer's loop."""
    with plain(subject):
        return count(subject.train_one_step, subject.settings.batch_size)


def inference_work(subject: Subject, batch_size: int) -> Work:
    """Of drawing latents for one batch."""
    part = subject.fabric.to_device(subject.images.x[:batch_size])
    with plain(subject):
        return count(lambda: subject.infer(part, batch_size), len(part))


@dataclass(frozen=True)
class Floor:
    """The least time of some work."""

    examples: int
    flops: int
    product_seconds: float
    optimiser_bytes: int
    bandwidth: float
    """Bytes per second; 0 where no optimiser moves any."""

    @property
    def optimiser_seconds(self) -> float:
        return self.optimiser_bytes / self.bandwidth if self.optimiser_bytes else 0.0

    @property
    def seconds_per_example(self) -> float:
        return (self.product_seconds + self.optimiser_seconds) / self.examples

    @property
    def rate(self) -> float:
        """Examples per second that can't be exceeded."""
        return 1 / self.seconds_per_example

    def as_dict(self) -> dict[str, float]:
        """For the record, per step and per example."""
        return {
            "examples": self.examples,
            "flops_per_example": self.flops / self.examples,
            "flops_per_second": self.flops / self.product_seconds,
            "product_seconds_per_step": self.product_seconds,
            "optimiser_bytes_per_step": self.optimiser_bytes,
            "optimiser_bytes_per_second": self.bandwidth,
            "optimiser_seconds_per_step": self.optimiser_seconds,
            "seconds_per_example": self.seconds_per_example,
            "examples_per_second": self.rate,
        }


class Machine:
    """Measures what floors are made of, each shape once, and once more when asked to: the best counts.

    Args:
        device: where.
        budget: seconds for each shape, about.
    """

    def __init__(self, device: torch.device, budget: float = 0.05) -> None:
        self.device = device
        self.budget = budget
        self.seconds: dict[Product, float] = {}
        """The best time of each product so far."""
        self._bandwidth: dict[tuple[Moved, ...], float] = {}

    def floor(self, work: Work) -> Floor:
        """The least time of some work, by what is known so far; what isn't yet is measured."""
        parts = work.moved
        seconds = sum(self.product_seconds(product) * count for product, count in work.products.items())
        bandwidth = self.bandwidth(*parts) if parts else 0.0
        return Floor(work.examples, work.flops, seconds, work.optimiser_bytes, bandwidth)

    def measure(self, work: Work) -> None:
        """All that the work is made of, on a CPU anew, in case that something else ran when it was measured before."""
        shared = self.device.type == "cpu"
        with preserved():
            for product in work.products:
                if shared or product not in self.seconds:
                    self.seconds[product] = min(self._time(product), self.seconds.get(product, float("inf")))
            parts = work.moved
            if parts and (shared or parts not in self._bandwidth):
                self._bandwidth[parts] = max(self._move(*parts), self._bandwidth.get(parts, 0.0))

    def product_seconds(self, product: Product) -> float:
        """Of one product of this shape on the current path of matrix products."""
        if product not in self.seconds:
            self.seconds[product] = self._time(product)
        return self.seconds[product]

    def bandwidth(self, *parts: Moved) -> float:
        """Bytes per second over as much memory as Adam moves for tensors of these shapes.

        The greater of two: fused Adam on such tensors, and a sum in place of two buffers that are as large together.
        """
        if parts not in self._bandwidth:
            self._bandwidth[parts] = self._move(*parts)
        return self._bandwidth[parts]

    @torch.no_grad()
    def _time(self, product: Product) -> float:
        parts = [part.tensor(self.device) if isinstance(part, Layout) else part for part in product.arguments]
        args, kwargs = tree_unflatten(parts, product.structure)
        return self.best(lambda: product.operation(*args, **kwargs))

    def _move(self, *parts: Moved) -> float:
        tensors = [torch.randn(shape, dtype=dtype, device=self.device) for shape, dtype in parts]
        size = sum(part.nbytes for part in tensors)
        for part in tensors:
            part.requires_grad_().grad = torch.randn_like(part)
        kind = self.device.type
        adam = torch.optim.Adam(tensors, fused=kind in ("cpu", "cuda"), capturable=kind == "cuda")
        rate = ADAM_PASSES * size / self.best(adam.step)
        del adam, tensors
        x, y = torch.ones(2, size // 2, device=self.device, dtype=torch.float32)  # zeros might share a page
        return max(rate, 3 * x.nbytes / self.best(lambda: x.add_(y)))

    def best(self, call: Callable[[], object], least: int = 5) -> float:
        """Least seconds of a call. Short ones are timed several at once, which hides what the clock costs.

        On a GPU they are recorded, which hides what the CPU takes to launch them.
        """
        at_once, call = _together(call) if self.device.type == "cuda" else (1, call)
        return self._best(call, least) / at_once

    def _best(self, call: Callable[[], object], least: int) -> float:
        def several(count: int) -> float:
            started = time.perf_counter()
            for _ in range(count):
                call()
            wait(self.device)
            return (time.perf_counter() - started) / count

        several(2)
        span = 5e-5 if self.device.type == "cpu" else 2e-3
        at_once = max(1, int(span / several(1)))
        best, repeats, until = float("inf"), 0, time.perf_counter() + self.budget
        while repeats < least or time.perf_counter() < until:
            best, repeats = min(best, several(at_once)), repeats + 1
        return best


def _together(call: Callable[[], object]) -> tuple[int, Callable[[], object]]:
    """How many calls there are in what is given, which has a GPU carry them out one after the other."""
    call()
    with captured() as graph:
        for _ in range(_RECORDED):
            call()
    return _RECORDED, graph.replay
