"""What the report shows of q(z | x): the chain's path from z_T to z_0, and q(z | x) beside the exact p(z | x).

In the plane the exact posterior is p(z) p_θ(x | z) / p_θ(x), all three exact. The gap is that of the measures,

    KL( q(z|x) ‖ p(z|x) ) = E_q[ log q(z | x) − log p(x, z) ] + log p_θ(x).

Where there are auxiliary variables log q(z | x) is importance-sampled for the gap, as for the measures. On a whole grid
that would take too long: the picture is a kernel density estimate from many draws, whose bandwidth is each draw's
distance to its neighbours, so that narrow modes stay narrow.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ddvi.errors import InputError
from ddvi.evidence import exact_log_likelihood
from ddvi.model import LatentVariableModel
from ddvi.posteriors.affine import AffineConditional
from ddvi.posteriors.diffusion import DiffusionConditional
from ddvi.report.pictures import packed

_SIDE = 64  # nodes along an edge of a picture
_COARSE_SIDE = 96  # and of the search for the posterior
_MOST_PATH_VALUES = 60_000
_DRAWS = 400  # for the bound
_GAP_DRAWS = 100
_GAP_AUXILIARY_DRAWS = 100
_PICTURE_DRAWS = 2000
_NEIGHBOURS = 12  # one draw in so many is a draw's neighbour
_NEGLIGIBLE = 1e-3  # share of the evidence in a cell


def paths(model: LatentVariableModel, x: Tensor, size: int) -> dict[str, Any] | None:
    """z_0 … z_T of observations (N, *event), their first two coordinates; None where the posterior isn't a chain."""
    conditional = model.conditional(x[:1])
    inner = conditional.base if isinstance(conditional, AffineConditional) else conditional
    if not isinstance(inner, DiffusionConditional):
        return None
    count = max(1, min(len(x), _MOST_PATH_VALUES // (2 * (1 + conditional.auxiliaries))))
    path = model.conditional(x[:count]).draw().path[..., :2]
    if size == 1:
        path = torch.cat([path, torch.zeros_like(path)], -1)
    return {"z": packed(path), "steps": conditional.auxiliaries, "count": count}


def side_by_side(model: LatentVariableModel, x: Tensor) -> list[dict[str, Any]]:
    """p(z | x) and q(z | x) on a grid where they have mass, and what separates them, for each x (N, *event).

    Raises:
        InputError: the latent space isn't the plane.
    """
    if model.posterior.latent_size != 2:
        raise InputError(f"the exact posterior needs a latent space of 2 dimensions, not {model.posterior.latent_size}")
    evidence = exact_log_likelihood(model.prior, model.likelihood, x, nodes=10_000).log_likelihood
    coarse, spacing = _prior_nodes(model)
    volume = model.preprocessing.log_volume
    share = (_log_joint(model, x, coarse) - evidence[:, None] + 2 * math.log(spacing)).exp()
    exact = model.posterior.has_density and not model.conditional(x[:1]).auxiliaries
    found = []
    for row in range(len(x)):
        one, log_evidence = x[row : row + 1], evidence[row]
        draws = model.latent(one.expand(_PICTURE_DRAWS, *one.shape[1:]))
        mass = coarse[share[row] > _NEGLIGIBLE * share[row].max()]
        x0, x1, y0, y1 = window = _window(mass, draws, spacing)
        steps = (torch.arange(_SIDE, device=x.device, dtype=coarse.dtype) + 0.5) / _SIDE
        across, up = x0 + (x1 - x0) * steps, y0 + (y1 - y0) * steps
        nodes = torch.stack([across.expand(_SIDE, _SIDE), up[:, None].expand(_SIDE, _SIDE)], -1).flatten(0, 1)
        log_p = _log_joint(model, one, nodes)[0] - log_evidence
        entry: dict[str, Any] = {"window": window, "side": _SIDE, "exact": packed(log_p.exp())}
        entry["log_likelihood"] = log_evidence.item() - volume
        if model.posterior.has_density:
            q = model.log_posterior(one, nodes[:, None], 1)[:, 0].exp() if exact else smoothed(draws, nodes)
            entry |= {"approximate": packed(q), "draws": 0 if exact else len(draws)}
            entry |= {"bound": model.log_weights(one, _DRAWS).double().mean().item() - volume}
            entry |= _gap(model, one, draws[:_GAP_DRAWS], log_evidence)
        else:
            entry["point"] = draws[0].tolist()
        found.append(entry)
    return found


def _gap(model: LatentVariableModel, x: Tensor, draws: Tensor, log_evidence: Tensor) -> dict[str, float]:
    """KL(q(z|x) ‖ p(z|x)) of one x (1, *event) by draws (S, D), and its standard error."""
    log_q = model.log_posterior(x, draws[:, None], max(20, _GAP_AUXILIARY_DRAWS // model.summed))[:, 0]
    difference = log_q.double() - _log_joint(model, x, draws)[0]
    return {
        "gap": (difference.mean() + log_evidence).item(),
        "gap_error": (difference.std() / math.sqrt(len(draws))).item(),
    }


def smoothed(draws: Tensor, nodes: Tensor) -> Tensor:
    """A density at nodes (M, 2) from draws (N, 2): a Gaussian around each, as wide as its neighbourhood."""
    distances = torch.cdist(draws, draws).kthvalue(len(draws) // _NEIGHBOURS, dim=1).values
    scale = 0.45 * distances.clamp_min(1e-4)
    kernels = (-0.5 * (torch.cdist(nodes, draws) / scale).square()).exp() / (2 * math.pi * scale.square())
    return kernels.mean(1)


def _log_joint(model: LatentVariableModel, x: Tensor, z: Tensor) -> Tensor:
    """log p(x, z) of all x (N, *event) with all z (M, D): (N, M)."""
    parts = [model.likelihood.pairwise_log_prob(x, part) + model.prior.log_prob(part) for part in z.split(4096)]
    return torch.cat(parts, 1).double()


def _prior_nodes(model: LatentVariableModel) -> tuple[Tensor, float]:
    """A square lattice (M, 2) where the prior has mass, and its spacing."""
    draws = model.prior.sample((5000,))
    low, high = draws.amin(0), draws.amax(0)
    spacing = float((high - low).max()) * 1.1 / _COARSE_SIDE
    steps = torch.arange(_COARSE_SIDE, device=draws.device, dtype=draws.dtype) + 0.5
    nodes = torch.cartesian_prod(steps, steps) * spacing + (low + high) / 2 - _COARSE_SIDE / 2 * spacing
    log_density = model.prior.log_prob(nodes)
    return nodes[log_density > log_density.max() - 20], spacing


def _window(mass: Tensor, draws: Tensor, spacing: float) -> tuple[float, float, float, float]:
    """A square around where p has mass and q has nearly all of its own: x0, x1, y0, y1."""
    low, high = (torch.quantile(draws, share, dim=0) for share in (0.01, 0.99))
    if len(mass):
        low, high = torch.minimum(low, mass.amin(0) - spacing), torch.maximum(high, mass.amax(0) + spacing)
    centre, half = (low + high) / 2, float((high - low).max()) / 2 * 1.25 + 1e-3
    x, y = centre.tolist()
    return x - half, x + half, y - half, y + half
