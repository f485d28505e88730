"""The slope and the curvature of log p_θ(x | z) in z, for what looks for a posterior's peaks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from ddvi.errors import InputError
from ddvi.likelihoods import ExponentialFamily, FixedLikelihood, Likelihood


class Slope(NamedTuple):
    """Of log p(x | z) at z (*, D)."""

    gradient: Tensor
    """(*, D)."""
    information: Tensor
    """Fisher's, minus the curvature on average over x, (*, D, D)."""


@final
class LikelihoodCurvature:
    """Slope and Fisher information of an exponential family.

        ∇ log p(x | z) = Jᵀ (T(x) − E[T]),    information = Jᵀ Var(T) J,    J = ∂η/∂z

    with T(x) (F,), η (*, F) and J (F, D) for latents (*, D), in nats. J's columns are differences over short ways, so
    that all takes 1 + D decoded latents in one pass.

    Args:
        likelihood: an exponential family with moments, such as the built-in ones.
        setting: what asks for it, for the message.

    Raises:
        InputError: the likelihood is of another kind.

    Source: Osborne, Fisher's Method of Scoring, 1992.
    """

    def __init__(self, likelihood: Likelihood, setting: str) -> None:
        inner = likelihood.likelihood if isinstance(likelihood, FixedLikelihood) else likelihood
        if not isinstance(inner, ExponentialFamily) or not inner.has_moments:
            raise InputError(
                f"{setting} needs an exponential family and its moments, not {type(inner).__name__}; use {setting}=0"
            )
        self.likelihood: ExponentialFamily = inner

    def beside(self, features: Tensor, x: Tensor) -> Tensor:
        """Features (*batch_shape, features) with T(x) behind them, for x (B, *event)."""
        return behind(features, self.likelihood.statistics(x)[0])

    def at(self, z: Tensor, width: Tensor, statistics: Tensor, units: Tensor | None = None) -> Slope:
        """Where latents here are z (*, D), of the likelihood's λ z.

        Args:
            z: (*, D).
            width: of the differences, () or (1,).
            statistics: T(x), broadcastable to (*, F).
            units: λ, broadcastable to z; None is 1.
        """
        away = width * torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        every = torch.cat([z[None], z + away.view(-1, *[1] * (z.dim() - 1), z.shape[-1])])
        if units is not None:
            every = every * units.to(every)
        # All in one pass of the decoder.
        parameters, *moved = self.likelihood.natural(every).unbind()
        jacobian = (torch.stack(moved) - parameters) / width
        mean, variance = self.likelihood.moments(parameters)
        return Slope(
            torch.einsum("i...f,...f->...i", jacobian, statistics - mean),
            torch.einsum("i...f,...f,j...f->...ij", jacobian, variance, jacobian),
        )


def behind(features: Tensor, statistics: Tensor) -> Tensor:
    """Features (*batch_shape, features), and behind them statistics that broadcast to them."""
    return torch.cat([features, statistics.expand(*features.shape[:-1], -1)], -1)


def covariance_factor(precision: Tensor) -> Tensor:
    """L (*, D, D), lower triangular, with P⁻¹ = L Lᵀ; no numbers where P (*, D, D) has no root."""
    # With P = U Uᵀ, U upper triangular, L = U⁻ᵀ. Nothing waits for the device to say that it went well.
    root, failed = torch.linalg.cholesky_ex(precision.flip(-1, -2))
    upper = root.flip(-1, -2).masked_fill((failed != 0)[..., None, None], math.nan)
    unit = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    return torch.linalg.solve_triangular(upper, unit.expand_as(upper), upper=True).mT


@contextlib.contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """A module as it is outside of training, without dropout."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
