"""What an objective is: a frozen value that yields the updates of one training step."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ddvi.model import LatentVariableModel


@dataclass(frozen=True)
class Batch:
    """What a training step sees."""

    x: Tensor
    """Observations (B, *event)."""
    progress: float = 1.0
    """How much of training is over, 0 … 1, for weights that change on the way."""


@dataclass(frozen=True)
class Update:
    """One update: the children of the model that it trains, and the loss that trains them."""

    children: tuple[str, ...]
    loss: Tensor
    """Loss per example (B,), in nats; the loop takes its mean."""
    terms: dict[str, Tensor]
    """Named parts per example (B,), for the log."""


@dataclass(frozen=True)
class Objective(abc.ABC):
    """A way to train a model. Values compare equal when they say the same."""

    @abc.abstractmethod
    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        """The updates of one step, in order: each is carried out before the next one is computed."""
