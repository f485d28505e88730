"""Learning a posterior from weighted draws, for models whose fantasies say nothing, such as fixed targets.

K draws come from q, and a share ε of them from the prior, with a ~ r(a | z): from the mixture

    m(z, a) = ε p(z) r(a | z) + (1 − ε) q(z, a | x).

They are weighted by p_β(x, z) r(a | z) / m(z, a), p_β = p(z) p(x | z)^β, and M of them are resampled, on which the
posterior raises its bound of log q(z | x): the divergence from p_β to q, which a q that misses a part can't make small.
The prior's share bounds the weights by p(x | z)/ε, so that a part which q has lost comes back.

β is the largest exponent at which the weights are worth a given share of the K draws. As q follows, β rises by itself.

Sources: Bornschein and Bengio, Reweighted Wake-Sleep, 2015; Hesterberg, Weighted Average Importance Sampling and
Defensive Mixture Distributions, 1995; Jasra et al., 2011, for exponents by effective sample size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from ddvi.errors import InputError
from ddvi.model import LatentVariableModel
from ddvi.objectives.base import Batch, Objective, Update, check_least
from ddvi.posteriors.base import Conditional
from ddvi.randomness import draw, resample, taken

_EXPONENTS = 97  # from 1e-4 to 1, in steps of a tenth


class Proposals(NamedTuple):
    """K draws from the mixture of posterior and prior; densities are (K, B), in nats."""

    z: Tensor
    """(K, B, D)."""
    log_likelihood: Tensor
    """log p(x | z)."""
    log_prior: Tensor
    """log p(z)."""
    log_mixture: Tensor
    """log m(z, a) − log r(a | z)."""

    def log_weight(self, exponent: Tensor | float = 1.0) -> Tensor:
        """log p_β(x, z) − log_mixture; β a number, or broadcastable to (K, B)."""
        return exponent * self.log_likelihood + self.log_prior - self.log_mixture


@torch.no_grad()
def propose(
    model: LatentVariableModel, conditional: Conditional, x: Tensor, samples: int, prior_share: float
) -> Proposals:
    """K = `samples` draws, a fixed number of them from the prior, without gradient.

    Args:
        model: with a prior, and without labels.
        conditional: q(z, a | x).
        x: (B, *event).
        samples: K.
        prior_share: ε, rounded to a multiple of 1/K below 1.
    """
    other = min(round(prior_share * samples), samples - 1)
    own = conditional.draw((samples - other,))
    z, log_ratio = own.z, own.log_ratio
    if other:
        broad = draw(model.prior.sample, (other, len(x)), -1)
        z = torch.cat([z, broad])
        log_ratio = torch.cat([log_ratio, conditional.log_ratio(conditional.reverse_path(broad))])
    log_prior, log_mixture = model.prior.log_prob(z), log_ratio
    if other:
        share = other / samples
        log_mixture = torch.logaddexp(log_prior + math.log(share), log_ratio + math.log1p(-share))
    return Proposals(z, model.likelihood.log_prob(x, z), log_prior, log_mixture)


def effective_share(log_weight: Tensor) -> Tensor:
    """(Σ w)² / (K Σ w²) of log weights (K, *): (*), in (0, 1] (Kong 1992)."""
    return (2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp() / len(log_weight)


@final
@dataclass(frozen=True)
class Reweighted(Objective):
    """The posterior learns from M of K weighted draws, see the module; it alone learns.

    Args:
        samples: K, draws per example.
        resampled: M.
        prior_share: ε, how many of the K come from the prior, in [0, 1).
        least_effective: effective share of the K draws at which β stops, in (0, 1); 0 leaves β at 1.
        levels: terms of the chain drawn per resampled latent; all if None.

    Raises:
        InputError: a number is out of range.

    Sources: Bornschein and Bengio, 2015; Hesterberg, 1995; Jasra et al., 2011.

    Example:
        >>> Reweighted(samples=2048).prior_share
        0.1
    """

    samples: int = 1024
    resampled: int = 256
    prior_share: float = 0.1
    least_effective: float = 0.1
    levels: int | None = None

    def __post_init__(self) -> None:
        check_least(self, samples=2, resampled=1, levels=1)
        if not (0 <= self.prior_share < 1 and 0 <= self.least_effective < 1):
            given = f"prior_share={self.prior_share}, least_effective={self.least_effective}"
            raise InputError(f"{given}: both are shares from 0 to below 1; correct them")

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        conditional = model.posterior(batch.x)
        proposals = propose(model, conditional, batch.x, self.samples, self.prior_share)
        full = proposals.log_weight()
        exponent = self._exponent(proposals)
        chosen = resample(proposals.log_weight(exponent), self.resampled)
        loss = -conditional.log_bound(taken(proposals.z, chosen), self.levels).mean(0)
        terms = {
            "wake": loss,
            "log_evidence": full.logsumexp(0) - math.log(self.samples),
            "effective_share": effective_share(full),
            "exponent": exponent,
        }
        yield Update(("posterior",), loss, terms)

    def _exponent(self, proposals: Proposals) -> Tensor:
        """β (B,): the largest with enough effective draws, or else the one with most of them."""
        like = {"dtype": proposals.log_prior.dtype, "device": proposals.log_prior.device}
        every = torch.logspace(-4, 0, _EXPONENTS, **like) if self.least_effective else torch.ones(1, **like)
        every = every.view(-1, 1, 1)
        share = effective_share(proposals.log_weight(every).movedim(1, 0))  # (β, B)
        enough = share >= self.least_effective
        last = torch.where(enough, torch.arange(len(every), device=share.device)[:, None], -1).amax(0)
        return every.flatten()[torch.where(last < 0, share.argmax(0), last)]
