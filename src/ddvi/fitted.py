"""What has been learnt about the latents of given observations: draws, densities, bounds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ddvi.drawn import unchecked
from ddvi.errors import InputError, is_whole
from ddvi.model import LatentVariableModel
from ddvi.posteriors.base import ROWS_AT_ONCE, Conditional, portions
from ddvi.randomness import sample, seeded
from ddvi.supports import Bijection


class Estimate(NamedTuple):
    """A number by Monte Carlo, how exact it is, and from how many draws.

    Example:
        >>> Estimate(torch.tensor(-1.0), torch.tensor(0.1), 100).samples
        100
    """

    value: Tensor
    """In nats."""
    standard_error: Tensor
    """Of the value, of its shape; 0 where it is exact."""
    samples: int
    """K, the draws behind each number."""


@final
class FittedPosterior:
    """q(z | x) of a batch of B observations, as `Inference.posterior` gives it.

        log q(z | x) = log q(u | x) − log |det ∂z/∂u|,    z(u) the bijection onto the prior's support

    Latents are in the prior's own space: (*, B, *latent) where a draw of the prior is (*latent). Random numbers come
    from torch's global state; with `seed` from a state of their own, and the caller's stays as it is. Should training
    go on, this is the posterior as it is learnt by then.

    Args:
        model: the trained model, over latents u (B, D).
        bijection: from u to z.
        raw: observations (B, *event), as stored.

    Source: Burda et al., Importance Weighted Autoencoders, 2016, for the bounds.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> prior = Independent(Normal(torch.zeros(2), 1.0), 1)
        >>> inference = ddvi.Inference(prior, lambda z: Independent(Normal(z, 0.5), 1))
        >>> posterior = inference.fit(torch.randn(64, 2), epochs=1).posterior(torch.zeros(3, 2))
        >>> posterior.sample((10,)).shape, posterior.elbo().value.shape
        (torch.Size([10, 3, 2]), torch.Size([3]))
    """

    def __init__(self, model: LatentVariableModel, bijection: Bijection, raw: Tensor) -> None:
        self.model = model
        self.bijection = bijection
        self.count: int = len(raw)
        with torch.no_grad():
            self.x: Tensor = model.preprocessing(raw)

    @property
    def conditional(self) -> Conditional:
        """q(z, a | x) of the model as it is now, should it have learnt on."""
        return self.model.posterior(self.x)

    def sample(self, sample_shape: tuple[int, ...] = (), seed: int | None = None) -> Tensor:
        """Draws z ~ q(z | x): (*sample_shape, B, *latent)."""
        with self.drawing(seed):
            conditional, sizes = self.conditional, self.sizes(_count(sample_shape))
            draws = [self.bijection(conditional.sample((size,))) for size in sizes]
        return torch.cat(draws).unflatten(0, sample_shape) if sample_shape else draws[0][0]

    def predictive(self, sample_shape: tuple[int, ...] = (), seed: int | None = None) -> Tensor:
        """Draws of new observations, z ~ q(z | x), x' ~ p(x' | z): (*sample_shape, B, *event)."""
        with self.drawing(seed):
            conditional, sizes = self.conditional, self.sizes(_count(sample_shape))
            draws = [sample(self.model.likelihood(conditional.sample((size,)))) for size in sizes]
        return torch.cat(draws).unflatten(0, sample_shape) if sample_shape else draws[0][0]

    def mean(self, samples: int = 1000, seed: int | None = None) -> Tensor:
        """E_q[z | x] by `samples` draws: (B, *latent)."""
        if whole(samples) < 1:
            raise InputError(f"a mean needs at least 1 sample, not {samples}")
        return self.sample((samples,), seed).mean(0)

    def log_prob(self, z: Tensor, samples: int = 100, seed: int | None = None) -> Estimate:
        """log q(z | x), importance-sampled over the auxiliary variables of a chain, see `Conditional.log_prob`.

        Biased downwards, the less the more `samples`; exact, with standard error 0, for a posterior without a chain.

        Args:
            z: latents (*, B, *latent).
            samples: K, at least 2 where there is a chain.
            seed: of the draws.

        Raises:
            InputError: z has another shape, or lies outside of the prior's support or on its edge; there are too few
                samples; or the posterior has no density.
        """
        shape = (self.count, *self.bijection.event_shape)
        if not isinstance(z, Tensor):
            raise InputError(f"z is a {type(z).__name__}; give a tensor of latents (*, {', '.join(map(str, shape))})")
        if z.shape[-len(shape) :] != shape:
            raise InputError(f"z has shape {tuple(z.shape)}, but (*, {', '.join(map(str, shape))}) is needed")
        least = 2 if self.conditional.auxiliaries else 1
        if whole(samples) < least:
            raise InputError(f"log q with its standard error needs at least {least} samples, not {samples}")
        u = self.bijection.checked_inverse(z)
        batches = u.reshape(-1, self.count, self.bijection.size)
        with self.drawing(seed):
            parts = batches.split(max(1, ROWS_AT_ONCE // (samples * self.count)))
            conditional = self.conditional
            scored = [conditional.log_prob(part, samples) for part in parts]
        value, error = (torch.cat(values).reshape(u.shape[:-1]) for values in zip(*scored, strict=True))
        return Estimate(value - self.bijection.log_volume(u), error, samples)

    def elbo(self, samples: int = 100, seed: int | None = None) -> Estimate:
        """E_q[ log p(x, z) + log r(a | z) − log q(z, a | x) ] ≤ log p(x): (B,), the mean over K = `samples` draws.

        Raises:
            InputError: prior, likelihood or posterior has no density.
        """
        log_weights = self._log_weights(samples, seed)
        return Estimate(log_weights.mean(0), log_weights.std(0) / math.sqrt(samples), samples)

    def importance_weighted_bound(self, samples: int = 1000, seed: int | None = None) -> Estimate:
        """log 1/K Σ_k w_k ≤ log p(x) in expectation: (B,), with K = `samples` (Burda et al. 2016).

        The standard error is that of the delta method.

        Raises:
            InputError: as `elbo`.
        """
        log_weights = self._log_weights(samples, seed)
        value = log_weights.logsumexp(0) - math.log(samples)
        return Estimate(value, (log_weights - value).exp().std(0) / math.sqrt(samples), samples)

    def _log_weights(self, samples: int, seed: int | None) -> Tensor:
        """(K, B)."""
        if whole(samples) < 2:
            raise InputError(f"a bound with its standard error needs at least 2 samples, not {samples}")
        if not self.model.posterior.has_density:
            self.conditional.log_ratio(self.x)  # refuses, and says why
        with self.drawing(seed):
            conditional = self.conditional
            draws = [self.model.weigh(self.x, conditional.draw((size,))) for size in self.sizes(samples)]
            return torch.cat([weights.log_weight() for weights in draws])

    def sizes(self, samples: int) -> list[int]:
        """`samples` in portions that fit into memory."""
        return portions(samples, self.count)

    @contextlib.contextmanager
    def drawing(self, seed: int | None, what: str = "posterior") -> Iterator[None]:
        """A block that draws `what`: without gradients, and with a seed from random numbers of its own."""
        own = contextlib.nullcontext() if seed is None else seeded(seed, what)
        with torch.no_grad(), unchecked(), own:
            yield


def whole(samples: int) -> int:
    """A number of draws, if it is one."""
    if not is_whole(samples):
        raise InputError(f"samples={samples!r} is no whole number; give how many draws to take")
    return int(samples)


def _count(sample_shape: Any) -> int:
    """How many draws a shape is of."""
    if not isinstance(sample_shape, (tuple, list)):
        raise InputError(f"sample_shape={sample_shape!r} is no shape; give a tuple, such as (100,)")
    if not all(is_whole(n) and n >= 0 for n in sample_shape):
        raise InputError(f"sample_shape={sample_shape!r} is no shape; give whole numbers from 0 on, such as (100,)")
    return int(math.prod(sample_shape))
