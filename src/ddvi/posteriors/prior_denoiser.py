"""What a prior says of the latent behind a noised one: E[z_0 | z_t] under p(z), an input to the diffusion posterior."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ddvi.noise import NoisingProcess
from ddvi.priors import Prior
from ddvi.randomness import generator

_Levels = tuple[tuple[float, float], ...]
"""α and σ of t = 1 … T."""
_BOXES = 64  # along each side, in which there are draws or not


class Tables(NamedTuple):
    """What is read at some levels: pictures (N, 2, cells, cells), or one volume of all levels and the depth of each."""

    pictures: Tensor
    depth: Tensor | None = None


@final
class PriorDenoiser(nn.Module):
    """E[z_0 | z_t] under the prior, tabulated per t on a grid and interpolated, for D = 2.

        E[z_0 | z_t] = ∫ z p(z) N(z_t; α_t z, σ_t² I) dz / ∫ p(z) N(z_t; α_t z, σ_t² I) dz

    by quadrature over a finer grid, where the Gaussian separates and each integral is two matrix products. Any prior
    with a density will do. Constant beyond the grid.

    Args:
        prior: p(z) with D = 2.
        noise: the chain.
        cells: of the table, along each side.
        nodes: of the quadrature, along each side.
    """

    table: Tensor
    extent: Tensor

    def __init__(self, prior: Prior, noise: NoisingProcess, cells: int = 256, nodes: int = 384) -> None:
        super().__init__()
        constants = noise.constants()
        levels = tuple(zip(constants.alpha[1:].tolist(), constants.sigma[1:].tolist(), strict=True))
        if prior.recipe is None:
            table, extent = _made(prior, levels, cells, nodes)
        else:
            table, extent = _remade(prior.recipe, torch.get_default_dtype(), levels, cells, nodes)
        self.register_buffer("table", table.clone(), persistent=False)
        self.register_buffer("extent", torch.tensor(extent), persistent=False)

    def at(self, t: Tensor | int | slice) -> Tables:
        """The tables at t, as in `DiffusionConditional.predict`."""
        if isinstance(t, slice):
            return Tables(self.table[t.start - 1 : t.stop - 1])
        if isinstance(t, int) or t.dim() == 0:
            return Tables(self.table[t - 1][None])
        # Levels in any order: the third axis of one volume, read at its slices.
        depth = (t - 1).to(self.table.dtype) * (2 / max(1, len(self.table) - 1)) - 1
        return Tables(self.table.transpose(0, 1)[None], depth.unsqueeze(-1))

    def read(self, z_t: Tensor, tables: Tables) -> Tensor:
        """At z_t (*, 2), by bilinear interpolation: (*, 2)."""
        position, (pictures, depth) = z_t / self.extent, tables
        if depth is None:
            found = _interpolated(pictures, position.reshape(len(pictures), 1, -1, 2))
        else:
            position = torch.cat([position, depth.expand(*z_t.shape[:-1], 1)], -1)
            found = _interpolated(pictures, position.reshape(1, 1, 1, -1, 3))
        return found.reshape(z_t.shape)

    def forward(self, z_t: Tensor, t: Tensor | int | slice) -> Tensor:
        """At z_t (*, 2) of levels t, as in `DiffusionConditional.predict`: (*, 2)."""
        return self.read(z_t, self.at(t))


def _interpolated(table: Tensor, position: Tensor) -> Tensor:
    """Tables (N, 2, …) at positions (N, …, points, dimensions) in [−1, 1] by linear interpolation: (N, points, 2)."""
    found = nn.functional.grid_sample(table, position, padding_mode="border", align_corners=True)
    return found.flatten(2).transpose(1, 2)


@torch.no_grad()
def _made(prior: Prior, levels: _Levels, cells: int, nodes: int) -> tuple[Tensor, float]:
    """The table as T pictures of two channels whose rows are the second coordinate, the form that `grid_sample` reads,
    and how far it reaches."""
    draws = prior.sample((10_000,), generator=generator(0, "extent"))
    extent = float(draws.abs().max()) * 1.1 + 0.5
    table = _tabulate(_density(prior, draws, extent, nodes), levels, extent, cells)
    return table.permute(0, 3, 2, 1).contiguous().to(torch.get_default_dtype()), extent


@functools.lru_cache(maxsize=4)
def _remade(
    recipe: tuple[Any, ...], dtype: torch.dtype, levels: _Levels, cells: int, nodes: int
) -> tuple[Tensor, float]:
    """Of a prior's recipe, and of a default precision."""
    kind, *arguments = recipe
    with torch.inference_mode(False), torch.device("cpu"):
        return _made(kind(*arguments), levels, cells, nodes)


def _density(prior: Prior, draws: Tensor, extent: float, nodes: int) -> Tensor:
    """p(z) up to a factor on a grid (nodes, nodes) over [−extent, extent]²; only near draws (N, 2) is it asked for."""
    box = ((draws / extent + 1) * (0.5 * _BOXES)).long().clamp(0, _BOXES - 1)
    near = torch.zeros(1, 1, _BOXES, _BOXES)
    near[0, 0, box[:, 0], box[:, 1]] = 1
    near = nn.functional.interpolate(nn.functional.max_pool2d(near, 9, 1, 4), size=(nodes, nodes))[0, 0] > 0
    axis = torch.linspace(-extent, extent, nodes)
    points = axis[near.nonzero()].split(1 << 16)
    log_density = torch.full((nodes, nodes), -torch.inf, dtype=torch.float64)
    log_density[near] = torch.cat([prior.log_prob(part).double() for part in points])
    return (log_density - log_density.max()).exp()


def _tabulate(density: Tensor, levels: _Levels, extent: float, cells: int) -> Tensor:
    """The table (T, cells, cells, 2) on [−extent, extent]², in double precision, of a density on a finer grid."""
    fine = torch.linspace(-extent, extent, len(density), dtype=torch.float64)
    coarse = torch.linspace(-extent, extent, cells, dtype=torch.float64)
    table = torch.stack(torch.meshgrid(coarse, coarse, indexing="ij"), -1)
    tables = []
    # From the noisiest on: where a level underflows, far from the prior's mass, that of the level before stands in.
    for alpha, sigma in reversed(levels):
        kernel = (-0.5 * ((coarse[:, None] - alpha * fine) / sigma) ** 2).exp()
        mass = kernel @ density @ kernel.T
        first = kernel @ (density * fine[:, None]) @ kernel.T
        second = kernel @ (density * fine) @ kernel.T
        table = torch.where(mass[..., None] > 1e-280, torch.stack([first, second], -1) / mass[..., None], table)
        tables.append(table)
    return torch.stack(tables[::-1])
