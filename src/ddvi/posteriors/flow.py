"""Normalizing-flow posteriors: a Gaussian base pushed through inverse autoregressive layers, both conditioned on x.

    ε ~ N( m(x), diag s(x)² ),    z = f_x(ε),    log q(z | x) = log N(ε) − log |det ∂f_x/∂ε|

An inverse autoregressive layer makes z_i from ε_i and ε_{<i}: all coordinates at once when drawing, one after the other
when scoring a given z. Every second layer has the order reversed.

Source: Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow, 2016. Layers: zuko.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from ddvi.gaussians import DiagonalGaussian
from ddvi.posteriors.base import ExplicitConditional, Posterior
from ddvi.posteriors.gaussian import GaussianHead
from ddvi.posteriors.zuko_layers import MaskedAutoregressiveTransform


def autoregressive_layers(
    context_size: int, latent_size: int, layers: int, hidden_features: tuple[int, ...], **univariate: Any
) -> nn.ModuleList:
    """Layers that are the identity at initialisation, every second one with the order of coordinates reversed.

    Args:
        univariate: what zuko's autoregressive transform takes to be other than affine.
    """
    stack = nn.ModuleList()
    for index in range(layers):
        order: Any = torch.arange(latent_size)
        order = order.flip(0) if index % 2 else order
        layer: Any = MaskedAutoregressiveTransform(
            latent_size, context_size, order=order, hidden_features=hidden_features, **univariate
        )
        for parameter in layer.hyper[-1].parameters():
            nn.init.zeros_(parameter)
        stack.append(layer)
    return stack


def pushed(transforms: Sequence[Any], z: Tensor) -> tuple[Tensor, Tensor]:
    """f_n ∘ … ∘ f_1 of z (*, D), and log |det| of its Jacobian, (*,)."""
    total = z.new_zeros(z.shape[:-1])
    for transform in transforms:
        z, log_determinant = transform.call_and_ladj(z)
        total = total + log_determinant
    return z, total


class ConditionalFlow(nn.Module):
    """A flow on R^D given a context (*, context_size), equal to its Gaussian base at initialisation."""

    def __init__(
        self, context_size: int, latent_size: int, layers: int, hidden_features: tuple[int, ...] = (64, 64)
    ) -> None:
        super().__init__()
        self.base: GaussianHead = GaussianHead(context_size, latent_size)
        self.layers: nn.ModuleList = autoregressive_layers(context_size, latent_size, layers, hidden_features)

    def forward(self, context: Tensor) -> FlowDensity:
        return FlowDensity(self.base.gaussian(context), [layer(context) for layer in self.layers])


@final
class FlowDensity:
    """The density of z = f_n ∘ … ∘ f_1(ε), ε ~ base."""

    def __init__(self, base: DiagonalGaussian, transforms: list[Any]) -> None:
        self.base = base
        self.transforms = transforms

    def draw(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """z (*sample_shape, *batch_shape, D) and log q(z | x), one pass a layer."""
        z, log_prob = self.base.draw(sample_shape)
        z, log_determinant = pushed(self.transforms, z)
        return z, log_prob - log_determinant

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z | x) of given z, D passes a layer."""
        z, log_determinant = pushed([transform.inv for transform in reversed(self.transforms)], z)
        return self.base.log_prob(z) + log_determinant


@final
class FlowPosterior(Posterior):
    """A Gaussian pushed through inverse autoregressive layers, both conditioned on x; the Gaussian at initialisation.

        ε ~ N( m(x), diag s(x)² ),    z = f_x(ε),    log q(z | x) = log N(ε) − log |det ∂f_x/∂ε|

    Drawing takes one pass a layer, scoring a given z takes D.

    Args:
        encoder: from observations (B, *event) to features (B, encoder.out_features).
        latent_size: D.
        labels: number of classes for q(z | x, label); 0 without labels.
        flow_layers: number of layers.
        context_size: size of the projection of the features that conditions them.

    Raises:
        InputError: D is not positive.

    Source: Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow, 2016.

    Example:
        >>> posterior = FlowPosterior(nn.Linear(6, 8), latent_size=2, flow_layers=2)
        >>> posterior(torch.ones(3, 6)).draw((10,)).log_ratio.shape
        torch.Size([10, 3])
    """

    def __init__(
        self, encoder: nn.Module, latent_size: int, labels: int = 0, flow_layers: int = 4, context_size: int = 64
    ) -> None:
        super().__init__(encoder, latent_size, labels)
        self.context: nn.Linear = nn.Linear(self.features, context_size)
        self.flow: ConditionalFlow = ConditionalFlow(context_size, latent_size, flow_layers)

    def condition(self, features: Tensor) -> ExplicitConditional:
        return ExplicitConditional(self.flow(self.context(features)))
