"""How a training proceeds: its phases, batches and learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ddvi.objectives.base import Objective


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Args:
        epochs: its length.
        objective: what it trains.
        frozen: names of the model's children that rest.

    Example:
        >>> Phase(10, ddvi.ELBO(), frozen=frozenset({"likelihood"})).epochs
        10
    """

    epochs: int
    objective: Objective
    frozen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Schedule:
    """How training proceeds, whatever it trains.

        lr(progress) = lr · ½ (1 + cos(π · progress))    with shape "cosine"

    Args:
        phases: in order.
        batch_size: examples per step.
        lr: Adam's learning rate at its highest.
        shape: "cosine" falls to 0 at the end, "constant" stays.
        clip_norm: largest gradient norm of one update; 0 switches clipping off.
        seed: of batches and everything random.

    Source: Kingma and Ba, Adam, 2015; Loshchilov and Hutter, SGDR, 2017, for the cosine.

    Example:
        >>> schedule = Schedule((Phase(2, ddvi.WarmUp()), Phase(8, ddvi.ELBO())))
        >>> schedule.epochs, schedule.learning_rate(0.5), schedule.phase(2).objective == ddvi.ELBO()
        (10, 0.0005, True)
    """

    phases: tuple[Phase, ...]
    batch_size: int = 128
    lr: float = 1e-3
    shape: str = "cosine"
    clip_norm: float = 10.0
    seed: int = 0

    @property
    def epochs(self) -> int:
        return sum(phase.epochs for phase in self.phases)

    def phase(self, epoch: int) -> Phase:
        """The phase that epoch (from 0) belongs to."""
        for phase in self.phases:
            if epoch < phase.epochs:
                return phase
            epoch -= phase.epochs
        return self.phases[-1]

    def learning_rate(self, progress: float) -> float:
        """At `progress` 0 … 1 of the training."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress)) if self.shape == "cosine" else self.lr
