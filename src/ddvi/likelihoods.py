"""Likelihoods p_θ(x | z): a decoder network and a distribution over observations.

The built-in ones are exponential families with independent entries,

    log p(x | z) = ⟨T(x), η(z)⟩ − A(η(z)) + h(x),

so that scoring N observations against M latents, which the exact evidence needs, is one matrix product.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, NegativeBinomial, Normal, Poisson
from torch.nn import functional

from ddvi.drawn import DrawnDistribution
from ddvi.errors import InputError

_PAIRED_ENTRIES = 2**24
"""How many entries of pairs (x, z) a distribution of a user's own is shown at once."""


class Likelihood(nn.Module, abc.ABC):
    """p_θ(x | z) over observations of shape `event_shape`.

    A subclass gives `forward`, `log_prob` and `pairwise_log_prob`. `likelihood(z)`, with z (*, D), is a torch
    distribution of batch shape (*) and event shape `event_shape`.

    Example:
        >>> likelihood = BernoulliLikelihood(nn.Linear(2, 6), torch.Size([6]))
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
        event_shape: shape of one observation.

    Example:
        >>> likelihood = PoissonLikelihood(nn.Linear(2, 6), torch.Size([6]))
        >>> parameters = likelihood.natural(torch.zeros(4, 2))
        >>> parameters.shape, likelihood.log_partition(parameters).shape
        (torch.Size([4, 6]), torch.Size([4]))
    """

    def __init__(self, decoder: nn.Module, event_shape: torch.Size) -> None:
        super().__init__()
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

    def moments(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ∂A/∂η and variance ∂²A/∂η² of T(x) at η (*, F): (*, F) each. `Guidance` alone needs them."""
        raise NotImplementedError

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        parameters = self.natural(z)
        statistics, log_base = self.statistics(x)
        fit = torch.einsum("bf,...bf->...b", statistics, parameters)
        return fit - self.log_partition(parameters) + log_base

    def pairwise_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        parameters = self.natural(z)
        statistics, log_base = self.statistics(x)
        return torch.addmm(log_base[:, None] - self.log_partition(parameters), statistics, parameters.T)

    def _independent(self, distribution: Distribution) -> Independent:
        return Independent(distribution, len(self.event_shape))


class _Bernoulli(Bernoulli):
    """Draws by comparing uniform numbers, which on a CPU takes a quarter of torch's own."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        probability = self.probs.expand(self._extended_shape(torch.Size(sample_shape)))
        return (torch.rand_like(probability) < probability).to(probability.dtype)


@final
class BernoulliLikelihood(ExponentialFamily):
    """Binary entries.

        log p(x | z) = Σ x η(z) − log(1 + e^η(z)),    η the logits

    Args:
        decoder: from z (*, D) to logits (*, *event).
        event_shape: shape of one observation.

    Example:
        >>> likelihood = BernoulliLikelihood(nn.Linear(2, 6), torch.Size([6]))
        >>> likelihood(torch.zeros(5, 2)).sample().unique().tolist()
        [0.0, 1.0]
    """

    def forward(self, z: Tensor) -> Distribution:
        return self._independent(_Bernoulli(logits=self.decoder(z), validate_args=False))

    def natural(self, z: Tensor) -> Tensor:
        return self.decoder(z).flatten(-len(self.event_shape))

    def log_partition(self, parameters: Tensor) -> Tensor:
        return functional.softplus(parameters).sum(-1)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x.new_zeros(())[None].expand(len(x))

    def moments(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        probability = parameters.sigmoid()
        return probability, probability * (1 - probability)


@final
class GaussianLikelihood(ExponentialFamily):
    """Real entries with a learned scale, shared by each entry of `scale`.

        p(x | z) = N( x; μ(z), diag σ² )

    Args:
        decoder: from z (*, D) to means μ (*, *event).
        event_shape: shape of one observation.
        scale: initial σ, broadcastable to the event: (features,) for tables, (channels, 1, 1) for images.

    Example:
        >>> likelihood = GaussianLikelihood(nn.Linear(2, 6), torch.Size([6]), torch.ones(6))
        >>> likelihood(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 6])
    """

    def __init__(self, decoder: nn.Module, event_shape: torch.Size, scale: Tensor) -> None:
        super().__init__(decoder, event_shape)
        self.log_scale: nn.Parameter = nn.Parameter(scale.log())

    def forward(self, z: Tensor) -> Distribution:
        return self._independent(Normal(self.decoder(z), self.log_scale.exp(), validate_args=False))

    def natural(self, z: Tensor) -> Tensor:
        return (self.decoder(z) * (-self.log_scale).exp()).flatten(-len(self.event_shape))

    def log_partition(self, parameters: Tensor) -> Tensor:
        return 0.5 * (parameters**2).sum(-1)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scaled = (x * (-self.log_scale).exp()).flatten(1)
        constant = self.log_scale.expand(self.event_shape).sum() + 0.5 * scaled.shape[1] * math.log(2 * math.pi)
        return scaled, -0.5 * (scaled**2).sum(-1) - constant

    def moments(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return parameters, torch.ones_like(parameters)


@final
class PoissonLikelihood(ExponentialFamily):
    """Counts.

        log p(x | z) = Σ x η(z) − e^η(z) − log x!,    η the log rates, kept below 20 so that a wild one stays finite

    Args:
        decoder: from z (*, D) to log rates (*, *event).
        event_shape: shape of one observation.

    Example:
        >>> PoissonLikelihood(nn.Linear(2, 6), torch.Size([6]))(torch.zeros(5, 2)).mean.shape
        torch.Size([5, 6])
    """

    def _log_rate(self, z: Tensor) -> Tensor:
        return self.decoder(z).clamp_max(20.0)

    def forward(self, z: Tensor) -> Distribution:
        return self._independent(Poisson(self._log_rate(z).exp(), validate_args=False))

    def natural(self, z: Tensor) -> Tensor:
        return self._log_rate(z).flatten(-len(self.event_shape))

    def log_partition(self, parameters: Tensor) -> Tensor:
        return parameters.exp().sum(-1)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        counts = x.flatten(1)
        return counts, -torch.lgamma(counts + 1).sum(-1)

    def moments(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        rate = parameters.exp()
        return rate, rate


@final
class NegativeBinomialLikelihood(ExponentialFamily):
    """Counts that vary more than Poisson counts do; the decoder gives log means, kept below e^20.

        p(x | z) = Γ(x + r)/(Γ(r) x!) · (μ/(μ + r))^x (r/(μ + r))^r,    mean μ(z), variance μ + μ²/r

    With r held fixed an exponential family; r > 0 is learned, one of each entry, and tends to the Poisson at r → ∞.

    Args:
        decoder: from z (*, D) to log μ, (*, *event).
        event_shape: shape of one observation.
        dispersion: r to begin with.

    Source: Robinson and Smyth, 2007, for counts of genes.

    Example:
        >>> likelihood = NegativeBinomialLikelihood(nn.Linear(2, 3), torch.Size([3]))
        >>> likelihood(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 3])
    """

    def __init__(self, decoder: nn.Module, event_shape: torch.Size, dispersion: float = 10.0) -> None:
        super().__init__(decoder, event_shape)
        self.log_dispersion: nn.Parameter = nn.Parameter(torch.full(tuple(event_shape), math.log(dispersion)))

    def _logits(self, z: Tensor) -> Tensor:
        """log(μ/r), kept where a wild mean stays finite."""
        return self.decoder(z).clamp_max(20.0) - self.log_dispersion

    def forward(self, z: Tensor) -> Distribution:
        count = self.log_dispersion.exp()
        return self._independent(NegativeBinomial(count, logits=self._logits(z), validate_args=False))

    def natural(self, z: Tensor) -> Tensor:
        return functional.logsigmoid(self._logits(z)).flatten(-len(self.event_shape))

    def log_partition(self, parameters: Tensor) -> Tensor:
        return -((-torch.expm1(parameters)).log() @ self.log_dispersion.exp().flatten())

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        counts, dispersion = x.flatten(1), self.log_dispersion.exp().flatten()
        log_base = torch.lgamma(counts + dispersion) - torch.lgamma(dispersion) - torch.lgamma(counts + 1)
        return counts, log_base.sum(-1)

    def moments(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        odds = parameters.exp() / -torch.expm1(parameters)
        mean = self.log_dispersion.exp().flatten() * odds
        return mean, mean * (1 + odds)


@final
class CategoricalLikelihood(ExponentialFamily):
    """Entries with values 0 … categories − 1.

        log p(x | z) = Σ_entries log softmax(η(z))_x

    Args:
        decoder: from z (*, D) to logits η (*, *event, categories).
        event_shape: shape of one observation.
        categories: how many.

    Example:
        >>> decoder = nn.Sequential(nn.Linear(2, 6 * 4), nn.Unflatten(-1, (6, 4)))
        >>> CategoricalLikelihood(decoder, torch.Size([6]), 4)(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 6])
    """

    def __init__(self, decoder: nn.Module, event_shape: torch.Size, categories: int) -> None:
        super().__init__(decoder, event_shape)
        self.categories = categories

    def forward(self, z: Tensor) -> Distribution:
        return self._independent(Categorical(logits=self.decoder(z), validate_args=False))

    def natural(self, z: Tensor) -> Tensor:
        return functional.log_softmax(self.decoder(z), -1).flatten(-len(self.event_shape) - 1)

    def log_partition(self, parameters: Tensor) -> Tensor:
        return parameters.new_zeros(()).expand(parameters.shape[:-1])

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hot = functional.one_hot(x.long(), self.categories).flatten(1)
        dtype = next(self.parameters()).dtype
        return hot.to(dtype), torch.zeros(len(x), dtype=dtype, device=x.device)

    def moments(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        # Of log softmax the Jacobian keeps to the simplex: with it, this is Fisher's information and its gradient.
        probability = parameters.exp()
        return probability, probability


@final
class DistributionLikelihood(Likelihood):
    """A user's own likelihood: any module or function from z (*, D) to a torch distribution over x.

    Args:
        build: z (*, D) to a distribution of batch shape (*) and event shape `event_shape`.
        event_shape: shape of one observation.

    Raises:
        InputError: when it is called, the distribution's shapes differ from these.

    Example:
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
        if distribution.event_shape != self.event_shape or distribution.batch_shape != z.shape[:-1]:
            raise InputError(
                f"the likelihood gave batch shape {tuple(distribution.batch_shape)} and event shape"
                f" {tuple(distribution.event_shape)} for z of shape {tuple(z.shape)}, but batch shape"
                f" {tuple(z.shape[:-1])} and event shape {tuple(self.event_shape)} are needed; wrap it in"
                " torch.distributions.Independent"
            )
        return distribution

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return self(z).log_prob(x)

    def pairwise_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        at_once = max(1, _PAIRED_ENTRIES // max(1, x.numel()))
        return torch.cat([self(part).log_prob(x[:, None]) for part in z.split(at_once)], 1)


def means(likelihood: Likelihood, z: Tensor) -> Tensor:
    """E[x|z] for z (N, D), (N, *event); for categories the mean of their numbers."""
    distribution = likelihood(z)
    base = distribution.base_dist if isinstance(distribution, Independent) else distribution
    if isinstance(base, Categorical):
        numbers = torch.arange(base.probs.shape[-1], device=z.device, dtype=z.dtype)
        return (base.probs * numbers).sum(-1)
    return distribution.mean


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
