"""Measures that are functions of arrays alone, each exactly as defined."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddvi.mixtures import log_sum_exp_

_ROWS_AT_ONCE = 100  # of a table of distances: what stays in a processor's cache is fastest
_ENTRIES_AT_ONCE = 2_000_000  # and what bounds its memory
KERNEL_BANDWIDTHS = (0.05, 0.1, 0.3, 0.5, 0.8)
MMD_SCALES = (2, 5, 10, 20, 40, 80)
_BINS = 15  # of confidence


def latent_nll(z: Tensor, prior_draws: Tensor) -> dict[str, float]:
    """−mean over prior draws (M, D) of the log of the average of kernel density estimates fitted to latents (N, D).

    Gaussian kernels of standard deviation `KERNEL_BANDWIDTHS`, all pairs, in double precision.
    """
    z, scores = z.double(), []
    for draws in prior_draws.double().split(max(1, min(_ROWS_AT_ONCE, _ENTRIES_AT_ONCE // len(z)))):
        distances = torch.cdist(draws, z, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.amin(-1)
        each = [
            log_sum_exp_(-0.5 * (distances / bandwidth).square_(), -0.5 * (nearest / bandwidth).square())
            - z.shape[1] * math.log(bandwidth)
            for bandwidth in KERNEL_BANDWIDTHS
        ]
        scores.append(torch.stack(each).logsumexp(0))
    constant = math.log(len(KERNEL_BANDWIDTHS) * len(z)) + 0.5 * z.shape[1] * math.log(2 * math.pi)
    log_density = torch.cat(scores) - constant
    return {
        "latent_nll": -float(log_density.mean()),
        "latent_nll_standard_error": float(log_density.std(correction=0) / math.sqrt(len(log_density))),
    }


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error: Σ_bins share · |accuracy − mean confidence|, 15 equal widths (Guo et al. 2017)."""
    bin_of = (confidence * _BINS).long().clamp_max(_BINS - 1)
    size = torch.bincount(bin_of, minlength=_BINS).double()
    excess = torch.bincount(bin_of, weights=confidence.double() - right.double(), minlength=_BINS)
    return float(excess.abs().sum() / size.sum())


def maximum_mean_discrepancy(x: Tensor, y: Tensor) -> float:
    """Square root of the biased squared MMD between x (N, F) and y (M, F), kernel Σ_s exp(−‖x − y‖²/(2 s))."""

    def mean_kernel(a: Tensor, b: Tensor) -> float:
        total, norms = 0.0, b.square().sum(1)
        for part in a.split(_ROWS_AT_ONCE):
            squared = torch.addmm(norms, part, b.T, alpha=-2).add_(part.square().sum(1, keepdim=True)).clamp_min_(0)
            total += sum(float((squared * (-0.5 / scale)).exp_().sum()) for scale in MMD_SCALES)
        return total / (len(a) * len(b))

    squared = mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
    return math.sqrt(max(squared, 0.0))  # in this order what is no number stays none
