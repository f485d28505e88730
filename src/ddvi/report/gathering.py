"""All that a report shows of one run, as plain values: what its model makes of the first test examples."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from ddvi import evaluation
from ddvi.data import Dataset
from ddvi.likelihoods import means
from ddvi.model import LatentVariableModel
from ddvi.randomness import seeded
from ddvi.report import posterior
from ddvi.report.pictures import Tiles, coloured, packed, picture, sprite
from ddvi.settings import Settings

MOST_EXAMPLES = 5000
_EXAMPLES = 6  # whose exact posterior is shown
_RECONSTRUCTIONS = 16
_STRIPS = 40  # rows of a table that are shown
_DRAWS_PER_LABEL = 10
_MOST_ROWS = 20
_DENSITY_SIDE = 150
_GRID_PIXELS = 560
_MOST_MAPS = 12  # features of a table that are mapped
_MAP_SIDE = 48


@torch.no_grad()
def gather(model: LatentVariableModel, dataset: Dataset, settings: Settings) -> dict[str, Any]:
    """What the page's scripts read of a run, JSON-able; arrays are in base64.

    Args:
        model: trained, in evaluation mode.
        dataset: whose first test examples are shown.
        settings: the run's.
    """
    device = next(model.parameters()).device
    whole = dataset.test_x[:MOST_EXAMPLES]
    tiles = Tiles.of(model.preprocessing, whole[:2000].to(device), dataset.maximum)
    raw = whole[: tiles.most(whole[:1].to(device))].to(device)
    x = evaluation.prepared(model.preprocessing, raw)
    z = evaluation.latents(model, x, settings.seed)
    with seeded(settings.seed, "report"):
        limits = _limits(model, z)
        result = {
            "data": _data(dataset, tiles, raw),
            "latents": _latents(model, z, limits),
            "path": posterior.paths(model, x, z.shape[1]),
            "posterior": _posteriors(model, dataset, x) if z.shape[1] == 2 else None,
            "has_density": model.posterior.has_density,
            "decoded": _decoded(model, tiles, limits, z.shape[1]),
            "samples": _samples(model, dataset, tiles, settings.semi_supervised),
            "reconstructions": _reconstructions(model, tiles, raw),
        }
        if settings.semi_supervised:
            log_label = torch.cat([model.classify(part).cpu() for part in x.split(1000)])
            confidence, guess = log_label.exp().max(-1)
            result["guess"] = {
                "label": packed(guess, "int16"),
                "confidence": packed((100 * confidence).round(), "uint8"),
            }
    return result


def _data(dataset: Dataset, tiles: Tiles, raw: Tensor) -> dict[str, Any]:
    """The test examples themselves, which runs may share; `key` says which they are."""
    pixels = torch.cat([tiles.raw(part) for part in raw.split(1000)])
    labels = None if dataset.test_y is None else packed(dataset.test_y[: len(raw)], "int16")
    content: dict[str, Any] = {
        "name": dataset.name,
        "image": tiles.image,
        "sprite": sprite(pixels),
        "labels": labels,
        "classes": list(dataset.classes),
        "tests": len(dataset.test_x),
    }
    key = hashlib.sha256(f"{content}".encode()).hexdigest()[:12]
    return content | {"key": key}


def _in_plane(z: Tensor) -> Tensor:
    """The first two coordinates (N, 2); a single one is spread out at random for the eye."""
    if z.shape[1] > 1:
        return z[:, :2]
    return torch.cat([z, 0.2 * torch.randn_like(z)], 1)


def _limits(model: LatentVariableModel, z: Tensor) -> tuple[float, float, float, float]:
    """A square around all but the most extreme thousandth of latents and prior: x0, x1, y0, y1."""
    points = torch.cat([_in_plane(z), _in_plane(model.prior.sample((2000,)).cpu())]).double()
    low, high = (torch.quantile(points, share, dim=0) for share in (0.001, 0.999))
    (x, y), half = ((low + high) / 2).tolist(), max(float((high - low).max()) / 2, 1e-3) * 1.12
    return x - half, x + half, y - half, y + half


def _latents(model: LatentVariableModel, z: Tensor, limits: tuple[float, float, float, float]) -> dict[str, Any]:
    found: dict[str, Any] = {"z": packed(_in_plane(z)), "size": z.shape[1], "limits": limits, "count": len(z)}
    if z.shape[1] == 2:
        nodes = _lattice(limits, _DENSITY_SIDE).to(next(model.parameters()))
        density = model.prior.log_prob(nodes).double().exp()
        density = (density / density.max()).sqrt() * 255
        found["prior"] = {"density": packed(density.round(), "uint8"), "side": _DENSITY_SIDE}
    else:
        found["prior"] = {"draws": packed(_in_plane(model.prior.sample((1500,)).cpu()))}
    return found


def _lattice(limits: tuple[float, float, float, float], side: int) -> Tensor:
    """The centres of side × side cells, row after row from the lowest: (side², 2)."""
    x0, x1, y0, y1 = limits
    steps = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    up, across = torch.cartesian_prod(y0 + (y1 - y0) * steps, x0 + (x1 - x0) * steps).unbind(-1)
    return torch.stack([across, up], -1)


def _posteriors(model: LatentVariableModel, dataset: Dataset, x: Tensor) -> list[dict[str, Any]]:
    """Of the first example of each class, or the first examples."""
    rows = list(range(min(_EXAMPLES, len(x))))
    if dataset.test_y is not None:
        labels = dataset.test_y[: len(x)]
        first = [
            int((labels == label).nonzero()[0]) for label in range(len(dataset.classes)) if (labels == label).any()
        ]
        rows = first[:_EXAMPLES] or rows
    return [{"row": row} | entry for row, entry in zip(rows, posterior.side_by_side(model, x[rows]), strict=True)]


def _decoded(
    model: LatentVariableModel, tiles: Tiles, limits: tuple[float, float, float, float], size: int
) -> dict[str, Any]:
    """E[x|z] on a lattice over the plane: images as one mosaic, of a table a map a feature; other coordinates are 0."""
    probe = tiles.pixels(means(model.likelihood, model.prior.sample((1,))))
    side = max(5, min(20, _GRID_PIXELS // max(probe.shape[2:]))) if tiles.image else _MAP_SIDE
    nodes = _lattice(limits, side).to(next(model.parameters()))
    z = nodes[:, :size] if size <= 2 else torch.cat([nodes, nodes.new_zeros(len(nodes), size - 2)], 1)
    mean = torch.cat([means(model.likelihood, part) for part in z.split(1000)])
    found: dict[str, Any] = {"limits": limits, "side": side}
    if tiles.image:
        rows = tiles.pixels(mean).unflatten(0, (side, side)).flip(0).flatten(0, 1)  # the highest row is drawn first
        return found | {"mosaic": sprite(rows, side)}
    values = ((model.preprocessing.restore(mean).double() - tiles.low) / (tiles.high - tiles.low)).flatten(1)
    maps = values[:, :_MOST_MAPS].T.unflatten(1, (side, side)).flip(1)
    return found | {"maps": [picture(coloured(each)) for each in maps], "features": values.shape[1]}


def _samples(model: LatentVariableModel, dataset: Dataset, tiles: Tiles, semi: bool) -> dict[str, Any]:
    """E[x|z] of prior draws; of a semi-supervised run a row for each label."""
    if semi:
        labels = min(model.prior.parts or 1, _MOST_ROWS)
        label = torch.arange(labels, device=next(model.parameters()).device).repeat_interleave(_DRAWS_PER_LABEL)
        z, columns = model.prior.sample((len(label),), label=label), _DRAWS_PER_LABEL
        names = list(dataset.classes[:labels])
    else:
        z, columns, names = model.prior.sample((100 if tiles.image else _STRIPS,)), 10, []
    pixels = tiles.pixels(means(model.likelihood, z))
    return {"mosaic": sprite(pixels, columns if tiles.image else 1), "names": names}


def _reconstructions(model: LatentVariableModel, tiles: Tiles, raw: Tensor) -> dict[str, Any]:
    """Test examples and E[x|z], z ~ q(z|x)."""
    raw = raw[: _RECONSTRUCTIONS if tiles.image else _STRIPS]
    pairs = tiles.raw(raw), tiles.pixels(means(model.likelihood, model.latent(model.preprocessing(raw))))
    columns = 8 if tiles.image else 1
    rows = [sprite(pixels, min(columns, math.ceil(len(raw)))) for pixels in pairs]
    return {"originals": rows[0], "decoded": rows[1]}
