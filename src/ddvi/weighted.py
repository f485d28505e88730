"""What has been learnt about a fixed target: draws with weights, the normaliser, densities.

    Z ≈ 1/K Σ_k w_k,    w = γ(z) r(a | z) / q(z, a),    (z, a) ~ q

Sources: Owen, Monte Carlo Theory, Methods and Examples, chapter 9, for importance sampling; Kong, 1992, for the
effective sample size.
"""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

from ddvi.errors import InputError
from ddvi.fitted import Estimate, FittedPosterior, whole
from ddvi.model import LatentVariableModel
from ddvi.objectives.reweighted import effective_share, propose
from ddvi.randomness import resample, seeded
from ddvi.supports import Bijection


class WeightedDraws(NamedTuple):
    """K draws of what approximates a target, with their weights.

    Source: Owen, chapter 9.

    Example:
        >>> draws = WeightedDraws(torch.zeros(4, 2), torch.tensor([0.0, 0.0, 0.0, -torch.inf]))
        >>> round(draws.effective_samples, 3), draws.log_evidence.samples
        (3.0, 4)
    """

    z: Tensor
    """(K, *latent)."""
    log_weight: Tensor
    """log γ(z) + log r(a | z) − log q(z, a), (K,), in nats."""

    @property
    def log_evidence(self) -> Estimate:
        """log Z ≈ log 1/K Σ_k w_k: unbiased for Z, so low for log Z; the standard error is that of the delta method."""
        samples = len(self.log_weight)
        value = self.log_weight.logsumexp(0) - math.log(samples)
        return Estimate(value, (self.log_weight - value).exp().std() / math.sqrt(samples), samples)

    @property
    def effective_samples(self) -> float:
        """(Σ w)² / Σ w², how many draws of the target these are worth: 1 to K."""
        return float(effective_share(self.log_weight)) * len(self.log_weight)

    def resample(self, count: int, seed: int = 0) -> Tensor:
        """`count` of the draws, in proportion to weight, by systematic resampling: (count, *latent)."""
        with seeded(seed, "resample"):
            return self.z[resample(self.log_weight[:, None], count)[:, 0]]


@final
class FittedTarget:
    """What has been learnt about a target, as `Target.posterior` gives it.

    Random numbers come from torch's global state; with `seed` from a state of their own, and the caller's stays as it
    is.

    Args:
        model: the trained model, over u (B, D).
        bijection: from u to z.

    Source: that of the module.

    Example:
        >>> target = ddvi.Target(lambda z: -z.square().sum(-1), 2, steps=2).fit(steps=20)
        >>> target.posterior().sample((5,)).shape
        torch.Size([5, 2])
    """

    def __init__(self, model: LatentVariableModel, bijection: Bijection) -> None:
        self.model = model
        self.bijection = bijection
        self._alone = FittedPosterior(model, bijection, bijection.location.new_zeros(1, 1))
        self._axis = -1 - len(bijection.event_shape)

    def sample(self, sample_shape: tuple[int, ...] = (), seed: int | None = None) -> Tensor:
        """Draws z ~ q: (*sample_shape, *latent)."""
        return self._alone.sample(sample_shape, seed).squeeze(self._axis)

    def log_prob(self, z: Tensor, samples: int = 100, seed: int | None = None) -> Estimate:
        """log q(z) of z (*, *latent), importance-sampled over the chain: see `FittedPosterior.log_prob`.

        Raises:
            InputError: z has another shape or lies outside of the support.
        """
        shape = self.bijection.event_shape
        if z.shape[z.dim() - len(shape) :] != shape:
            raise InputError(f"z has shape {tuple(z.shape)}, but (*, {', '.join(map(str, shape))}) is needed")
        value, error, samples = self._alone.log_prob(z.unsqueeze(self._axis), samples, seed)
        return Estimate(value.squeeze(-1), error.squeeze(-1), samples)

    def elbo(self, samples: int = 10_000, seed: int | None = None) -> Estimate:
        """E_q[ log γ(z) + log r(a | z) − log q(z, a) ] ≤ log Z, the mean over K = `samples` draws."""
        value, error, samples = self._alone.elbo(samples, seed)
        return Estimate(value[0], error[0], samples)

    def log_evidence(self, samples: int = 10_000, seed: int | None = None) -> Estimate:
        """log Z and its standard error, by importance sampling with K = `samples` draws; see `weighted`."""
        return self.weighted(samples, seed).log_evidence

    def weighted(self, samples: int = 10_000, seed: int | None = None, base_share: float = 0.0) -> WeightedDraws:
        """K = `samples` draws with their weights.

        Args:
            samples: K, at least 2.
            seed: of the draws.
            base_share: how many of them come from the base, in [0, 1), and are weighted as draws of the mixture: so
                that no part of the target is without draws, where there are few dimensions.

        Raises:
            InputError: an argument is out of range.
        """
        if whole(samples) < 2:
            raise InputError(f"weights need at least 2 samples, not {samples}")
        if not 0 <= base_share < 1:
            raise InputError(f"base_share={base_share} is no share; give 0 or more, and less than 1")
        x = self._alone.x
        with self._alone.drawing(seed, "weighted"):
            one = self._alone.conditional
            parts = [propose(self.model, one, x, count, base_share) for count in self._alone.sizes(samples)]
        z = torch.cat([self.bijection(part.z[:, 0]) for part in parts])
        return WeightedDraws(z, torch.cat([part.log_weight()[:, 0] for part in parts]))
