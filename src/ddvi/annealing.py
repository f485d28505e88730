"""Draws of a posterior without a posterior: particles along a tempered path from the prior.

    p_β(z) ∝ p(z) p(x | z)^β,    0 = β_0 < β_1 < … < β_n = 1

N particles start as draws of the prior. From one β to the next they are weighted by p(x | z)^(β' − β) and resampled,
with β' as large as leaves them worth nine tenths of their number, and then moved by Metropolis-adjusted Langevin steps,
which leave p_β' as it is. Each particle's step size is its own, drawn from two decades below a largest one that follows
the rate of acceptance, since narrow parts of a distribution want small steps where wide ones want large. The product of
the mean weights estimates p(x).

Sources: Del Moral, Doucet and Jasra, Sequential Monte Carlo Samplers, 2006; Jasra et al., 2011, for β by effective
sample size; Roberts and Tweedie, 1996, for the moves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddvi.errors import InputError
from ddvi.model import LatentVariableModel
from ddvi.objectives.reweighted import effective_share
from ddvi.randomness import resample

_KEPT = 0.9  # effective share from one β to the next
_HALVINGS = 30
_ACCEPTED = 0.6
_DECADES = 2.0


class Particles(NamedTuple):
    """What has been moved along the path.

    Source: that of the module.

    Example:
        >>> Particles(torch.zeros(10, 2), -1.5, 3).z.shape
        torch.Size([10, 2])
    """

    z: Tensor
    """(N, D), about draws of p(z | x)."""
    log_evidence: float
    """An estimate of log p(x), without a standard error."""
    stages: int
    """How many values β took."""


@torch.no_grad()
def anneal(model: LatentVariableModel, x: Tensor, count: int, moves: int = 10) -> Particles:
    """Particles for one observation; random numbers come from torch's global state.

    Args:
        model: its prior and likelihood, the latter differentiable in z, are all that is used.
        x: (1, *event).
        count: N, at least 2.
        moves: Langevin steps at each β.

    Raises:
        InputError: an argument is out of range, or the likelihood is 0 at all draws of the prior.
    """
    if count < 2 or moves < 0:
        raise InputError(f"count={count} must be 2 or more, and moves={moves} 0 or more; correct them")
    z = model.prior.sample((count,))
    log_likelihood = model.likelihood.log_prob(x, z.unsqueeze(-2))[:, 0]
    exponent, log_evidence, stages, log_step = 0.0, 0.0, 0, math.log(0.5)
    while exponent < 1:
        if not bool((log_likelihood > -torch.inf).any()):
            raise InputError("the density is 0 at all particles; give a prior, or a base, that reaches it")
        rise = _rise(log_likelihood, 1 - exponent)
        exponent, stages = min(1.0, exponent + rise) if rise < 1 - exponent else 1.0, stages + 1
        log_evidence += float((rise * log_likelihood).logsumexp(0)) - math.log(count)
        z = z[resample((rise * log_likelihood)[:, None], count)[:, 0]]
        for _ in range(moves):
            z, rate = _move(model, x, z, exponent, log_step)
            log_step = min(log_step + 0.5 * (rate - _ACCEPTED), math.log(2.0))
        log_likelihood = model.likelihood.log_prob(x, z.unsqueeze(-2))[:, 0]
    return Particles(z, log_evidence, stages)


def _rise(log_likelihood: Tensor, most: float) -> float:
    """By how much β can rise, at most so much, by halving an interval."""
    if float(effective_share(most * log_likelihood)) >= _KEPT:
        return most
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough = float(effective_share(middle * log_likelihood)) >= _KEPT
        low, high = (middle, high) if enough else (low, middle)
    return max(low, most * 2.0**-_HALVINGS)


def _move(model: LatentVariableModel, x: Tensor, z: Tensor, exponent: float, log_step: float) -> tuple[Tensor, float]:
    """One Langevin step of z (N, D), with acceptance; and the mean rate of acceptance."""
    step = (log_step - _DECADES * math.log(10) * torch.rand_like(z[:, :1])).exp()
    here, slope = _tempered(model, x, z, exponent)
    noise = torch.randn_like(z)
    proposal = z + 0.5 * step**2 * slope + step * noise
    there, slope_there = _tempered(model, x, proposal, exponent)
    back = (z - proposal - 0.5 * step**2 * slope_there) / step
    log_ratio = there - here + 0.5 * (noise.square() - back.square()).sum(-1)
    chance = log_ratio.nan_to_num(-torch.inf, torch.inf).clamp(max=0).exp()
    accepted = torch.rand_like(chance) < chance
    return torch.where(accepted[:, None], proposal, z), float(chance.mean())


def _tempered(model: LatentVariableModel, x: Tensor, z: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """log p(z) + β log p(x | z), (N,), and its gradient, (N, D)."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = model.prior.log_prob(z) + exponent * model.likelihood.log_prob(x, z.unsqueeze(-2))[:, 0]
        (slope,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), slope
