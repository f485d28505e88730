"""Gaussians with a diagonal or a full covariance, as the steps of a chain are.

Written out because torch.distributions spends more time on bookkeeping than these few operations cost, and a diffusion
posterior evaluates them at every step. Factors of full covariances are computed entry by entry, vectorised over
the batch: latents have few dimensions and batches are large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from ddvi.randomness import draw

_LOG_TWO_PI = math.log(2 * math.pi)


class DiagonalGaussian(NamedTuple):
    """N(mean, diag variance); mean (*, D), variance broadcastable to it."""

    mean: Tensor
    variance: Tensor

    def transform(self, noise: Tensor) -> Tensor:
        """Standard normal noise (*S, *, D) to draws of that shape."""
        return torch.addcmul(self.mean, self.variance.sqrt(), noise)

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """A reparameterised draw (*sample_shape, *, D)."""
        return self.transform(normal(self.mean, sample_shape))

    def draw(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """A reparameterised draw (*sample_shape, *, D) and its log density."""
        noise = normal(self.mean, sample_shape)
        return self.transform(noise), self.drawn_log_prob(noise)

    def drawn_log_prob(self, noise: Tensor) -> Tensor:
        """Log density of what `transform` makes of noise, (*S, *), in nats: exact however narrow the Gaussian is."""
        return -0.5 * (noise**2 + self.variance.log() + _LOG_TWO_PI).sum(-1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of z (*, D): (*,), in nats."""
        terms = (z - self.mean) ** 2 / self.variance + self.variance.log() + _LOG_TWO_PI
        return -0.5 * terms.sum(-1)

    def divergence_from(self, other: DiagonalGaussian) -> Tensor:
        """KL( other ‖ self ), (*,), in nats."""
        ratio = other.variance / self.variance
        return 0.5 * (ratio - 1 - ratio.log() + (other.mean - self.mean) ** 2 / self.variance).sum(-1)

    def mapped(self, factor: Tensor, shift: Tensor | None, noise: Tensor) -> Self:
        """The law of factor · z + shift + ε, ε ~ N(0, noise I); factor and noise broadcastable to (*, 1)."""
        variance = torch.addcmul(noise, factor**2, self.variance)
        return self._replace(mean=_shifted(factor, self.mean, shift), variance=variance)


class FullGaussian(NamedTuple):
    """N(mean, L Lᵀ); mean (*, D), and L's entries on and below the diagonal, row by row, (*, D (D + 1)/2)."""

    mean: Tensor
    entries: Tensor

    @property
    def factor(self) -> Tensor:
        """L, (*, D, D)."""
        none = torch.zeros_like(self.mean[..., 0])
        rows = [[*row, *[none] * (self.mean.shape[-1] - len(row))] for row in self._rows()]
        return torch.stack([torch.stack(row, -1) for row in rows], -2)

    def transform(self, noise: Tensor) -> Tensor:
        """Standard normal noise (*S, *, D) to draws of that shape."""
        along = noise.unbind(-1)
        return self.mean + torch.stack([_dot(row, along) for row in self._rows()], -1)

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """A reparameterised draw (*sample_shape, *, D)."""
        return self.transform(normal(self.mean, sample_shape))

    def draw(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """A reparameterised draw (*sample_shape, *, D) and its log density."""
        noise = normal(self.mean, sample_shape)
        return self.transform(noise), self.drawn_log_prob(noise)

    def drawn_log_prob(self, noise: Tensor) -> Tensor:
        """Log density of what `transform` makes of noise, (*S, *), in nats: exact however narrow the Gaussian is."""
        return standard_log_prob(noise) - self._log_determinant()

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of z (*, D): (*,), in nats."""
        whitened = self._solve((z - self.mean).unbind(-1))
        return -0.5 * (_dot(whitened, whitened) + len(whitened) * _LOG_TWO_PI) - self._log_determinant()

    def divergence_from(self, other: DiagonalGaussian) -> Tensor:
        """KL( other ‖ self ), (*,), in nats."""
        size = self.mean.shape[-1]
        whitened = self._solve((other.mean - self.mean).unbind(-1))
        # tr(Σ⁻¹ V) = Σ_ij (L⁻¹)_ij² V_jj, a column of L⁻¹ at a time.
        variances = other.variance.expand(self.mean.shape).unbind(-1)
        unit, none = torch.ones_like(variances[0]), torch.zeros_like(variances[0])
        columns = [self._solve([unit if i == j else none for i in range(j, size)], j) for j in range(size)]
        trace = _dot([_dot(column, column) for column in columns], variances)
        log_ratio = 2 * self._log_determinant() - other.variance.log().expand(self.mean.shape).sum(-1)
        return 0.5 * (trace + _dot(whitened, whitened) - size + log_ratio)

    def after(self, inner: FullGaussian) -> FullGaussian:
        """The law of mean + L w where w has the law `inner` (*, D)."""
        within = inner._rows()
        entries = [
            _dot(row[j:], [within[k][j] for k in range(j, len(row))]) for row in self._rows() for j in range(len(row))
        ]
        return FullGaussian(self.transform(inner.mean), torch.stack(entries, -1))

    def mapped(self, factor: Tensor, shift: Tensor | None, noise: Tensor) -> Self:
        """The law of factor · z + shift + ε, ε ~ N(0, noise I); factor and noise broadcastable to (*, 1)."""
        # Givens rotations make a triangle of [factor L, √noise I] by sums of squares alone. Cholesky's algorithm
        # subtracts them, and of a narrow slanting Gaussian less than nothing may be left in single precision.
        rows = [list(row) for row in self._replace(entries=factor * self.entries)._rows()]
        # No noise has no slope at its root, but then nothing depends on it.
        root, size = noise.squeeze(-1).clamp_min(torch.finfo(noise.dtype).tiny).sqrt(), len(rows)
        columns: list[list[Tensor]] = []
        for j in range(size):
            columns.insert(0, [root if i == j else torch.zeros_like(root) for i in range(size)])
            for column in columns:
                top, other = rows[j][j], column[j]
                length = rows[j][j] = torch.hypot(top, other)
                for i in range(j + 1, size):
                    along, across = rows[i][j], column[i]
                    rows[i][j] = (top * along + other * across) / length
                    column[i] = (top * across - other * along) / length
        entries = torch.stack([entry for row in rows for entry in row], -1)
        return self._replace(mean=_shifted(factor, self.mean, shift), entries=entries)

    def _rows(self) -> list[Sequence[Tensor]]:
        """The rows of L up to the diagonal."""
        entries = self.entries.unbind(-1)
        return [entries[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2] for i in range(self.mean.shape[-1])]

    def _solve(self, value: Sequence[Tensor], start: int = 0) -> list[Tensor]:
        """L⁻¹ of a vector whose entries before `start` are zero, from there on, by forward substitution."""
        solved: list[Tensor] = []
        for row, entry in zip(self._rows()[start:], value, strict=True):
            solved.append((entry - _dot(solved, row[start:]) if solved else entry) / row[-1])
        return solved

    def _log_determinant(self) -> Tensor:
        """log det L, (*,)."""
        diagonal = [row[-1] for row in self._rows()]
        return torch.stack(diagonal, -1).log().sum(-1)


Gaussian = DiagonalGaussian | FullGaussian
AnyGaussian = TypeVar("AnyGaussian", bound=Gaussian)


def stack(gaussians: Sequence[Gaussian]) -> Gaussian:
    """Gaussians of one kind and shape along a new first axis."""
    first, second = (torch.stack(torch.broadcast_tensors(*parts)) for parts in zip(*gaussians, strict=True))
    return type(gaussians[0])(first, second)


def packed(diagonal: Tensor, below: Tensor) -> Tensor:
    """The entries of a triangular factor, row by row, (*, D (D + 1)/2).

    Args:
        diagonal: (*, D).
        below: what is below it, row by row, (*, D (D − 1)/2).
    """
    rows = below.split(list(range(diagonal.shape[-1])), -1)
    return torch.cat([part for row in zip(rows, diagonal.split(1, -1), strict=True) for part in row], -1)


def standard_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I), z of shape (*, D): shape (*,), in nats."""
    return -0.5 * (z**2 + _LOG_TWO_PI).sum(-1)


def normal(like: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal noise (*sample_shape, *like.shape) for latents (*, B, D)."""
    return draw(torch.randn, (*sample_shape, *like.shape), -2, dtype=like.dtype, device=like.device)


def _shifted(factor: Tensor, value: Tensor, shift: Tensor | None) -> Tensor:
    """factor · value + shift."""
    return factor * value if shift is None else torch.addcmul(shift, factor, value)


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Σ_i left_i right_i, as far as the shorter goes."""
    total = left[0] * right[0]
    for a, b in zip(left[1:], right[1:], strict=False):
        total = torch.addcmul(total, a, b)
    return total
