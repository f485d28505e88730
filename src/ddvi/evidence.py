"""The exact evidence log p_θ(x) = log ∫ p(z) p_θ(x|z) dz in two dimensions, by quadrature.

The nodes are a square lattice over the region where the prior has mass. Sums over a lattice converge exponentially for
smooth integrands once its spacing is about the integrand's width, so the lattice is doubled until the evidence stands
still: first by the centres of its cells, then by the middles of their edges, which makes a square lattice of half the
spacing, and so on. Every doubling cancels the leading error of the one before, so the change that it makes is about the
error that was left, once the lattice resolves the posterior. While a few nodes hold everything, old and new ones may
agree by accident (four do, evenly, around a narrow peak midway between them), so an example is done when it stands
still and no node holds a fifth of it. The lattice is turned, so that a posterior that is narrow along one axis doesn't
fall between its rows. Examples that are done leave; cells that matter to none of the others are dropped, and an example
is scored only in the tiles of cells in or beside which it has mass: on 10,000 images most pairs are far apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ddvi.errors import InputError
from ddvi.likelihoods import Likelihood
from ddvi.mixtures import log_sum_exp_
from ddvi.priors import Prior
from ddvi.randomness import generator

_NEGLIGIBLE_PRIOR = -40.0  # log density against the highest: an outlier may gain that much in likelihood
_NEGLIGIBLE_WEIGHT = -20.0  # log share of an example's evidence
_NEGLIGIBLE_UNRESOLVED = -400.0  # the same where the first lattice is too coarse to tell, halved by each doubling
_LARGEST_SHARE = 0.2  # of one node, where the lattice resolves the posterior
_ANGLE = math.pi / 8  # of the lattice: as far from its axes as from its diagonals, and its tangent is irrational
_PROBE_SIDE = 128
_TILE = 16  # cells along a side: enough nodes for a matrix product, few enough for a posterior to miss most tiles
_DECODED_AT_ONCE = 3_200_000  # numbers: 4,096 images of MNIST; what is between the layers of a decoder takes more
_ENTRIES_AT_ONCE = 5_000_000  # of the table examples × nodes: what stays in a processor's cache is fastest


class Evidence(NamedTuple):
    """Exact log p(x), and how exact.

    Example:
        >>> Evidence(torch.zeros(3), torch.full((3,), 1e-3), 100).nodes
        100
    """

    log_likelihood: Tensor
    """(N,), nats."""
    change: Tensor
    """(N,), by how much the last doubling of the nodes moved it, nats; infinite where they don't resolve p(z|x)."""
    nodes: int
    """Nodes at which the likelihood was evaluated."""


@torch.no_grad()
def exact_log_likelihood(
    prior: Prior,
    likelihood: Likelihood,
    x: Tensor,
    *,
    tolerance: float = 0.01,
    nodes: int = 50_000,
    doublings: int = 12,
    report: Callable[[str], None] | None = None,
) -> Evidence:
    """log p_θ(x) = log ∫ p(z) p_θ(x | z) dz of every example, by quadrature.

    Args:
        prior: p(z) with D = 2.
        likelihood: p_θ(x | z), in evaluation mode.
        x: (N, *event).
        tolerance: an example whose posterior is resolved is done when a doubling moves it by less than this, in nats.
        nodes: of the first lattice, about.
        doublings: the most that are made; what is left by then shows in `change`.
        report: told about each doubling.

    Raises:
        InputError: the latent space isn't the plane.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> shifted = ddvi.as_likelihood(lambda z: Independent(Normal(z, 1.0), 1), torch.Size([2]))
        >>> evidence = exact_log_likelihood(ddvi.StandardGaussian(), shifted, torch.zeros(1, 2))
        >>> f"{evidence.log_likelihood.item():.3f}, exactly {-math.log(4 * math.pi):.3f}"
        '-2.531, exactly -2.531'
    """
    if tuple(prior.event_shape) != (2,):
        raise InputError(f"quadrature needs a latent space of 2 dimensions, not {tuple(prior.event_shape)}")
    corner, spacing, cells = _lattice(prior, x, nodes)
    total = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    largest, value, change = total.clone(), total.clone(), torch.full_like(total, math.inf)
    home = torch.zeros(len(x), 2, dtype=torch.long, device=x.device)  # the cell of an example's largest term
    active = torch.arange(len(x), device=x.device)
    resolved = torch.zeros_like(active, dtype=torch.bool)
    near = torch.ones(*(-(-side // _TILE) for side in cells.shape), len(x), dtype=torch.bool, device=x.device)
    evaluated, copies = 0, 0
    for doubling, offsets in zip(range(doublings + 1), _offsets(), strict=False):
        kept, matters = torch.zeros_like(cells), torch.zeros_like(near)
        # A peak rises above the nodes around it by its curvature times their spacing squared, at most.
        unresolved = min(_NEGLIGIBLE_WEIGHT, _NEGLIGIBLE_UNRESOLVED / 2**doubling)
        level = value - 2 * math.log(spacing) + torch.where(resolved, _NEGLIGIBLE_WEIGHT, unresolved)
        moved = torch.tensor(offsets, device=x.device)
        for tile, members in _tiles(cells):
            rows = active[near[tile][active]]
            if not len(rows):
                continue
            z = _turned((corner + (members[:, None] + moved) * spacing).flatten(0, 1))
            observed = x if len(rows) == len(x) else x[rows]
            sums, peaks, places, reached = _accumulate(prior, likelihood, observed, z, level[rows])
            total[rows] = torch.logaddexp(total[rows], sums)
            higher = peaks > largest[rows]
            home[rows[higher]] = members[places[higher] // len(moved)]
            largest[rows] = torch.maximum(largest[rows], peaks)
            matters[tile][rows] = peaks > level[rows]
            kept[tuple(members.T)] = reached.view(-1, len(moved)).any(1)
            evaluated += len(z)
        copies += len(offsets)
        latest = total[active] + 2 * math.log(spacing) - math.log(copies)
        change[active] = (latest - value[active]).abs()
        value[active] = latest
        resolved = largest - total < math.log(_LARGEST_SHARE)
        moving = (change[active] > tolerance) | ~resolved[active]
        if report:
            report(f"{evaluated:,} nodes, {int(moving.sum()):,} of {len(x):,} examples still move")
        if not moving.any():
            break
        active = active[moving]
        if doubling:  # the first pass has no estimate to compare with
            # However far a narrow peak is from the nodes, it is near the best of them.
            kept[tuple(home[active].T)] = True
            matters[(*(home[active] // _TILE).T, active)] = True
            cells, near = _with_neighbours(kept), _with_neighbours(matters)
    change[~resolved] = math.inf
    return Evidence(value, change, evaluated)


def _accumulate(
    prior: Prior, likelihood: Likelihood, x: Tensor, z: Tensor, level: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log Σ_m p(z_m) p(x|z_m) for each x, its largest term and that one's node, and which nodes exceed a level."""
    total = torch.full_like(level, -math.inf)
    largest, places = total.clone(), torch.zeros_like(level, dtype=torch.long)
    matters, start = [], 0
    largest_part = min(4096, _DECODED_AT_ONCE // x[0].numel(), _ENTRIES_AT_ONCE // len(x))
    for part in z.split(max(64, largest_part)):
        part = part.to(next(likelihood.parameters(), z).dtype)
        joint = likelihood.pairwise_log_prob(x, part) + prior.log_prob(part)
        peak, place = joint.max(1)
        matters.append((joint > level[:, None].to(joint.dtype)).any(0))
        total = torch.logaddexp(total, log_sum_exp_(joint, peak).double())
        places = torch.where(peak > largest, place + start, places)
        largest = torch.maximum(largest, peak.double())
        start += len(part)
    return total, largest, places, torch.cat(matters)


def _tiles(cells: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """The squares of cells in which a mask (R, C) has any set, by row and column, with the indices (M, 2) of those."""
    index = cells.nonzero()
    tile = index // _TILE
    number = tile[:, 0] * len(cells) + tile[:, 1]
    order = number.argsort(stable=True)
    for members in order.split(number.bincount()[number.unique()].tolist()):
        row, column = tile[members[0]].tolist()
        yield (row, column), index[members]


def _with_neighbours(mask: Tensor) -> Tensor:
    """A mask (R, C, …) and what touches it along a side or at a corner."""
    for dimension in (0, 1):
        grown, length = mask.clone(), mask.shape[dimension] - 1
        for here, there in ((0, 1), (1, 0)):
            grown.narrow(dimension, here, length).logical_or_(mask.narrow(dimension, there, length))
        mask = grown
    return mask


def _lattice(prior: Prior, x: Tensor, nodes: int) -> tuple[Tensor, float, Tensor]:
    """Corner, spacing and the mask of cells of a lattice with about `nodes` cells where the prior has mass."""
    draws = _turned(prior.sample((10_000,), generator=generator(0, "lattice", device=x.device)).double(), -1)
    low, high = draws.amin(0), draws.amax(0)
    low, high = low - 0.5 * (high - low), high + 0.5 * (high - low)
    side = float((high - low).max())
    probe = _mass(prior, low, side / _PROBE_SIDE, _PROBE_SIDE)
    area = float(probe.float().mean()) * side**2
    spacing = math.sqrt(area / nodes)
    count = math.ceil(side / spacing)
    return low, spacing, _mass(prior, low, spacing, count)


def _mass(prior: Prior, corner: Tensor, spacing: float, count: int) -> Tensor:
    """Which of count × count cells have prior mass at their corner, or touch one that has."""
    steps = torch.arange(count, device=corner.device, dtype=corner.dtype)
    rows = torch.cartesian_prod(steps, steps)
    dtype = prior.sample((1,), generator=generator(0, device=corner.device)).dtype
    log_density = [prior.log_prob(_turned(corner + part * spacing).to(dtype)) for part in rows.split(1 << 16)]
    values = torch.cat(log_density).view(count, count)
    return _with_neighbours(values > values.max() + _NEGLIGIBLE_PRIOR)


def _turned(z: Tensor, sign: int = 1) -> Tensor:
    """From the lattice's coordinates (N, 2) to the latent space's, or with sign −1 back."""
    cosine, sine = math.cos(_ANGLE), sign * math.sin(_ANGLE)
    return torch.stack([cosine * z[:, 0] - sine * z[:, 1], sine * z[:, 0] + cosine * z[:, 1]], 1)


def _offsets() -> Iterator[list[tuple[float, float]]]:
    """What each doubling adds to the lattice, as offsets in units of its first spacing."""
    present, step = [(0.0, 0.0)], 1.0
    yield present
    while True:
        half = step / 2
        centres = [(a + half, b + half) for a, b in present]
        yield centres
        edges = [(a + half, b) for a, b in present] + [(a, b + half) for a, b in present]
        yield edges
        present, step = present + centres + edges, half
