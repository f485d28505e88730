"""The neural spline flow posterior: autoregressive layers whose coordinates are monotonic rational-quadratic splines.

    u = f_x(ε),  ε ~ N(0, I),    z = m(x) + s(x) u,    log q(z | x) = log N(ε) − log |det ∂f_x/∂ε| − Σ log s(x)

The splines act on [−5, 5] and are the identity beyond, so they work in units of the Gaussian's mean and scale: a narrow
posterior has as many of their bins as a wide one. Drawing takes one pass a layer, scoring a given z takes D.

Source: Durkan et al., Neural Spline Flows, 2019. Splines: zuko.
"""

from __future__ import annotations

from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from ddvi.gaussians import DiagonalGaussian
from ddvi.posteriors.base import ExplicitConditional, Posterior
from ddvi.posteriors.flow import FlowDensity, autoregressive_layers
from ddvi.posteriors.gaussian import GaussianHead
from ddvi.posteriors.zuko_layers import MonotonicRQSTransform

_SMALLEST_SLOPE = 1e-3


@final
class ScaledDensity:
    """The density of m + s u, u ~ `standard`."""

    def __init__(self, gaussian: DiagonalGaussian, standard: FlowDensity) -> None:
        self.mean: Tensor = gaussian.mean
        self.scale: Tensor = gaussian.variance.sqrt()
        self.standard = standard

    def draw(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """z (*sample_shape, *batch_shape, D) and log q(z | x)."""
        u, log_prob = self.standard.draw(sample_shape)
        return torch.addcmul(self.mean, self.scale, u), log_prob - self.scale.log().sum(-1)

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z | x) of given z (*, *batch_shape, D)."""
        return self.standard.log_prob((z - self.mean) / self.scale) - self.scale.log().sum(-1)


@final
class SplinePosterior(Posterior):
    """A neural spline flow in units of a Gaussian N(m, s²), which it is at initialisation.

        u = f_x(ε),  ε ~ N(0, I),    z = m(x) + s(x) u,    log q(z | x) = log N(ε) − log |det ∂f_x/∂ε| − Σ log s(x)

    Args:
        encoder: from observations (B, *event) to features (B, encoder.out_features).
        latent_size: D.
        labels: number of classes for q(z | x, label); 0 without labels.
        flow_layers: number of layers.
        context_size: size of the projection of the features that conditions them.
        spline_bins: bins of each spline.
        hidden_features: widths of the hidden layers of each.

    Raises:
        InputError: D is not positive.

    Source: Durkan et al., Neural Spline Flows, 2019.

    Example:
        >>> posterior = SplinePosterior(nn.Linear(6, 8), latent_size=2, flow_layers=2)
        >>> posterior(torch.ones(3, 6)).draw((10,)).log_ratio.shape
        torch.Size([10, 3])
    """

    def __init__(
        self,
        encoder: nn.Module,
        latent_size: int,
        labels: int = 0,
        flow_layers: int = 4,
        context_size: int = 64,
        spline_bins: int = 8,
        hidden_features: tuple[int, ...] = (64, 64),
    ) -> None:
        super().__init__(encoder, latent_size, labels)
        self.context: nn.Linear = nn.Linear(self.features, context_size)
        self.base: GaussianHead = GaussianHead(context_size, latent_size)
        self.layers: nn.ModuleList = autoregressive_layers(
            context_size,
            latent_size,
            flow_layers,
            hidden_features,
            univariate=partial(MonotonicRQSTransform, slope=_SMALLEST_SLOPE),
            shapes=[(spline_bins,), (spline_bins,), (spline_bins - 1,)],
        )

    def condition(self, features: Tensor) -> ExplicitConditional:
        context = self.context(features)
        gaussian = self.base.gaussian(context)
        standard = DiagonalGaussian(torch.zeros_like(gaussian.mean), torch.ones_like(gaussian.variance))
        return ExplicitConditional(
            ScaledDensity(gaussian, FlowDensity(standard, [layer(context) for layer in self.layers]))
        )
