"""The posterior of the adversarial autoencoder: a deterministic encoder without a density.

Source: Makhzani et al., Adversarial Autoencoders, 2015.
"""

from __future__ import annotations

from typing import NoReturn, final

from torch import Tensor, nn

from ddvi.errors import InputError
from ddvi.posteriors.base import Conditional, Draw, Posterior


@final
class ImplicitConditional(Conditional):
    """The point z = f(x) (*batch_shape, D); whatever needs a density is refused."""

    def __init__(self, z: Tensor) -> None:
        self.z = z

    def draw(self, sample_shape: tuple[int, ...] = ()) -> Draw:
        """The point itself; its log_ratio is NaN, since it has none."""
        z = self.sample(sample_shape)
        return Draw(z, z.new_full(z.shape[:-1], float("nan")), z[None])

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.z.expand(*sample_shape, *self.z.shape)

    def log_ratio(self, path: Tensor) -> NoReturn:
        self._refuse()

    def reverse_path(self, z: Tensor) -> NoReturn:
        self._refuse()

    def log_bound(self, z: Tensor, levels: int | None = None) -> NoReturn:
        self._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        raise InputError(
            "an adversarial autoencoder's encoder is a point, not a density: log q(z|x) and every bound need"
            " another posterior, such as vae or ddvi"
        )


@final
class ImplicitPosterior(Posterior):
    """The deterministic encoder of the adversarial autoencoder: a point without a density, z = f(x).

    Args:
        encoder: from observations (B, *event) to features (B, encoder.out_features).
        latent_size: D.
        labels: number of classes for q(z | x, label); 0 without labels.

    Raises:
        InputError: D is not positive; a score or a bound is asked for.

    Source: Makhzani et al., Adversarial Autoencoders, 2015.

    Example:
        >>> posterior = ImplicitPosterior(nn.Linear(6, 8), latent_size=2)
        >>> posterior.has_density, posterior(torch.ones(3, 6)).sample().shape
        (False, torch.Size([3, 2]))
    """

    has_density = False

    def __init__(self, encoder: nn.Module, latent_size: int, labels: int = 0) -> None:
        super().__init__(encoder, latent_size, labels)
        self.head: nn.Linear = nn.Linear(self.features, latent_size)

    def condition(self, features: Tensor) -> ImplicitConditional:
        return ImplicitConditional(self.head(features))
