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

_LOG_TWO_PI = math.log(2 * math.pi)


class DiagonalGaussian(NamedTuple):
    """N(mean, diag variance); mean (*, D), variance broadcastable to it."""

    mean: Tensor
    variance: Tensor

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """A reparameterised draw (*sample_shape, *, D)."""
        noise = torch.randn(*sample_shape, *self.mean.shape, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.variance.sqrt() * noise

    def draw(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """A reparameterised draw (*sample_shape, *, D) and its log density."""
        z = self.sample(sample_shape)
        return z, self.log_prob(z)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of z (*, D): (*,), in nats."""
        terms = (z - self.mean) ** 2 / self.variance + self.variance.log() + _LOG_TWO_PI
        return -0.5 * terms.sum(-1)

    def divergence_from(self, other: DiagonalGaussian) -> Tensor:
        """KL( other ‖ self ), (*,), in nats."""
        ratio = other.variance / self.variance
        return 0.5 * (ratio - 1 - ratio.log() + (other.mean - self.mean) ** 2 / self.variance).sum(-1)

    def mapped(self, factor: Tensor, shift: Tensor, noise: Tensor) -> Self:
        """The law of factor · z + shift + ε, ε ~ N(0, noise I); factor and noise broadcastable to (*, 1)."""
        return self._replace(mean=factor * self.mean + shift, variance=factor**2 * self.variance + noise)


class FullGaussian(NamedTuple):
    """N(mean, L Lᵀ); mean (*, D), lower triangular L (*, D, D)."""

    mean: Tensor
    factor: Tensor

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """A reparameterised draw (*sample_shape, *, D)."""
        noise = torch.randn(*sample_shape, *self.mean.shape, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + (self.factor * noise.unsqueeze(-2)).sum(-1)

    def draw(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """A reparameterised draw (*sample_shape, *, D) and its log density."""
        z = self.sample(sample_shape)
        return z, self.log_prob(z)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of z (*, D): (*,), in nats."""
        whitened = _solve(self.factor, z - self.mean)
        return -0.5 * (whitened**2 + _LOG_TWO_PI).sum(-1) - self._log_diagonal().sum(-1)

    def divergence_from(self, other: DiagonalGaussian) -> Tensor:
        """KL( other ‖ self ), (*,), in nats."""
        size = self.mean.shape[-1]
        distance = (_solve(self.factor, other.mean - self.mean) ** 2).sum(-1)
        # tr(Σ⁻¹ V) = Σ_ij (L⁻¹)_ij² V_jj, a column of L⁻¹ at a time.
        variances = other.variance.expand(self.mean.shape).unbind(-1)
        columns = torch.eye(size, dtype=self.mean.dtype, device=self.mean.device).unbind(-1)
        trace = sum((_solve(self.factor, e) ** 2).sum(-1) * v for e, v in zip(columns, variances, strict=True))
        log_ratio = 2 * self._log_diagonal().sum(-1) - other.variance.log().expand(self.mean.shape).sum(-1)
        return 0.5 * (trace + distance - size + log_ratio)

    def mapped(self, factor: Tensor, shift: Tensor, noise: Tensor) -> Self:
        """The law of factor · z + shift + ε, ε ~ N(0, noise I); factor and noise broadcastable to (*, 1)."""
        widened = _factorise(factor.unsqueeze(-1) * self.factor, noise)
        return self._replace(mean=factor * self.mean + shift, factor=widened)

    def _log_diagonal(self) -> Tensor:
        return self.factor.diagonal(dim1=-2, dim2=-1).log()


Gaussian = DiagonalGaussian | FullGaussian
AnyGaussian = TypeVar("AnyGaussian", bound=Gaussian)


def stack(gaussians: Sequence[Gaussian]) -> Gaussian:
    """Gaussians of one kind and shape along a new first axis."""
    first, second = (torch.stack(torch.broadcast_tensors(*parts)) for parts in zip(*gaussians, strict=True))
    return type(gaussians[0])(first, second)


def standard_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I), z of shape (*, D): shape (*,), in nats."""
    return -0.5 * (z**2 + _LOG_TWO_PI).sum(-1)


def _solve(factor: Tensor, value: Tensor) -> Tensor:
    """L⁻¹ value for lower triangular L (*, D, D) and value (*, D), by forward substitution."""
    solved: list[Tensor] = []
    for i in range(value.shape[-1]):
        known = sum((factor[..., i, j] * solved[j] for j in range(i)), torch.zeros_like(value[..., i]))
        solved.append((value[..., i] - known) / factor[..., i, i])
    return torch.stack(solved, -1)


def _factorise(factor: Tensor, noise: Tensor) -> Tensor:
    """The Cholesky factor of L Lᵀ + noise · I for L (*, D, D), noise broadcastable to (*, 1)."""
    size = factor.shape[-1]
    rows: list[list[Tensor]] = []
    for i in range(size):
        row: list[Tensor] = []
        for j in range(i + 1):
            entry = (factor[..., i, : j + 1] * factor[..., j, : j + 1]).sum(-1)
            entry = entry - sum((row[k] * rows[j][k] for k in range(j)), torch.zeros_like(entry)) if j < i else entry
            if i == j:
                entry = entry + noise.squeeze(-1) - sum((part**2 for part in row), torch.zeros_like(entry))
                row.append(entry.sqrt())
            else:
                row.append(entry / rows[j][j])
        rows.append(row)
    empty = torch.zeros_like(rows[0][0])
    return torch.stack([torch.stack([*row, *[empty] * (size - len(row))], -1) for row in rows], -2)
