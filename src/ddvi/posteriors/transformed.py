"""Any posterior pushed through inverse autoregressive layers, such as a chain in the coordinates that a flow has found.

    (u, a) ~ q(u, a | x),    z = f_x(u)
    log q(z, a | x) − log r(a | z) = log q(u, a | x) − log r(a | u) − log |det ∂f_x/∂u|

The layers straighten narrow necks and bent ridges, for which a chain of Gaussian steps would have to be long; the chain
makes what a few of them leave, such as several modes.

Sources: Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow, 2016, for the layers; Vahdat
et al., Score-based Generative Modeling in Latent Space, 2021, for diffusion in learned coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor, nn

from ddvi.errors import InputError
from ddvi.posteriors.base import Conditional, Draw, Posterior, PosteriorMaker
from ddvi.posteriors.diffusion import DiffusionPosterior
from ddvi.posteriors.flow import autoregressive_layers, pushed

_LARGEST_CONTEXT = 64


@final
class TransformedConditional(Conditional):
    """z = f_x(u), u ~ another conditional, whose paths, which begin with u, are these ones' too."""

    def __init__(self, base: Conditional, transforms: Sequence[Any]) -> None:
        self.base = base
        self.transforms = transforms
        self.auxiliaries: int = base.auxiliaries

    def draw(self, sample_shape: tuple[int, ...] = ()) -> Draw:
        u, log_ratio, path = self.base.draw(sample_shape)
        z, log_determinant = pushed(self.transforms, u)
        return Draw(z, log_ratio - log_determinant, path)

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return pushed(self.transforms, self.base.sample(sample_shape))[0]

    def log_ratio(self, path: Tensor) -> Tensor:
        return self.base.log_ratio(path) - pushed(self.transforms, path[0])[1]

    def reverse_path(self, z: Tensor) -> Tensor:
        return self.base.reverse_path(self._pulled(z)[0])

    def log_bound(self, z: Tensor, levels: int | None = None) -> Tensor:
        u, log_determinant = self._pulled(z)
        return self.base.log_bound(u, levels) + log_determinant

    def _pulled(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """u and log |det| of its Jacobian; D passes a layer."""
        return pushed([transform.inv for transform in reversed(self.transforms)], z)


@final
class Given(nn.Module):
    """An encoder that is shown features (B, out_features) instead of observations."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return x


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
        InputError: D is not positive; the base has no density, or is told the denoiser of z's prior, or guidance.

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
        unfit = [name for name in ("prior_denoiser", "guidance") if settings.get(name) is not None]
        if unfit:
            raise InputError(f"{unfit[0]} speaks of z, but the base draws what layers make z of; leave it out")
        self.base: Posterior = base(Given(self.features), latent_size, **settings)
        if not self.base.has_density:
            raise InputError(f"{type(self.base).__name__} has no density, which layers need; take another base")
        size = context_size or min(self.features, _LARGEST_CONTEXT)
        self.context: nn.Linear = nn.Linear(self.features, size)
        self.layers: nn.ModuleList = autoregressive_layers(size, latent_size, flow_layers, (64, 64))

    def condition(self, features: Tensor) -> TransformedConditional:
        context = self.context(features)
        return TransformedConditional(self.base.condition(features), [layer(context) for layer in self.layers])

    def stopped_log_ratio(self, features: Tensor, path: Tensor) -> Tensor:
        """Score `path` with the base's parameters held fixed.

        Those of the layers aren't: a path begins with u, at which log |det| is no score of theirs but part of z's.
        """
        conditional = self.condition(features)
        return self.base.stopped_log_ratio(features, path) - pushed(conditional.transforms, path[0])[1]
