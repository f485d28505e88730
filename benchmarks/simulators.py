"""Simulators whose posteriors can be drawn from exactly, by their definitions in a benchmark of inference.

| simulator | D | prior | x given z |
|---|---|---|---|
| two_moons | 2 | U([−1, 1]²) | ¼ − |z₁ + z₂|/√2 + r cos a, (z₂ − z₁)/√2 + r sin a, r ~ N(0.1, 0.01²), a ~ U(±π/2) |
| gaussian_linear | 10 | N(0, 0.1 I) | N(z, 0.1 I) |
| gaussian_mixture | 2 | U([−10, 10]²) | ½ N(z, I) + ½ N(z, 0.1² I) |

Under a uniform prior the posterior is the likelihood as a function of z, within the prior's support. Here that function
is a density itself, up to a factor: of crescents, one the other's mirror image, or of the same mixture around x. Its
draws that fall within the support are draws from the posterior. In `gaussian_linear` it is N(x/2, 0.05 I).

Source: Lueckmann et al., Benchmarking Simulation-Based Inference, 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, Uniform

RADIUS, THICKNESS, OFFSET = 0.1, 0.01, 0.25
NOISE = 0.1
"""The variance of prior and of noise in `gaussian_linear`, and the narrow standard deviation in `gaussian_mixture`."""


@dataclass(frozen=True)
class Simulator:
    """A model p(z) p(x | z) with draws from its posterior."""

    prior: Distribution
    simulate: Callable[[Tensor], Tensor]
    """z (*, D) to x (*, event)."""
    propose: Callable[[Tensor, int], Tensor]
    """x (event) and a count to draws z (count, D) whose density within the prior's support is the posterior's."""

    def pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """z (count, D) and x (count, event)."""
        z = self.prior.sample((count,))
        return z, self.simulate(z)

    def reference(self, x: Tensor, count: int) -> Tensor:
        """Draws z ~ p(z | x) of one observation (event): (count, D)."""
        kept = torch.empty(0, *self.prior.event_shape)
        while len(kept) < count:
            z = self.propose(x, count)
            kept = torch.cat([kept, z[self.prior.support.check(z)]])
        return kept[:count]


def two_moons() -> Simulator:
    def crescent(shape: torch.Size) -> Tensor:
        angle = math.pi * (torch.rand(shape) - 0.5)
        radius = RADIUS + THICKNESS * torch.randn(shape)
        return torch.stack([radius * angle.cos() + OFFSET, radius * angle.sin()], -1)

    def simulate(z: Tensor) -> Tensor:
        first, second = z.unbind(-1)
        return crescent(first.shape) + torch.stack([-(first + second).abs(), second - first], -1) / math.sqrt(2)

    def propose(x: Tensor, count: int) -> Tensor:
        """Of p = x + (u, −v), drawn, with u = |z₁ + z₂|/√2 and v = (z₂ − z₁)/√2: z, a rotation of (±u, v)."""
        u, v = ((crescent(torch.Size([count])) - x) * torch.tensor([1.0, -1.0])).unbind(-1)
        side = torch.where(u >= 0, 1 - 2.0 * torch.randint(2, (count,)), math.nan)  # there is none for u < 0
        return torch.stack([side * u - v, side * u + v], -1) / math.sqrt(2)

    return Simulator(_square(1.0), simulate, propose)


def gaussian_linear() -> Simulator:
    def simulate(z: Tensor) -> Tensor:
        return z + math.sqrt(NOISE) * torch.randn_like(z)

    def propose(x: Tensor, count: int) -> Tensor:
        return x / 2 + math.sqrt(NOISE / 2) * torch.randn(count, len(x))

    prior = Independent(Normal(torch.zeros(10), math.sqrt(NOISE)), 1)
    return Simulator(prior, simulate, propose)


def gaussian_mixture() -> Simulator:
    def around(center: Tensor) -> Tensor:
        scale = torch.where(torch.rand(center.shape[:-1]) < 0.5, 1.0, NOISE)
        return center + scale.unsqueeze(-1) * torch.randn_like(center)

    return Simulator(_square(10.0), around, lambda x, count: around(x.expand(count, -1)))


def _square(reach: float) -> Distribution:
    return Independent(Uniform(torch.full((2,), -reach), torch.full((2,), reach)), 1)


SIMULATORS: dict[str, Callable[[], Simulator]] = {
    "two_moons": two_moons,
    "gaussian_linear": gaussian_linear,
    "gaussian_mixture": gaussian_mixture,
}
