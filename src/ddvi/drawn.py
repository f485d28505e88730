"""A distribution over what a user's own code draws, and perhaps scores."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.distributions import Distribution

from ddvi.errors import InputError


@final
class DrawnDistribution(Distribution):
    """What can be drawn, and perhaps scored: x (*batch, *event) as a user's own code makes it.

    Args:
        draw: gives one x.
        score: from x to its log density (*batch); None for a simulator, which has none.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(
        self,
        batch_shape: torch.Size,
        event_shape: torch.Size,
        draw: Callable[[], Tensor],
        score: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(batch_shape, event_shape, validate_args=False)
        self.draw = draw
        self.score = score

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        if not sample_shape:
            return self._checked(self.draw(), shape, "a draw")
        draws = [
            self._checked(self.draw(), shape[len(sample_shape) :], "a draw") for _ in range(math.prod(sample_shape))
        ]
        return torch.stack(draws).view(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self.score is None:
            raise InputError(
                "this likelihood gives draws without a density, so there is no bound and only sleep can train; use"
                " fit_simulations, or give a torch distribution"
            )
        batch_shape = value.shape[: value.dim() - len(self.event_shape)]
        return self._checked(self.score(value), torch.broadcast_shapes(batch_shape, self.batch_shape), "log_prob")

    @staticmethod
    def _checked(value: Tensor, shape: torch.Size, what: str) -> Tensor:
        if value.shape != shape:
            raise InputError(f"{what} of the likelihood has shape {tuple(value.shape)}; make it {tuple(shape)}")
        return value


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """A block in which torch's checks of distributions rest: numbers that have gone astray are judged elsewhere."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
