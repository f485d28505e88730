"""What several test files share: double precision, and a model whose every density is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from ddvi import evaluation, figures
from ddvi.likelihoods import GaussianLikelihood
from ddvi.model import LatentVariableModel
from ddvi.posteriors.base import Posterior
from ddvi.priors import make_prior
from ddvi.randomness import preserved


@pytest.fixture
def float64() -> Iterator[None]:
    """Double precision and a fixed seed for one test; the session's own are given back."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with preserved():
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(before)


def leave_out_pictures(patch: pytest.MonkeyPatch) -> None:
    """Of runs, whose pictures cost more than a short training."""
    patch.setattr(figures, "draw_all", lambda *_: None)


@contextmanager
def briefly() -> Iterator[None]:
    """Quick evaluations by still fewer draws and nodes, without pictures, where it isn't they that are tested."""
    fewer = {"iw_examples": 50, "stand_in_examples": 20, "gap_examples": 20, "gap_auxiliary_draws": 10}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "QUICK", replace(evaluation.QUICK, **fewer, nodes=1000, doublings=5))
        leave_out_pictures(patch)
        yield


@pytest.fixture
def brief() -> Iterator[None]:
    """One test, `briefly`."""
    with briefly():
        yield


@dataclass(frozen=True)
class LinearGaussian:
    """z ~ N(0, I), x = A z + b + σ ε: the posterior is N(M (x − b), Λ⁻¹), Λ = I + AᵀA/σ², M = Λ⁻¹Aᵀ/σ²."""

    decoder: Tensor
    """A, (features, D)."""
    offset: Tensor
    """b, (features,)."""
    scale: float
    """σ."""

    @property
    def precision(self) -> Tensor:
        return torch.eye(self.decoder.shape[1]) + self.decoder.T @ self.decoder / self.scale**2

    @property
    def covariance(self) -> Tensor:
        return self.precision.inverse()

    @property
    def gain(self) -> Tensor:
        """M, (D, features)."""
        return self.covariance @ self.decoder.T / self.scale**2

    @property
    def diagonal_gap(self) -> float:
        """KL( N(mean, diag 1/Λ_ii) ‖ posterior ), what the best diagonal Gaussian loses, in nats."""
        return 0.5 * float(self.precision.diagonal().log().sum() - self.precision.logdet())

    def posterior(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal((x - self.offset) @ self.gain.T, self.covariance)

    def evidence(self) -> MultivariateNormal:
        noise = self.scale**2 * torch.eye(len(self.offset))
        return MultivariateNormal(self.offset, self.decoder @ self.decoder.T + noise)

    def simulate(self, count: int) -> tuple[Tensor, Tensor]:
        """(z, x) from the model, (count, D) and (count, features)."""
        z = torch.randn(count, self.decoder.shape[1], dtype=self.decoder.dtype)
        return z, z @ self.decoder.T + self.offset + self.scale * torch.randn(count, len(self.offset), dtype=z.dtype)

    def encoder(self) -> nn.Module:
        """Features are x itself."""
        identity = nn.Identity()
        identity.out_features = len(self.offset)
        return identity

    def model(self, posterior: Posterior) -> LatentVariableModel:
        features, latent_size = self.decoder.shape
        decoder = nn.Linear(latent_size, features)
        set_linear(decoder, self.decoder, self.offset)
        likelihood = GaussianLikelihood(decoder, torch.Size([features]), torch.full((1,), self.scale))
        return LatentVariableModel(make_prior("gaussian", latent_size), likelihood, posterior)


def set_linear(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Give a linear layer its parameters."""
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


@pytest.fixture
def orthogonal(float64: None) -> LinearGaussian:
    """Orthogonal decoder columns: a diagonal posterior, of variances 1/1.8 and 1/5."""
    columns = torch.tensor([[0.6, 0.0], [0.0, 1.2], [0.8, 0.0], [0.0, -1.6]]) * torch.tensor([math.sqrt(0.2), 0.5])
    return LinearGaussian(columns, torch.tensor([0.5, -1.0, 0.0, 2.0]), 0.5)


@pytest.fixture
def correlated(float64: None) -> LinearGaussian:
    """A posterior of correlation −0.8: the best diagonal Gaussian loses 0.51 nat."""
    return LinearGaussian(torch.tensor([[1.0, 0.8], [0.3, 0.5], [0.5, 0.6]]), torch.tensor([0.5, -1.0, 0.0]), 0.4)
