"""The diagonal Gaussian posterior of the variational autoencoder.

    q(z | x) = N( z; m(x), diag s(x)² )

Source: Kingma & Welling, Auto-Encoding Variational Bayes, 2014.
"""

from __future__ import annotations

import math
from typing import final

from torch import Tensor, nn

from ddvi.gaussians import DiagonalGaussian
from ddvi.networks import Linear
from ddvi.posteriors.base import LARGEST_LOG_VARIANCE, VARIANCE_FLOOR, ExplicitConditional, Posterior


class GaussianHead(Linear):
    """Features (*, features) to a diagonal Gaussian on R^D; its variance is at least `VARIANCE_FLOOR`."""

    def __init__(self, features: int, latent_size: int) -> None:
        super().__init__(features, 2 * latent_size)

    def gaussian(self, features: Tensor) -> DiagonalGaussian:
        mean, log_variance = self(features).chunk(2, -1)
        return DiagonalGaussian(mean, log_variance.clamp_max(LARGEST_LOG_VARIANCE).exp() + VARIANCE_FLOOR)


def begin_at(posterior: nn.Module, scale: float = 1.0) -> None:
    """Let every Gaussian that a posterior makes of features be N(0, scale² I) for all of them, until it learns."""
    for module in posterior.modules():
        if isinstance(module, GaussianHead):
            nn.init.zeros_(module.weight)
            mean, log_variance = module.bias.chunk(2)
            nn.init.zeros_(mean)
            nn.init.constant_(log_variance, 2 * math.log(scale))


@final
class GaussianPosterior(Posterior):
    """The diagonal Gaussian of the variational autoencoder.

        q(z | x) = N( z; m(x), diag s(x)² ),    s² at least 1e-6

    Args:
        encoder: from observations (B, *event) to features (B, encoder.out_features).
        latent_size: D.
        labels: number of classes for q(z | x, label); 0 without labels.

    Raises:
        InputError: D is not positive.

    Source: Kingma and Welling, Auto-Encoding Variational Bayes, 2014.

    Example:
        >>> posterior = GaussianPosterior(nn.Linear(6, 8), latent_size=2)
        >>> posterior(torch.ones(3, 6)).sample((10,)).shape
        torch.Size([10, 3, 2])
    """

    def __init__(self, encoder: nn.Module, latent_size: int, labels: int = 0) -> None:
        super().__init__(encoder, latent_size, labels)
        self.head: GaussianHead = GaussianHead(self.features, latent_size)

    def condition(self, features: Tensor) -> ExplicitConditional:
        return ExplicitConditional(self.head.gaussian(features))
