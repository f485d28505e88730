"""The built-in exponential families: what T, η, A and h of each are."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, NegativeBinomial, Normal, Poisson, constraints
from torch.distributions.constraints import Constraint
from torch.nn import functional

from ddvi.likelihoods.base import ExponentialFamily

_COUNTS = "whole numbers from 0 on"


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

    support: Constraint | None = constraints.boolean
    entries: str = "zeros and ones"

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

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        # By ⟨T, η⟩ − A + h, as in the other families, squares of x/σ would cancel, and with them digits.
        residual = x.to(self.log_scale) - self.decoder(z)
        rows = residual.flatten(0, -len(self.event_shape) - 1)
        return self.statistics(rows)[1].view(residual.shape[: -len(self.event_shape)])

    def pairwise_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        # One product of matrices again, around the centre of x, so that less cancels.
        x = x.to(self.log_scale)
        centre = x.detach().mean(0)
        scaled, log_base = self.statistics(x - centre)
        parameters = ((self.decoder(z) - centre) * (-self.log_scale).exp()).flatten(1)
        return torch.addmm(log_base[:, None] - self.log_partition(parameters), scaled, parameters.T)

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

    support: Constraint | None = constraints.nonnegative_integer
    entries: str = _COUNTS

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

    support: Constraint | None = constraints.nonnegative_integer
    entries: str = _COUNTS

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
        # For a large r the first two are alike to many digits.
        exact = torch.float32 if counts.device.type == "mps" else torch.float64
        rising = torch.lgamma(counts.to(exact) + dispersion.to(exact)) - torch.lgamma(dispersion.to(exact))
        return counts, (rising.to(dispersion.dtype) - torch.lgamma(counts + 1)).sum(-1)

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
        self.support: Constraint | None = constraints.integer_interval(0, categories - 1)
        self.entries: str = f"whole numbers from 0 to {categories - 1}"

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
