"""The diagonal Gaussian posterior of the variational autoencoder.

    q(z | x) = N( z; m(x), diag s(x)² )

Source: Kingma & Welling, Auto-Encoding Variational Bayes, 2014.
"""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from ddvi import gaussians
from ddvi.posteriors.base import VARIANCE_FLOOR, Conditional, Draw, Posterior


class GaussianHead(nn.Linear):
    """Features (*, features) to mean and variance (*, D) of a Gaussian; the variance is at least `VARIANCE_FLOOR`."""

    def __init__(self, features: int, latent_size: int) -> None:
        super().__init__(features, 2 * latent_size)

    def gaussian(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self(features).chunk(2, -1)
        return mean, log_variance.exp() + VARIANCE_FLOOR


@final
class GaussianConditional(Conditional):
    """N(mean, diag variance), both (*batch_shape, D)."""

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        self.mean = mean
        self.variance = variance

    def draw(self, sample_shape: tuple[int, ...] = ()) -> Draw:
        z = gaussians.sample(self.mean, self.variance, (*sample_shape, *self.mean.shape))
        return Draw(z, gaussians.log_prob(z, self.mean, self.variance), z[None])

    def log_ratio(self, path: Tensor) -> Tensor:
        return gaussians.log_prob(path[0], self.mean, self.variance)

    def reverse_path(self, z: Tensor) -> Tensor:
        return z[None]

    def log_bound(self, z: Tensor, levels: int | None = None) -> Tensor:
        return gaussians.log_prob(z, self.mean, self.variance)


@final
class GaussianPosterior(Posterior):
    """q(z | x) = N(m(x), diag s(x)²), see the module."""

    def __init__(self, encoder: nn.Module, latent_size: int, labels: int = 0) -> None:
        super().__init__(encoder, latent_size, labels)
        self.head = GaussianHead(self.features, latent_size)

    def condition(self, features: Tensor) -> GaussianConditional:
        return GaussianConditional(*self.head.gaussian(features))
