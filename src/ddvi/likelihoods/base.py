"""Likelihoods p_θ(x | z): a decoder network and a distribution over observations.

The built-in ones are exponential families with independent entries,

    log p(x | z) = ⟨T(x), η(z)⟩ − A(η(z)) + h(x),

so that scoring N observations against M latents, which the exact evidence needs, is one matrix product.
"""

from __future__ import annotations

import abc
from typing import Self, final

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent
from torch.distributions.constraints import Constraint

from ddvi.errors import InputError


class Likelihood(nn.Module, abc.ABC):
    """p_θ(x | z) over observations of shape `event_shape`.

    A subclass gives `forward`, `log_prob` and `pairwise_log_prob`. `likelihood(z)`, with z (*, D), is a torch
    distribution of batch shape (*) and event shape `event_shape`.

    Example:
        >>> likelihood = ddvi.BernoulliLikelihood(nn.Linear(2, 6), torch.Size([6]))
        >>> x, z = torch.ones(3, 6), torch.zeros(10, 3, 2)
        >>> likelihood.log_prob(x, z).shape, likelihood.pairwise_log_prob(x, z[:, 0]).shape
        (torch.Size([10, 3]), torch.Size([3, 10]))
    """

    event_shape: torch.Size

    @abc.abstractmethod
    def forward(self, z: Tensor) -> Distribution:
        """The distribution of x given z (*, D): batch shape (*), event shape `event_shape`."""

    @abc.abstractmethod
    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) in nats; x (B, *event), z (*, B, D): shape (*, B)."""

    @abc.abstractmethod
    def pairwise_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x_n | z_m) in nats; x (N, *event), z (M, D): shape (N, M)."""


class ExponentialFamily(Likelihood):
    """An exponential family with independent entries; subclasses say what T, η, A and h are.

        log p(x | z) = ⟨T(x), η(z)⟩ − A(η(z)) + h(x)

    Args:
        decoder: from z (*, D) to one parameter per entry, (*, *event) (for categories: (*, *event, categories)).
        event_shape: shape of one observation, of one axis at least.

    Raises:
        InputError: it has none.

    Example:
        >>> likelihood = ddvi.PoissonLikelihood(nn.Linear(2, 6), torch.Size([6]))
        >>> parameters = likelihood.natural(torch.zeros(4, 2))
        >>> parameters.shape, likelihood.log_partition(parameters).shape
        (torch.Size([4, 6]), torch.Size([4]))
    """

    support: Constraint | None = None
    """Of an entry of x, where the family says it; in words, `entries`."""
    entries: str = ""

    def __init__(self, decoder: nn.Module, event_shape: torch.Size) -> None:
        super().__init__()
        if not len(event_shape):
            raise InputError(f"{type(self).__name__} takes no single numbers; give observations of one axis, (N, 1)")
        self.decoder = decoder
        self.event_shape: torch.Size = torch.Size(event_shape)

    @abc.abstractmethod
    def natural(self, z: Tensor) -> Tensor:
        """η(z) of z (*, D), flattened, (*, F)."""

    @abc.abstractmethod
    def log_partition(self, parameters: Tensor) -> Tensor:
        """A(η) of η (*, F): (*)."""

    @abc.abstractmethod
    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """T(x) flattened, (N, F), and h(x), (N,)."""

    def check(self, x: Tensor, name: str = "x") -> None:
        """Refuse x (N, *event) that the family doesn't speak of; `name` is its name in the message.

        Raises:
            InputError: an entry lies outside of `support`.
        """
        refused = x[~self.support.check(x)] if self.support else x[:0]
        if refused.numel():
            held = f"{name} holds {refused.flatten()[0].item():g}"
            raise InputError(f"{held}, but {type(self).__name__} is of {self.entries}; correct it")

    def moments(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ∂A/∂η and variance ∂²A/∂η² of T(x) at η (*, F): (*, F) each. What looks for peaks needs them."""
        raise NotImplementedError

    @property
    def has_moments(self) -> bool:
        """Whether the family says them."""
        return type(self).moments is not ExponentialFamily.moments

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        parameters = self.natural(z)
        statistics, log_base = self.statistics(x)
        # A product of matrices for each example would be slow, above all its gradient: there are few draws of each.
        fit = (statistics * parameters).sum(-1)
        return fit - self.log_partition(parameters) + log_base

    def pairwise_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        parameters = self.natural(z)
        statistics, log_base = self.statistics(x)
        return torch.addmm(log_base[:, None] - self.log_partition(parameters), statistics, parameters.T)

    def _independent(self, distribution: Distribution) -> Independent:
        return Independent(distribution, len(self.event_shape))


@final
class MovedFamily(ExponentialFamily):
    """An exponential family of latents that are a function of z, such as constrained ones.

        log p(x | z) = ⟨T(x), η(y(z))⟩ − A(η(y(z))) + h(x)

    Args:
        family: of y (*, *latent).
        latents: y of z (*, D).
    """

    def __init__(self, family: ExponentialFamily, latents: nn.Module) -> None:
        super().__init__(latents, family.event_shape)
        self.family = family
        self.support: Constraint | None = family.support
        self.entries: str = family.entries

    def forward(self, z: Tensor) -> Distribution:
        return self.family(self.decoder(z))

    def natural(self, z: Tensor) -> Tensor:
        return self.family.natural(self.decoder(z))

    def log_partition(self, parameters: Tensor) -> Tensor:
        return self.family.log_partition(parameters)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.family.statistics(x)

    def check(self, x: Tensor, name: str = "x") -> None:
        self.family.check(x, name)

    def moments(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.family.moments(parameters)

    @property
    def has_moments(self) -> bool:
        return self.family.has_moments

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return self.family.log_prob(x, self.decoder(z))

    def pairwise_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return self.family.pairwise_log_prob(x, self.decoder(z))


@final
class FixedLikelihood(Likelihood):
    """A likelihood that training leaves as it is: it stays in evaluation mode."""

    def __init__(self, likelihood: Likelihood) -> None:
        super().__init__()
        self.event_shape: torch.Size = likelihood.event_shape
        self.likelihood: Likelihood = likelihood.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def forward(self, z: Tensor) -> Distribution:
        return self.likelihood(z)

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return self.likelihood.log_prob(x, z)

    def pairwise_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return self.likelihood.pairwise_log_prob(x, z)


def means(likelihood: Likelihood, z: Tensor) -> Tensor:
    """E[x|z] for z (N, D), (N, *event); for categories the mean of their numbers."""
    distribution = likelihood(z)
    base = distribution.base_dist if isinstance(distribution, Independent) else distribution
    if isinstance(base, Categorical):
        numbers = torch.arange(base.probs.shape[-1], device=z.device, dtype=z.dtype)
        return (base.probs * numbers).sum(-1)
    return distribution.mean
