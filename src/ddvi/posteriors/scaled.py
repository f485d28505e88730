"""Any posterior in units of its own for each latent, so that all of them are of one size.

    (u, a) ~ q(u, a | x),    z = λ u,    log q(z, a | x) − log r(a | z) = log q(u, a | x) − log r(a | u) − Σ_d log λ_d

Where a prior is much narrower in one direction than in another, networks that answer in z start far too wide there, and
a noising process that suits the widest direction drowns the narrow ones in noise up to its last levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from torch import Tensor

from ddvi.errors import InputError
from ddvi.networks import Given
from ddvi.posteriors.base import Conditional, Draw, Posterior


@final
class ScaledConditional(Conditional):
    """z = λ u, with u and the auxiliary variables, which are scaled alike, of another conditional."""

    def __init__(self, base: Conditional, scale: Tensor) -> None:
        self.base = base
        self.scale = scale
        self.auxiliaries: int = base.auxiliaries

    def draw(self, sample_shape: tuple[int, ...] = ()) -> Draw:
        return _scaled(self.base.draw(sample_shape), self.scale)

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.scale * self.base.sample(sample_shape)

    def log_ratio(self, path: Tensor) -> Tensor:
        return self.base.log_ratio(path / self.scale) - self.scale.log().sum()

    def reverse_path(self, z: Tensor) -> Tensor:
        return self.scale * self.base.reverse_path(z / self.scale)

    def log_bound(self, z: Tensor, levels: int | None = None) -> Tensor:
        return self.base.log_bound(z / self.scale, levels) - self.scale.log().sum()


def _scaled(draw: Draw, scale: Tensor) -> Draw:
    # Of the auxiliary variables' change of units q and r have the same part.
    path = scale * draw.path
    return Draw(path[0], draw.log_ratio - scale.log().sum(), path)


@final
class ScaledPosterior(Posterior):
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
        super().__init__(Given(base.features), base.latent_size)
        if scale.shape != (base.latent_size,) or not (scale.isfinite() & (scale > 0)).all():
            given = f"of shape {tuple(scale.shape)}" if scale.shape != (base.latent_size,) else f"{scale.tolist()}"
            raise InputError(f"the scale is {given}; give {base.latent_size} positive numbers, one for each latent")
        self.base: Posterior = base
        self.has_density: bool = base.has_density
        self.register_buffer("scale", scale)

    def encode(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return self.base.encode(x, label)

    def with_label(self, features: Tensor, label: Tensor) -> Tensor:
        return self.base.with_label(features, label)

    def condition(self, features: Tensor) -> Conditional:
        return ScaledConditional(self.base.condition(features), self.scale)

    def without_context(self, features: Tensor) -> Conditional:
        return ScaledConditional(self.base.without_context(features), self.scale)

    def path_draw(
        self, features: Tensor, sample_shape: tuple[int, ...] = (), weigh: Callable[[Tensor], Tensor] | None = None
    ) -> Draw:
        return _scaled(self.base.path_draw(features, sample_shape, weigh), self.scale)
