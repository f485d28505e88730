"""A path of models from the prior to the model itself, for objectives that would otherwise settle for a part.

    p_β(x, z) = p(z) p(x | z)^β,    β from 0 to 1

For a fixed target γ(z) with a broad base p(z) this is the geometric path p(z)^(1−β) γ(z)^β.

Source: Neal, Annealed Importance Sampling, 2001, for the path; Rezende and Mohamed, Variational Inference with
Normalizing Flows, 2015, for annealing an objective along it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.distributions import Distribution

from ddvi.errors import InputError
from ddvi.likelihoods import Likelihood
from ddvi.model import LatentVariableModel
from ddvi.objectives.base import Batch, Objective, Update
from ddvi.objectives.elbo import risen


@final
class Powered(Likelihood):
    """p(x | z)^β, with its factor 1/∫ p(x | z)^β dx left out: all that depends on z or x is there.

    Args:
        likelihood: p(x | z).
        exponent: β.
    """

    def __init__(self, likelihood: Likelihood, exponent: float | Tensor) -> None:
        super().__init__()
        self.likelihood = likelihood
        self.exponent: float | Tensor = exponent
        self.event_shape: torch.Size = likelihood.event_shape

    def forward(self, z: Tensor) -> Distribution:
        return self.likelihood(z)

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return self._powered(self.likelihood.log_prob(x, z))

    def pairwise_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return self._powered(self.likelihood.pairwise_log_prob(x, z))

    def _powered(self, log_prob: Tensor) -> Tensor:
        """Where there is no mass, there is none at any β, 0 included."""
        return torch.where(log_prob == -torch.inf, log_prob, self.exponent * log_prob)


@final
@dataclass(frozen=True)
class Tempered(Objective):
    """Another objective along the tempered path, see the module.

    Args:
        objective: what trains at each β.
        rise: share of training over which β rises linearly to 1, in (0, 1].
        start: where β begins, in [0, 1].

    Raises:
        InputError: rise or start is out of range.

    Sources: Neal, 2001; Rezende and Mohamed, 2015.

    Example:
        >>> Tempered(ddvi.LogVariance(), rise=0.8).exponent(0.4)
        0.5
    """

    objective: Objective
    rise: float = 0.5
    start: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.rise <= 1 and 0 <= self.start <= 1):
            raise InputError(f"rise={self.rise} is in (0, 1] and start={self.start} in [0, 1]; correct them")

    @property
    def through_draws(self) -> bool:
        return self.objective.through_draws

    def exponent(self, progress: float | Tensor) -> float | Tensor:
        """β when `progress` 0 … 1 of training is over."""
        return self.start + risen(1 - self.start, self.rise, progress)

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        exponent = self.exponent(batch.progress)
        if isinstance(exponent, Tensor) or exponent < 1:
            others = model.preprocessing, model.discriminator, model.classifier
            likelihood = Powered(model.likelihood, exponent)
            model = LatentVariableModel(model.prior, likelihood, model.posterior, *others)
        yield from self.objective.updates(model, batch)
