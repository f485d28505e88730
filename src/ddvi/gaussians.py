"""Densities of diagonal Gaussians given by mean and variance, summed over the last axis.

Written out because torch.distributions spends more time on bookkeeping than these few operations cost, and a diffusion
posterior evaluates them at every step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_prob(z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log N(z; mean, diag variance), all broadcastable to (*, D): shape (*,), in nats."""
    return -0.5 * ((z - mean) ** 2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)


def standard_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I), z of shape (*, D): shape (*,), in nats."""
    return -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)


def kl_divergence(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """KL( N(mean, variance) ‖ N(other_mean, other_variance) ), diagonal, shape (*,), in nats."""
    ratio = variance / other_variance
    return 0.5 * (ratio - 1 - ratio.log() + (mean - other_mean) ** 2 / other_variance).sum(-1)


def sample(mean: Tensor, variance: Tensor, shape: torch.Size | None = None) -> Tensor:
    """A reparameterised draw of the given full shape (*, D), by default that of the mean."""
    noise = torch.randn(mean.shape if shape is None else shape, dtype=mean.dtype, device=mean.device)
    return mean + variance.sqrt() * noise
