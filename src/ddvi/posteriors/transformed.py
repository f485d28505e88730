"""Any posterior pushed through inverse autoregressive layers, such as a chain in the coordinates that a flow has found.

    (u, a) ~ q(u, a | x),    z = f_x(u)
    log q(z, a | x) − log r(a | z) = log q(u, a | x) − log r(a | u) − log |det ∂f_x/∂u|

The layers straighten narrow necks and bent ridges, see `benchmarks/pyro_guides.py`; the chain makes what they leave.

Sources: Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow, 2016, for the layers; Vahdat
et al., Score-based Generative Modeling in Latent Space, 2021, for diffusion in learned coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from ddvi.errors import InputError
from ddvi.networks import Given
from ddvi.posteriors.base import Conditional, Draw, Posterior, PosteriorMaker
from ddvi.posteriors.diffusion import DiffusionPosterior, check_own_latents
from ddvi.posteriors.flow import autoregressive_layers, pushed

_LARGEST_CONTEXT = 64


@final
class TransformedConditional(Conditional):
    """z = f_x(u), with u and the auxiliary variables of another conditional."""

    def __init__(self, base: Conditional, transforms: Sequence[Any]) -> None:
        self.base = base
        self.transforms = transforms
        self.auxiliaries: int = base.auxiliaries

    def draw(self, sample_shape: tuple[int, ...] = ()) -> Draw:
        return _pushed_draw(self.transforms, self.base.draw(sample_shape))

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return pushed(self.transforms, self.base.sample(sample_shape))[0]

    def log_ratio(self, path: Tensor) -> Tensor:
        path, log_determinant = self._pulled(path)
        return self.base.log_ratio(path) + log_determinant

    def reverse_path(self, z: Tensor) -> Tensor:
        return _from(z, self.base.reverse_path(self._pulled(z[None])[0][0]))

    def log_bound(self, z: Tensor, levels: int | None = None) -> Tensor:
        path, log_determinant = self._pulled(z[None])
        return self.base.log_bound(path[0], levels) + log_determinant

    def _pulled(self, path: Tensor) -> tuple[Tensor, Tensor]:
        """The base's path behind one that begins with z, and log |det ∂u/∂z|; D passes a layer."""
        u, log_determinant = pushed([transform.inv for transform in reversed(self.transforms)], path[0])
        return _from(u, path), log_determinant


def _pushed_draw(transforms: Sequence[Any], draw: Draw) -> Draw:
    """A draw of the base that the transforms have moved."""
    z, log_determinant = pushed(transforms, draw.z)
    return Draw(z, draw.log_ratio - log_determinant, _from(z, draw.path))


def _from(first: Tensor, path: Tensor) -> Tensor:
    """A path that begins elsewhere."""
    return torch.cat([first[None], path[1:]])


@final
class TransformedPosterior(Posterior):
    """Another posterior pushed through inverse autoregressive layers, both given x; at initialisation the other alone.

        (u, a) ~ q(u, a | x),    z = f_x(u),    log_ratio(z, a) = log_ratio(u, a) − log |det ∂f_x/∂u|

    Drawing takes one pass a layer, scoring a given z takes D.

    Args:
        encoder: from observations (B, *event) to features (B, encoder.out_features).
        latent_size: D.
        labels: number of classes for q(z, a | x, label); 0 without labels.
        base: a function (encoder, D) to the other posterior, such as its class; it is shown the features.
        flow_layers: number of layers; with 0 it is the other posterior.
        context_size: size of the projection of the features that conditions them; by default as many as there are, at
            most 64.
        settings: keywords for the base (`steps`, `denoiser_size`, …).

    Raises:
        InputError: D is not positive; the base has no density, or settings that speak of z.

    Sources: Kingma et al., 2016; Vahdat et al., 2021.

    Example:
        >>> posterior = TransformedPosterior(nn.Linear(6, 8), latent_size=2, steps=4)
        >>> posterior(torch.ones(3, 6)).draw((10,)).log_ratio.shape
        torch.Size([10, 3])
    """

    def __init__(
        self,
        encoder: nn.Module,
        latent_size: int,
        labels: int = 0,
        base: PosteriorMaker = DiffusionPosterior,
        flow_layers: int = 2,
        context_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(encoder, latent_size, labels)
        self.base: Posterior = base(Given(self.features), latent_size, **settings)
        if not self.base.has_density:
            raise InputError(f"{type(self.base).__name__} has no density, which layers need; take another base")
        check_own_latents(self.base, "the chain draws what the layers make z of")
        size = min(self.features, _LARGEST_CONTEXT) if context_size is None else context_size
        self.context: nn.Linear = nn.Linear(self.features, size)
        self.layers: nn.ModuleList = autoregressive_layers(size, latent_size, flow_layers, (64, 64))

    def condition(self, features: Tensor) -> TransformedConditional:
        return TransformedConditional(self.base.condition(features), self._transforms(features))

    def path_draw(
        self, features: Tensor, sample_shape: tuple[int, ...] = (), weigh: Callable[[Tensor], Tensor] | None = None
    ) -> Draw:
        """A path draw of the base, which the layers push: they learn by their plain gradient.

        They have a part in r(a | z) = r(a | u) too, and only log q has a score of mean 0.
        """
        return _pushed_draw(self._transforms(features), self.base.path_draw(features, sample_shape, weigh))

    def _transforms(self, features: Tensor) -> list[Any]:
        context = self.context(features)
        return [layer(context) for layer in self.layers]
