"""The log-variance loss: where the posterior is exact, all log weights are equal.

    ½ Var_k [ log p(x, z_k) + log r(a_k | z_k) − log q_φ(z_k, a_k | x) ],    (z_k, a_k) ~ q held fixed

Draws carry no gradient, so neither the chain nor the model is differentiated. At draws from q itself, and where r
has no parameters, its gradient is an estimate of that of the reverse Kullback–Leibler divergence, with a control
variate: the mean over the draws.

Sources: Nüsken and Richter, Solving High-dimensional Hamilton–Jacobi–Bellman PDEs Using Neural Networks, 2021; Richter
et al., VarGrad, 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from ddvi.model import LatentVariableModel
from ddvi.objectives.base import Batch, Objective, Update, check_least
from ddvi.posteriors.base import Conditional, Draw

_LARGEST_DEVIATION = 10.0  # nats: log weights have heavy tails, and one draw would outweigh its batch


def deviations(conditional: Conditional, draw: Draw, log_weight: Tensor) -> Tensor:
    """log w_k of draws held fixed, less its mean over them, both with the gradient of −(log q − log r) alone.

    Args:
        conditional: q(z, a | x), whose gradient is wanted.
        draw: K draws from it, (K, B, D).
        log_weight: theirs, (K, B), nats.

    Returns:
        (K, B), nats.
    """
    score = conditional.log_ratio(draw.path.detach())
    log_weight = log_weight.detach() + (score.detach() - score)
    return log_weight - log_weight.mean(0)


def robust_log_variance(conditional: Conditional, draw: Draw, log_weight: Tensor) -> Tensor:
    """Half the variance of log w over K draws, with Huber's h for ½ of the square, linear from 10 nats on: (B,).

    Arguments are those of `deviations`; K is at least 2.

    Sources: Richter et al., VarGrad, 2020; Huber, 1964.
    """
    deviation = deviations(conditional, draw, log_weight)
    none = torch.zeros_like(deviation)
    each = functional.huber_loss(deviation, none, reduction="none", delta=_LARGEST_DEVIATION)
    return each.sum(0) / (len(deviation) - 1)


@final
@dataclass(frozen=True)
class LogVariance(Objective):
    """Half the variance of log w over draws without gradient, see the module; the posterior alone learns.

    Args:
        samples: K, draws per example, at least 2.

    Raises:
        InputError: K is below 2.

    Sources: Nüsken and Richter, 2021; Richter et al., VarGrad, 2020.

    Example:
        >>> LogVariance().samples
        256
    """

    samples: int = 256

    def __post_init__(self) -> None:
        check_least(self, samples=2)

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        conditional = model.posterior(batch.x)
        with torch.no_grad():
            draw = conditional.draw((self.samples,))
            log_weight = model.weigh(batch.x, draw).log_weight()
        loss = 0.5 * deviations(conditional, draw, log_weight).var(0)
        yield Update(("posterior",), loss, {"log_variance": loss, "negative_bound": -log_weight.mean(0)})
