"""A user's own likelihood: from whatever says p(x | z) to a `Likelihood`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ddvi.drawn import DrawnDistribution
from ddvi.errors import InputError
from ddvi.likelihoods.base import ExponentialFamily, Likelihood, MovedFamily

_PAIRED_ENTRIES = 2**24
"""How many entries of pairs (x, z) a distribution of a user's own is shown at once."""


@final
class DistributionLikelihood(Likelihood):
    """A user's own likelihood: any module or function from z (*, D) to a torch distribution over x.

    Args:
        build: z (*, D) to a distribution of batch shape (*) and event shape `event_shape`.
        event_shape: shape of one observation.

    Raises:
        InputError: when it is called, the distribution's shapes differ from these.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> likelihood = DistributionLikelihood(lambda z: Independent(Normal(z, 0.5), 1), torch.Size([2]))
        >>> likelihood.log_prob(torch.zeros(3, 2), torch.zeros(10, 3, 2)).shape
        torch.Size([10, 3])
    """

    def __init__(self, build: nn.Module | Callable[[Tensor], Distribution], event_shape: torch.Size) -> None:
        super().__init__()
        self.build = build
        self.event_shape: torch.Size = torch.Size(event_shape)

    def forward(self, z: Tensor) -> Distribution:
        distribution = self.build(z)
        if not isinstance(distribution, Distribution):
            given = "nothing" if distribution is None else f"a {type(distribution).__name__}"
            raise InputError(f"the likelihood returns {given}; let it return a torch distribution over x")
        batch, event = distribution.batch_shape, distribution.event_shape
        if event != self.event_shape or batch != z.shape[:-1]:
            if batch + event == z.shape[:-1] + self.event_shape:
                advice = "wrap it in torch.distributions.Independent"
            elif event == self.event_shape:
                advice = "let it take any number of axes before the last, as by z[..., 0]"
            else:
                advice = "give x of its event shape, or a likelihood of that of x"
            raise InputError(
                f"the likelihood gave batch shape {tuple(batch)} and event shape {tuple(event)} for z of shape"
                f" {tuple(z.shape)}, but batch shape {tuple(z.shape[:-1])} and event shape {tuple(self.event_shape)}"
                f" are needed; {advice}"
            )
        return distribution

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return self(z).log_prob(x)

    def pairwise_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        at_once = max(1, _PAIRED_ENTRIES // max(1, x.numel()))
        return torch.cat([self(part).log_prob(x[:, None]) for part in z.split(at_once)], 1)


def as_likelihood(source: Any, event_shape: torch.Size, latents: nn.Module | None = None) -> Likelihood:
    """A user's own likelihood p(x | z).

    Args:
        source: a `Likelihood`; a module or function from latents (*, *latent) to a torch distribution of batch shape
            (*) or, for a simulator without a density, to draws x (*, *event); or an object with `log_prob(x, z)` (*)
            and `sample(z)` (*, *event).
        event_shape: shape of one observation.
        latents: from what the model calls z (*, D) to what `source` takes; by default the same.

    Raises:
        InputError: `source` is none of these, or a `Likelihood` over observations of another shape.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> likelihood = as_likelihood(lambda z: Independent(Normal(z, 1.0), 1), torch.Size([2]))
        >>> likelihood.log_prob(torch.zeros(4, 2), torch.zeros(7, 4, 2)).shape
        torch.Size([7, 4])
    """
    event_shape = torch.Size(event_shape)
    if isinstance(source, Likelihood):
        if source.event_shape != event_shape:
            given = f"the likelihood is over observations of shape {tuple(source.event_shape)}"
            raise InputError(f"{given}, but x has examples of shape {tuple(event_shape)}; make them one")
        if latents is None:
            return source
        if isinstance(source, ExponentialFamily):
            return MovedFamily(source, latents)
    if not callable(source) and not is_scored_object(source):
        raise InputError(
            f"{type(source).__name__} is no likelihood; give a function from z to a torch distribution, or an object"
            " with log_prob(x, z) and sample(z)"
        )
    return DistributionLikelihood(_Built(source, event_shape, latents), event_shape)


def is_scored_object(source: Any) -> bool:
    """Whether this is an object with `log_prob(x, z)` and `sample(z)`, rather than a function from z."""
    methods = (getattr(source, name, None) for name in ("log_prob", "sample"))
    return not isinstance(source, (Likelihood, type)) and all(map(callable, methods))


class _Built(nn.Module):
    """z (*, D) to the distribution that a user's likelihood makes of it."""

    def __init__(self, source: Any, event_shape: torch.Size, latents: nn.Module | None) -> None:
        super().__init__()
        self.source = source
        self.event_shape = event_shape
        self.latents = latents
        self.scored = is_scored_object(source)

    def forward(self, z: Tensor) -> Any:
        given, batch_shape = z if self.latents is None else self.latents(z), z.shape[:-1]
        if self.scored:
            return DrawnDistribution(
                batch_shape,
                self.event_shape,
                lambda: self.source.sample(given),
                lambda x: self.source.log_prob(x, given),
            )
        distribution = self.source(given)
        if not isinstance(distribution, Tensor):
            return distribution
        first = [distribution]
        return DrawnDistribution(batch_shape, self.event_shape, lambda: first.pop() if first else self.source(given))
