"""Any posterior in units of its own for each latent, so that all of them are of one size: z = λ u.

Where a prior is much narrower in one direction than in another, networks that answer in z start far too wide there, and
a noising process that suits the widest direction drowns the narrow ones in noise up to its last levels.
"""

from __future__ import annotations

from typing import NamedTuple, final

from torch import Tensor

from ddvi.errors import InputError
from ddvi.posteriors.affine import AffinePosterior
from ddvi.posteriors.base import Posterior


@final
class _Units(NamedTuple):
    """z = λ u, λ (D,)."""

    scale: Tensor

    def outward(self, u: Tensor) -> Tensor:
        return self.scale * u

    def inward(self, z: Tensor) -> Tensor:
        return z / self.scale

    @property
    def log_volume(self) -> Tensor:
        return self.scale.log().sum()

    @property
    def lesson(self) -> Tensor:
        return self.scale.new_zeros(())


@final
class ScaledPosterior(AffinePosterior):
    """Another posterior, whose latents are in units λ of z.

        (u, a) ~ q(u, a | x),    z = λ u,    log_ratio(z, a) = log_ratio(u, a) − Σ_d log λ_d

    Paths (1 + auxiliaries, *sample_shape, B, D) are in the units of z throughout.

    Args:
        base: the other posterior; what it knows of latents is in these units.
        scale: λ (D,), positive, such as the prior's standard deviations. It is kept with the weights.

    Raises:
        InputError: the scale isn't of D positive numbers.

    Source: the change of variables; to take the prior's spread for λ is this project's.

    Example:
        >>> base = ddvi.DiffusionPosterior(torch.nn.Linear(6, 8), latent_size=3, steps=4)
        >>> posterior = ScaledPosterior(base, torch.tensor([1.0, 0.1, 0.1]))
        >>> posterior(torch.ones(3, 6)).draw((10,)).path.shape
        torch.Size([5, 10, 3, 3])
    """

    scale: Tensor

    def __init__(self, base: Posterior, scale: Tensor) -> None:
        super().__init__(base)
        if scale.shape != (base.latent_size,) or not (scale.isfinite() & (scale > 0)).all():
            given = f"of shape {tuple(scale.shape)}" if scale.shape != (base.latent_size,) else f"{scale.tolist()}"
            raise InputError(f"the scale is {given}; give {base.latent_size} positive numbers, one for each latent")
        self.register_buffer("scale", scale)

    def coordinates(self, features: Tensor) -> _Units:
        return _Units(self.scale)
