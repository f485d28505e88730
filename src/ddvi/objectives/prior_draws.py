"""Draws of the prior that a batch shares: each is decoded once, and weighed for every example by a product of matrices.

    p_θ(x) ≈ 1/S Σ_s p_θ(x | z_s),    z_s ~ p(z)

In a model with labels the draws are shared out among them, and those of one label estimate p_θ(x, l).
"""

from __future__ import annotations

from math import ceil, log
from typing import NamedTuple

import torch
from torch import Tensor

from ddvi.model import LatentVariableModel
from ddvi.randomness import sharded


class PriorDraws(NamedTuple):
    """S latents, and what they say of B examples."""

    z: Tensor
    """(S, D), without gradient."""
    label: Tensor | None
    """(S,), or None in a model without labels."""
    every_log_weight: Tensor
    """log( p_θ(x | z_s) / S ), (S, B), whose sum over s estimates p_θ(x); of a prior that learns with its gradient."""
    parts: int
    """C, whose draws follow each other in turn; 0 in a model without labels."""

    @classmethod
    def of(cls, model: LatentVariableModel, x: Tensor, samples: int) -> PriorDraws:
        """S = `samples` of them, with labels the next multiple of their number, for x (B, *event)."""
        label, parts = None, 0
        if model.classifier is not None and model.prior.parts:
            parts = model.prior.parts
            samples = ceil(samples / parts) * parts
            label = torch.arange(samples, device=x.device) % parts
        with sharded(None):  # the same draws and, of a decoder with dropout, means in each of several processes
            with torch.no_grad():
                z = model.prior.sample((samples,), label=label)
            log_likelihood = model.likelihood.pairwise_log_prob(x, z)
            if any(parameter.requires_grad for parameter in model.prior.parameters()):
                log_prior = model.prior.log_prob(z, label)
                log_likelihood = log_likelihood + (log_prior - log_prior.detach())
        return cls(z, label, log_likelihood.T - log(samples), parts)

    def log_weight(self, label: Tensor | None = None) -> Tensor:
        """log( p_θ(x | z_s) / S ), (S, B); given labels (B,) that of other labels' draws is −∞."""
        if label is None or self.label is None:
            return self.every_log_weight
        return self.every_log_weight.masked_fill(self.label[:, None] != label, -torch.inf)

    def log_joint(self) -> Tensor:
        """The estimate of log p_θ(x, l), (C, B)."""
        assert self.parts
        return self.every_log_weight.unflatten(0, (-1, self.parts)).logsumexp(0)
