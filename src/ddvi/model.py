"""The latent-variable model: everything with parameters, as named children, and the one bound of the whole family.

    p_θ(x, z) = p(z) p_θ(x | z),    q_φ(z, a | x),    r(a | z)

    log w = log p_θ(x | z) + log p(z) + log r(a | z) − log q_φ(z, a | x),    (z, a) ~ q

Its mean is the evidence lower bound; log-mean-exp over K draws is the importance-weighted bound (Burda et al. 2016).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddvi.likelihoods import Likelihood
from ddvi.posteriors.base import Draw, Posterior
from ddvi.preprocessing import AsIs, Preprocessing
from ddvi.priors import Prior


class Weights(NamedTuple):
    """The parts of log w, each (*sample_shape, *batch_shape), in nats."""

    log_likelihood: Tensor
    """log p_θ(x | z)."""
    log_prior: Tensor
    """log p(z)."""
    log_ratio: Tensor
    """log q_φ(z, a | x) − log r(a | z)."""

    def log_weight(self, kl_weight: float = 1.0) -> Tensor:
        """log p_θ(x | z) + kl_weight · (log p(z) − log_ratio); a bound's bracket at weight 1."""
        return self.log_likelihood + kl_weight * (self.log_prior - self.log_ratio)


class LatentVariableModel(nn.Module):
    """A prior, a likelihood and an approximate posterior.

    Args:
        prior: p(z).
        likelihood: p_θ(x | z).
        posterior: q_φ(z, a | x).
        preprocessing: from data as stored to x; by default x is the data.
        discriminator: from z (*, D) to one logit (*,), for adversarial training.
    """

    def __init__(
        self,
        prior: Prior,
        likelihood: Likelihood,
        posterior: Posterior,
        preprocessing: Preprocessing | None = None,
        discriminator: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood
        self.posterior = posterior
        self.preprocessing = preprocessing or AsIs()
        self.discriminator = discriminator

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by the name of the child that holds them; children without any are left out."""
        groups = {name: [p for p in child.parameters() if p.requires_grad] for name, child in self.named_children()}
        return {name: parameters for name, parameters in groups.items() if parameters}

    def weigh(self, x: Tensor, draw: Draw) -> Weights:
        """The parts of log w for draws of the posterior given x (B, *event)."""
        return Weights(self.likelihood.log_prob(x, draw.z), self.prior.log_prob(draw.z), draw.log_ratio)

    def log_weights(self, x: Tensor, samples: int) -> Tensor:
        """log w of `samples` draws for each of x (B, *event): (samples, B). Their mean is the ELBO."""
        return self.weigh(x, self.posterior(x).draw((samples,))).log_weight()

    def importance_weighted_bound(self, x: Tensor, samples: int) -> Tensor:
        """log 1/K Σ_k w_k ≤ log p_θ(x) in expectation, (B,), in nats."""
        return self.log_weights(x, samples).logsumexp(0) - math.log(samples)

    @torch.no_grad()
    def fantasise(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """z ~ p(z) (count, D) and x ~ p_θ(x | z) (count, *event), without gradient."""
        z = self.prior.sample((count,), generator=generator)
        return z, self.likelihood(z).sample().to(z.dtype)  # categories are drawn as integers
