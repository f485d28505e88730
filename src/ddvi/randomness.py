"""Random state, and random numbers of a batch that several processes share.

The caller's state is never changed: what accepts a generator gets one from `generator`; everything else runs inside
`seeded`, which gives torch's state back when it ends.

Several processes that train together have the same state. Each draws what the whole batch needs and keeps the numbers
of its own rows, so that a result doesn't depend on how many there are. Which axis holds the rows only the place that
draws can tell: whatever is drawn in training goes through `draw`, or `sample` for a distribution.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from ddvi.errors import InputError, TrainingError


def derive_seed(seed: int, *stream: int | str) -> int:
    """A seed for one purpose out of a run's seed: distinct streams are independent, the same stream repeats exactly."""
    text = ":".join(str(part) for part in (seed, *stream))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def generator(seed: int, *stream: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for the stream named by `stream`, see `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *stream))


@contextlib.contextmanager
def seeded(seed: int, *stream: int | str) -> Iterator[None]:
    """Run a block under its own random state on every device, and restore the caller's afterwards.

    Args:
        seed: 0 or more.
        stream: what it is for, so that equal seeds give other numbers to other purposes.

    Example:
        >>> with seeded(0, "example"):
        ...     first = torch.rand(3)
        >>> with seeded(0, "example"):
        ...     bool((torch.rand(3) == first).all())
        True
    """
    with preserved():
        torch.manual_seed(derive_seed(seed, *stream))
        yield


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Restore torch's random state, on the CPU and on every accelerator, when the block ends."""
    saved, seed = random_state(), torch.initial_seed()
    begun = torch.cuda.is_initialized()
    try:
        yield
    finally:
        set_random_state(saved)
        if torch.cuda.is_available() and not begun:
            # There was no state to keep, but a seed to come, in whose place that of the block would stand.
            torch.cuda.manual_seed_all(seed)


def random_state() -> dict[str, Tensor]:
    """Torch's global random state, by device; part of a checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Put back what `random_state` returned; devices that are not here are passed over."""
    torch.set_rng_state(state["cpu"].cpu())
    for name, value in state.items():
        if name.startswith("cuda") and torch.cuda.is_available() and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value.cpu(), name)
        elif name == "mps" and torch.backends.mps.is_available():
            torch.mps.set_rng_state(value.cpu())


@dataclass(frozen=True)
class Shard:
    """The rows of a batch that one of several processes has.

    Parts are of one size, ⌈count / world⌉, so that no process is ever without rows. Where that doesn't come out even,
    the last parts begin earlier, and the rows that they share with the part before count there alone.

    Args:
        count: rows of the whole batch.
        rank: which process this is, from 0.
        world: how many there are.
    """

    count: int
    rank: int
    world: int

    @property
    def size(self) -> int:
        """Rows of a part."""
        return math.ceil(self.count / self.world)

    @property
    def start(self) -> int:
        """The first row of this part."""
        return min(self.rank * self.size, self.count - self.size)

    def whole(self, shape: Sequence[int], axis: int) -> list[int]:
        """The shape for the whole batch of one for this part; the axis may hold several batches one after the other."""
        if shape[axis] % self.size:
            raise InputError(
                f"random numbers of shape {tuple(shape)} have no axis of {self.size} rows, which is what this process"
                " has of the batch; draw one or more for each row"
            )
        whole = list(shape)
        whole[axis] = shape[axis] // self.size * self.count
        return whole

    def part(self, whole: Tensor, axis: int = 0) -> Tensor:
        """This part of a tensor for the whole batch."""
        axis %= whole.dim()
        batches = whole.unflatten(axis, (-1, self.count))
        return batches.narrow(axis + 1, self.start, self.size).flatten(axis, axis + 1).contiguous()

    def own(self, part: Tensor) -> Tensor:
        """The rows (*, …) of this part, as `part` gives them along the first axis, that count here."""
        if not part.dim() or len(part) % self.size:
            raise InputError(
                f"a loss or a term of shape {tuple(part.shape)} isn't one for each of the {self.size} examples of this"
                " process, without which several devices don't know what to count"
            )
        return part.unflatten(0, (-1, self.size))[:, self.rank * self.size - self.start :].flatten(0, 1)


_SHARD: ContextVar[Shard | None] = ContextVar("shard", default=None)
_ALIKE: ContextVar[bool] = ContextVar("alike", default=False)
_PORTABLE: ContextVar[bool] = ContextVar("portable", default=False)


@contextlib.contextmanager
def sharded(shard: Shard | None, watched: bool = False) -> Iterator[None]:
    """Let what is drawn in a block be this part of what would be drawn for the whole batch; None draws as it is.

    Args:
        shard: the part.
        watched: refuse random numbers that are drawn past `draw` and `sample`; a look at every call of torch.
    """
    token = _SHARD.set(shard)
    try:
        with _Watch() if watched and shard else contextlib.nullcontext():
            yield
    finally:
        _SHARD.reset(token)


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """Let what is drawn in a block by `draw` be the same for every row of a batch.

    Then what is computed of a row depends neither on the other rows nor on where it stands among them.
    """
    token = _ALIKE.set(True)
    try:
        yield
    finally:
        _ALIKE.reset(token)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Let what is drawn in a block by `draw` be the same on every device, in every precision but for rounding."""
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def part(values: Tensor, axis: int = 0) -> Tensor:
    """Of values for the whole batch those of this process's rows."""
    shard = _SHARD.get()
    return values if shard is None else shard.part(values, axis)


def own(values: Tensor) -> Tensor:
    """Of values (B,) for this process's rows those that no other process counts."""
    shard = _SHARD.get()
    return values if shard is None else shard.own(values)


def mean(values: Tensor) -> Tensor:
    """What this process contributes to the mean (*) over the batch of values (B, *): the sum over processes is it."""
    shard = _SHARD.get()
    return values.mean(0) if shard is None else shard.own(values).sum(0) / shard.whole(values.shape, 0)[0]


def whole_mean(values: Tensor) -> Tensor:
    """The mean (*) over the batch of all processes of values (B, *), without gradient."""
    found = mean(values.detach())
    if _SHARD.get() is not None:
        reduce(found)
    return found


def draw(sampler: Callable[..., Tensor], shape: Sequence[int], axis: int, **options: Any) -> Tensor:
    """Random numbers `sampler(shape, **options)`, such as `torch.randn`, in training.

    Every process draws those of the whole batch, from the same random state, and keeps its own. So what is drawn
    doesn't depend on how many there are, and no two rows share their numbers.

    Args:
        sampler: from a shape to a tensor of it.
        shape: of what this process needs.
        axis: the one that belongs to the batch.
        options: for the sampler.
    """
    shard = _SHARD.get()
    if _PORTABLE.get():
        drawn = sampler(shape, **options | {"dtype": torch.float32, "device": "cpu"})
        return drawn.to(options.get("device"), options.get("dtype"))
    if _ALIKE.get():
        one = list(shape)
        one[axis] = 1
        return sampler(one, **options).expand(*shape)
    if shard is None:
        return sampler(shape, **options)
    with sharded(None):
        drawn = sampler(shard.whole(shape, axis), **options)
    return shard.part(drawn, axis)


def draw_whole(sampler: Callable[..., Tensor], count: int, **options: Any) -> Tensor:
    """`sampler((rows,), **options)` for the rows of all processes, of which this one has `count`; `part` takes them."""
    shard = _SHARD.get()
    with sharded(None):
        return sampler((count,) if shard is None else shard.whole((count,), 0), **options)


def sample(distribution: Distribution) -> Tensor:
    """A draw of a distribution whose batch shape begins with the batch; for several processes as `draw`."""
    shard = _SHARD.get()
    if shard is None:
        return distribution.sample()
    with _Together(shard), sharded(None), torch.no_grad():
        return distribution.sample()


def resample(log_weight: Tensor, count: int) -> Tensor:
    """Systematic resampling: `count` of C candidates for each column of (C, B), in proportion to weight: (count, B).

    Each of them alone is a fair draw, and together they are as even as can be. One of weight NaN counts as impossible,
    or if all are, as any: what is computed of it says so, a draw can't.

    Source: Kitagawa, Monte Carlo Filter and Smoother, 1996.
    """
    candidates, batch = log_weight.shape
    # Along the last axis, which is the fast one of a GPU.
    weight = log_weight.T.contiguous().nan_to_num(torch.finfo(log_weight.dtype).min).softmax(-1)
    reached = weight.cumsum(-1)
    options = {"dtype": reached.dtype, "device": reached.device}
    points = (torch.arange(count, **options)[:, None] / count + draw(torch.rand, (1, batch), -1, **options)) % 1
    # Above 0, where one without weight may be the first.
    points = (points.T.contiguous() * reached[:, -1:]).clamp_min(torch.finfo(reached.dtype).tiny)
    return torch.searchsorted(reached, points).T.clamp(max=candidates - 1)


def taken(values: Tensor, chosen: Tensor) -> Tensor:
    """Of values (C, B, F) the chosen ones (count, B) of each column: (count, B, F)."""
    return values.gather(0, chosen.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def choose(log_weight: Tensor) -> Tensor:
    """One of C candidates for each column of log weights (C, B), as `resample` draws it: (B,)."""
    return resample(log_weight, 1)[0]


def reduce(tensor: Tensor, operation: Any = torch.distributed.ReduceOp.SUM) -> None:
    """Replace a tensor by what all processes have, summed or otherwise.

    Raises:
        TrainingError: one of them isn't there any more.
    """
    try:
        torch.distributed.all_reduce(tensor, operation)
    except RuntimeError as error:
        raise TrainingError(
            "a process of this run has ended, and the others with it; the last checkpoint is kept: resume=true goes on"
            f" from it ({str(error).partition('. ')[0]})"
        ) from error


_BY_SHAPE = {"rand", "randn"}
_LIKE = {"rand_like", "randn_like"}
_IN_PLACE = {"uniform_", "normal_", "exponential_", "cauchy_", "geometric_", "log_normal_", "bernoulli_"}
_BY_PARAMETERS = {"normal", "poisson", "bernoulli", "binomial", "multinomial", "_standard_gamma", "_sample_dirichlet"}
_OTHERS = {"randint", "randint_like", "random_", "dropout", "dropout_", "alpha_dropout", "feature_dropout"}
_RANDOM = _BY_SHAPE | _LIKE | _IN_PLACE | _BY_PARAMETERS | _OTHERS


class _Watch(TorchFunctionMode):
    """Refuses a random function of which nobody said where the batch is: each process would draw the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = getattr(func, "__name__", ""), kwargs or {}
        idle = "dropout" in name and not options.get("training", next((v for v in args if isinstance(v, bool)), True))
        if name in _RANDOM and _SHARD.get() is not None and options.get("generator") is None and not idle:
            raise InputError(
                f"{name} would give the same random numbers to each of several devices; use ddvi.randomness.draw, which"
                " is told the axis of the batch, ddvi.randomness.sample or ddvi.networks.Dropout, or train with"
                " devices=1"
            )
        return func(*args, **options)


class _Together(TorchFunctionMode):
    """Has random functions draw for the rows of all processes, and keeps those of this one.

    How many numbers a function takes may depend on its parameters, so it sees those of all rows. Rows come first, or
    are what the first axis is a flattened form of.
    """

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self.shard = shard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = getattr(func, "__name__", ""), kwargs or {}
        if name in _BY_SHAPE:
            shape = args[0] if isinstance(args[0], Sequence) else args
            return self._part(func(self._whole(shape), **options))
        if name in _LIKE:
            return self._part(func(args[0].new_empty(self._whole(args[0].shape)), *args[1:], **options))
        if name in _IN_PLACE:
            drawn = func(args[0].new_empty(self._whole(args[0].shape)), *args[1:], **options)
            return args[0].copy_(self._part(drawn))
        if name in _BY_PARAMETERS:
            options = {key: self._gathered(value) for key, value in options.items()}
            return self._part(func(*map(self._gathered, args), **options))
        return func(*args, **options)

    def _whole(self, shape: Sequence[int]) -> list[int]:
        return [shape[0] // self.shard.size * self.shard.count, *shape[1:]]

    def _part(self, drawn: Tensor) -> Tensor:
        rows = drawn.unflatten(0, (self.shard.count, -1))
        return rows.narrow(0, self.shard.start, self.shard.size).flatten(0, 1)

    def _gathered(self, values: Any) -> Any:
        """The rows of all processes: each adds its own to zeros."""
        if not isinstance(values, Tensor) or not values.dim():
            return values
        rows = values.unflatten(0, (self.shard.size, -1))
        whole = rows.new_zeros(self.shard.count, *rows.shape[1:])
        mine = self.shard.own(rows)
        whole.narrow(0, self.shard.rank * self.shard.size, len(mine)).copy_(mine) if len(mine) else None
        reduce(whole)
        return whole.flatten(0, 1)
