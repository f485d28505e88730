"""Any posterior in coordinates u of its own, z = shift + factor u, which may depend on x.

    (u, a) ~ q(u, a | x),    log q(z, a | x) − log r(a | z) = log q(u, a | x) − log r(a | u) − log |det ∂z/∂u|

Auxiliary variables are moved alike, so that a path (1 + auxiliaries, *sample_shape, B, D) lies in the space of z
throughout; of their change of coordinates q and r have the same part.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Protocol, final

import torch
from torch import Tensor

from ddvi.networks import Given
from ddvi.posteriors.base import Conditional, Draw, Posterior


class Coordinates(Protocol):
    """Where z and u (*sample_shape, *batch_shape, D) lie to each other."""

    def outward(self, u: Tensor) -> Tensor:
        """z of u."""
        ...

    def inward(self, z: Tensor) -> Tensor:
        """u of z."""
        ...

    @property
    def log_volume(self) -> Tensor:
        """log |det ∂z/∂u|, broadcastable to (*batch_shape)."""
        ...

    @property
    def lesson(self) -> Tensor:
        """A loss that is added to every one, (*batch_shape) or (): of value 0, for what the bound can't teach."""
        ...


@final
class AffineConditional(Conditional):
    """z of u, with u and the auxiliary variables of another conditional."""

    def __init__(self, base: Conditional, coordinates: Coordinates) -> None:
        self.base = base
        self.coordinates = coordinates
        self.auxiliaries: int = base.auxiliaries

    def draw(self, sample_shape: tuple[int, ...] = ()) -> Draw:
        return _moved(self.base.draw(sample_shape), self.coordinates)

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.coordinates.outward(self.base.sample(sample_shape))

    def log_ratio(self, path: Tensor) -> Tensor:
        return self.base.log_ratio(self.coordinates.inward(path)) - self.coordinates.log_volume

    def reverse_path(self, z: Tensor) -> Tensor:
        return self.coordinates.outward(self.base.reverse_path(self.coordinates.inward(z)))

    def log_bound(self, z: Tensor, levels: int | None = None) -> Tensor:
        bound = self.base.log_bound(self.coordinates.inward(z), levels)
        return bound - self.coordinates.log_volume - self.coordinates.lesson


def _moved(draw: Draw, coordinates: Coordinates) -> Draw:
    """A draw of the base, in the space of z."""
    path = coordinates.outward(draw.path)
    # Bounds are to be raised, but they lower the score of a draw.
    return Draw(path[0], draw.log_ratio - coordinates.log_volume + coordinates.lesson, path)


class AffinePosterior(Posterior):
    """Another posterior in coordinates that a subclass gives, see the module.

    Args:
        base: the other posterior; what it knows of latents is in these coordinates.

    Source: the change of variables.
    """

    def __init__(self, base: Posterior) -> None:
        super().__init__(Given(base.features), base.latent_size)
        self.base: Posterior = base
        self.has_density: bool = base.has_density

    @abc.abstractmethod
    def coordinates(self, features: Tensor) -> Coordinates:
        """Those for features as `encode` gives them."""

    def inner(self, features: Tensor) -> Tensor:
        """What the base knows of such features."""
        return features

    def encode(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return self.base.encode(x, label)

    def with_label(self, features: Tensor, label: Tensor) -> Tensor:
        return self.base.with_label(features, label)

    def condition(self, features: Tensor) -> AffineConditional:
        return AffineConditional(self.base.condition(self.inner(features)), self.coordinates(features))

    def without_context(self, features: Tensor) -> AffineConditional:
        return AffineConditional(self.base.without_context(self.inner(features)), self.coordinates(features))

    def path_draw(
        self, features: Tensor, sample_shape: tuple[int, ...] = (), weigh: Callable[[Tensor], Tensor] | None = None
    ) -> Draw:
        return _moved(self.base.path_draw(self.inner(features), sample_shape, weigh), self.coordinates(features))


def times(matrix: Tensor, vectors: Tensor, product: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> Tensor:
    """A matrix (*batch_shape, D, D), or its inverse by another product, times vectors (*sample_shape, *batch_shape, D).

    Draws are columns of one product: to repeat the matrix for each of them would take D times their memory.
    """
    before = vectors.dim() - matrix.dim() + 1
    columns = vectors.flatten(0, before - 1).movedim(0, -1) if before else vectors.unsqueeze(-1)
    # A rounded product would have another inverse.
    with torch.autocast(matrix.device.type, enabled=False):
        made = product(matrix, columns.to(matrix.dtype))
    return made.movedim(-1, 0).unflatten(0, vectors.shape[:before]) if before else made.squeeze(-1)
