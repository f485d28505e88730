"""Sums of very many exponentials, nearly all of them negligible.

Of log Σ_j exp( log w_j − |z − n_j|² ) over nodes in the plane, exact to rounding, there is the gradient too. Nearly all
nodes of a curve are too far from z to count. So the plane around the nodes is cut into cells, each of which knows the
nodes that may count anywhere in it: with k the largest term at the cell's centre, what node j may add is

    log w_j − |z − n_j|² − ( log w_k − |z − n_k|² ),

which is linear in z, so that its highest value in the cell is at a corner.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_NO_MORE = -80.0  # log share of the largest term, below the last digit of any sum
_NEGLIGIBLE = -45.0  # log of what a node may add to the largest term: e^-45 of some thousand nodes is below rounding
_CELL = 3.0  # side of a cell, in units of z
_MARGIN = 20.0  # of cells around the nodes, in the same units
_MOST_PAIRS = 10**8  # of cells and nodes: some ten seconds, once
_CELL_ROWS = 256  # latents at once whose cells have about as many nodes


class Block(NamedTuple):
    """Some of the latents, and the nodes that they are held against."""

    latents: Tensor | slice
    x: Tensor
    """(M,), or (rows, M) where each latent has its own."""
    y: Tensor
    log_weight: Tensor


class Nodes(NamedTuple):
    """Rows of nodes, each (R, M)."""

    x: Tensor
    y: Tensor
    log_weight: Tensor

    def to(self, like: Tensor) -> Self:
        """In the precision and on the device of `like`."""
        return self._replace(**{name: value.to(like) for name, value in self._asdict().items()})

    def blocks(self, latents: int, row: Tensor | None = None) -> Iterator[Block]:
        """Every latent against all nodes, or against those of its row (N,)."""
        flat = [values.flatten() for values in self]
        width = self.x.numel() if row is None else self.x.shape[1]
        # A block stays in the CPU's cache; elsewhere it only has to be large, and to fit.
        rows = max(1, (2**17 if self.x.device.type == "cpu" else 2**24) // width)
        for start in range(0, latents, rows):
            some = slice(start, start + rows)
            yield Block(some, *(flat if row is None else [values[row[some]] for values in self]))


def _cells(nodes: Nodes) -> tuple[float, int]:
    """How far from 0 the cells around some nodes reach, and how many of them make up a side."""
    extent = float(torch.maximum(nodes.x.abs(), nodes.y.abs()).max()) + _MARGIN
    return extent, math.ceil(2 * extent / _CELL)


class Neighbourhoods:
    """For each cell of the plane around some nodes those that count there.

    Args:
        nodes: in float64.
        like: precision and device of what is kept.
    """

    @staticmethod
    def affordable(nodes: Nodes) -> bool:
        """Whether the table takes seconds at most: it holds every cell against every node, and both grow."""
        return _cells(nodes)[1] ** 2 * nodes.x.numel() <= _MOST_PAIRS

    def __init__(self, nodes: Nodes, like: Tensor) -> None:
        x, y, log_weight = (values.flatten() for values in nodes)
        extent, count = _cells(nodes)
        self.count: int = count
        self.side: float = 2 * extent / self.count
        self.extent = extent
        centre = (torch.arange(self.count, dtype=x.dtype) + 0.5) * self.side - extent
        kept = [
            self._counting(part, x, y, log_weight) for part in torch.cartesian_prod(centre, centre).split(self.count)
        ]
        index = nn.utils.rnn.pad_sequence([rows for part in kept for rows in part], True, padding_value=len(x))
        padded = [
            nn.functional.pad(values, (0, 1), value=filler)[index]
            for values, filler in ((x, 0.0), (y, 0.0), (log_weight, -math.inf))
        ]
        self.near: Nodes = Nodes(*padded).to(like)
        self.all: Nodes = nodes.to(like)
        self.sizes: Tensor = (index < len(x)).sum(-1)

    def _counting(self, centres: Tensor, x: Tensor, y: Tensor, log_weight: Tensor) -> list[Tensor]:
        """For each of the cells' centres (N, 2) the nodes that count there."""
        terms = log_weight - (centres[:, :1] - x).square() - (centres[:, 1:] - y).square()
        height, best = terms.max(1, keepdim=True)
        rise = self.side * ((x - x[best]).abs() + (y - y[best]).abs())
        return [row.nonzero()[:, 0] for row in terms - height + rise > _NEGLIGIBLE]

    def blocks(self, z: Tensor) -> Iterator[Block]:
        """Latents (N, 2) that lie outside of all cells against all nodes, the others against those of their cell."""
        place = ((z + self.extent) / self.side).floor()
        inside = ((place >= 0) & (place < self.count)).all(-1)
        cell = torch.where(inside, place[:, 0] * self.count + place[:, 1], 0).long()
        order = torch.where(inside, self.sizes[cell], 0).argsort()
        outside = len(z) - int(inside.sum())
        for block in self.all.blocks(outside):
            yield block._replace(latents=order[:outside][block.latents])
        for start in range(outside, len(z), _CELL_ROWS):
            some = order[start : start + _CELL_ROWS]
            cells = cell[some]
            most = int(self.sizes[cells[-1]])
            yield Block(some, *(values[:, :most][cells] for values in self.near))


def log_sum_exp_(terms: Tensor, largest: Tensor) -> Tensor:
    """log Σ_j exp( terms_j ), (*,), of terms (*, N) whose largest (*,) is known; the terms are overwritten.

    On a CPU exp takes many times as long where its result is too small for the type, so none is asked for.
    """
    terms -= largest.clamp_min(torch.finfo(terms.dtype).min)[..., None]
    return terms.clamp_(min=_NO_MORE).exp_().sum(-1).log() + largest


def log_mixture(z: Tensor, blocks: Iterator[Block]) -> Tensor:
    """log Σ_j exp( log w_j − |z − n_j|² ), (N,), of z (N, 2) over the nodes that the blocks hold each z against."""
    value: Any = _LogMixture.apply(z, blocks)
    return value


class _LogMixture(torch.autograd.Function):
    """The gradient, 2 E[n_j − z|z], falls out of the same pass, so nothing of size N × nodes is kept for backward.

    Differences are taken coordinate by coordinate: expanding the square would lose three digits in float32.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, blocks: Iterator[Block]) -> Tensor:
        value, score = z.new_empty(len(z)), torch.empty_like(z)
        for latents, x, y, log_weight in blocks:
            dx, dy = x - z[latents, :1], y - z[latents, 1:]
            terms = torch.addcmul(log_weight, dx, dx, value=-1).addcmul_(dy, dy, value=-1)
            weights = terms.softmax(-1)  # many times as fast as exp where it underflows, which is nearly everywhere
            value[latents] = terms.amax(-1) - weights.amax(-1).log()
            score[latents] = 2 * torch.stack([dx.mul_(weights).sum(-1), dy.mul_(weights).sum(-1)], -1)
        ctx.save_for_backward(score)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0].unsqueeze(-1) * ctx.saved_tensors[0], None
