"""The evidence lower bound and the importance-weighted bound, differentiated through the draws.

ELBO = E_q [ log p_θ(x|z) + kl_weight ( log p(z) + log r(a|z) − log q_φ(z,a|x) ) ]
IW_K = E_q [ log 1/K Σ_k exp( the same bracket ) ]
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from torch import Tensor

from ddvi.model import LatentVariableModel, Weights
from ddvi.objectives.base import Batch, Objective, Update


def bound_terms(weights: Weights) -> dict[str, Tensor]:
    """Reconstruction and divergence (nats per example, both to be small), averaged over draws: (B,) each."""
    divergence = weights.log_ratio - weights.log_prior
    return {"reconstruction": -weights.log_likelihood.mean(0), "divergence": divergence.mean(0)}


def risen(kl_weight: float, kl_rise: float, progress: float) -> float:
    """The KL weight on its linear rise from 0 over the first `kl_rise` of training."""
    return kl_weight * min(1.0, progress / kl_rise) if kl_rise > 0 else kl_weight


@final
@dataclass(frozen=True)
class ELBO(Objective):
    """The evidence lower bound.

    Args:
        samples: draws per example.
        kl_weight: weight of everything but the reconstruction; 1 is the bound.
        kl_rise: share of training over which that weight rises linearly from 0.
        path_gradient: score log q with parameters held fixed, so that its gradient comes through the draw alone; lower
            variance near the optimum (Roeder et al. 2017; Tucker et al. 2019).
    """

    samples: int = 1
    kl_weight: float = 1.0
    kl_rise: float = 0.0
    path_gradient: bool = False

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        features = model.posterior.encode(batch.x)
        draw = model.posterior.condition(features).draw((self.samples,))
        if self.path_gradient:
            draw = draw._replace(log_ratio=model.posterior.stopped_log_ratio(features, draw.path))
        weights = model.weigh(batch.x, draw)
        loss = -weights.log_weight(risen(self.kl_weight, self.kl_rise, batch.progress)).mean(0)
        yield Update(("likelihood", "posterior", "prior"), loss, bound_terms(weights))


@final
@dataclass(frozen=True)
class ImportanceWeighted(Objective):
    """The importance-weighted bound (Burda et al. 2016).

    Args:
        samples: K.
        kl_weight: as in `ELBO`.
        kl_rise: as in `ELBO`.
    """

    samples: int = 8
    kl_weight: float = 1.0
    kl_rise: float = 0.0

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        weights = model.weigh(batch.x, model.posterior(batch.x).draw((self.samples,)))
        log_weight = weights.log_weight(risen(self.kl_weight, self.kl_rise, batch.progress))
        loss = math.log(self.samples) - log_weight.logsumexp(0)
        yield Update(("likelihood", "posterior", "prior"), loss, bound_terms(weights))
