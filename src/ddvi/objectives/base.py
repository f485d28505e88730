"""What an objective is: a frozen value that yields the updates of one training step."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ddvi.errors import InputError, is_whole
from ddvi.model import LatentVariableModel


@dataclass(frozen=True)
class Labelled:
    """Observations whose label is known."""

    x: Tensor
    """(B, *event)."""
    label: Tensor
    """(B,), integers 0 … C − 1."""


@dataclass(frozen=True)
class Batch:
    """What a training step sees.

    Example:
        >>> Batch(torch.zeros(4, 3)).progress
        1.0
    """

    x: Tensor
    """Observations (B, *event)."""
    progress: float | Tensor = 1.0
    """How much of training is over, 0 … 1, for weights that change on the way."""
    labelled: Labelled | None = None
    """In semi-supervised learning as many again, with their labels."""
    z: Tensor | None = None
    """The latents (B, D) that x was simulated from, where they are known."""


@dataclass(frozen=True)
class Update:
    """One update: the children of the model that it trains, and the loss that trains them.

    Example:
        >>> update = next(ddvi.ELBO().updates(model, Batch(x)))
        >>> update.children, update.loss.shape
        (('likelihood', 'posterior', 'classifier', 'prior'), torch.Size([3]))
    """

    children: tuple[str, ...]
    loss: Tensor
    """Loss per example (B,), in nats; the loop takes its mean."""
    terms: dict[str, Tensor]
    """Named parts per example (B,), for the log."""


@dataclass(frozen=True)
class Objective(abc.ABC):
    """A way to train a model, as a frozen value: values compare equal when they say the same.

    A subclass gives `updates`. The loop takes the mean of each update's loss (B,), which is in nats.

    Example:
        >>> ddvi.ELBO(samples=2) == ddvi.ELBO(samples=2)
        True
    """

    @property
    def through_draws(self) -> bool:
        """Whether the posterior learns by a gradient of log p(x, z) in z, which densities must have then."""
        return False

    @abc.abstractmethod
    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        """The updates of one step, in order: each is carried out before the next one is computed."""


def check_least(objective: Objective, **least: int) -> None:
    """Refuse a count of an objective that is below the least one by its name, and a negative weight.

    No `levels`, None, are all of them.

    Raises:
        InputError: a count isn't whole or is too small, or another number is negative or not finite.
    """
    who = type(objective).__name__
    for name, minimum in least.items():
        value: Any = getattr(objective, name)
        if name == "levels" and value is None:
            value = minimum
        whole = is_whole(value)
        if not whole or value < minimum:
            wanted = f"{minimum} or more" if whole else f"a whole number, {minimum} or more"
            raise InputError(f"{name}={value} is impossible in {who}; give {wanted}")
    for name, value in vars(objective).items():
        if isinstance(value, float | int) and not 0 <= value < math.inf:
            raise InputError(f"{name}={value} is impossible in {who}; give 0 or more")


@dataclass(frozen=True)
class DataObjective(Objective):
    """An objective whose first update is one loss on data, where a label may be known or not; usually the only one."""

    @abc.abstractmethod
    def loss(
        self, model: LatentVariableModel, x: Tensor, label: Tensor | None = None, progress: float | Tensor = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (B,) of x (B, *event) and its named terms; in a model with labels, None is the sum over all of them."""

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        loss, terms = self.loss(model, batch.x, None, batch.progress)
        yield Update(("likelihood", "posterior", "classifier", "prior"), loss, terms)
