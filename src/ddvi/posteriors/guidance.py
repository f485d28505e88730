"""What the likelihood says of the latent behind a barely noised one: p(z_0 | z_1, x) near its peak."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ddvi.gaussians import FullGaussian
from ddvi.likelihoods import ExponentialFamily, Likelihood
from ddvi.posteriors.curvature import LikelihoodCurvature, at_rest, covariance_factor

_STRIDE = 0.1  # of a difference quotient, in units of s: small beside what p(z_0 | z_1) spans, large beside rounding
_REACH = 4.0  # of a Newton step, in units of s: further away p(z_0 | z_1) has hardly any mass


@final
class Guidance:
    """The last step of the exact denoiser, p(z_0 | z_1, x) ∝ p(z_0 | z_1) p_θ(x | z_0), by Laplace's approximation.

    With p(z_0 | z_1) ≈ N(c, s² I), T the statistics of x, η(z) its natural parameters and J = ∂η/∂z, a step of Newton's
    method with Fisher's information is

        z ← z + P⁻¹ ( Jᵀ (T − E[T]) + (c − z)/s² ),    P = I/s² + Jᵀ Var(T) J,

    and the approximation is N(z, P⁻¹) after some steps from c, none longer than 4 s. J's columns are differences over
    s/10, so that a step costs 1 + D decoded latents in one pass; the bound is one whatever J is.

    It is no module: the likelihood's parameters are not the posterior's. They have a gradient where the latents have.

    Args:
        likelihood: an exponential family, such as the built-in ones.
        steps: of Newton's method, at least 1.
        units: λ (D,) where the latents here are u, and the likelihood's are z = λ u.

    Raises:
        InputError: the likelihood is of another kind.

    Source: Tierney and Kadane, 1986, for Laplace's approximation; the use in a chain's last step is ours.
    """

    def __init__(self, likelihood: Likelihood, steps: int = 1, units: Tensor | None = None) -> None:
        self.curvature: LikelihoodCurvature = LikelihoodCurvature(likelihood, "guidance")
        self.steps = steps
        self.units = units

    @property
    def likelihood(self) -> ExponentialFamily:
        """What guides."""
        return self.curvature.likelihood

    def __call__(self, center: Tensor, scale: Tensor, statistics: Tensor) -> FullGaussian:
        """The approximation for c (*, B, D), s () or (1,), and T(x) broadcastable to (*, B, F)."""
        wanted = torch.is_grad_enabled() and center.requires_grad
        with torch.set_grad_enabled(wanted), at_rest(self.likelihood):
            gaussian = self._step(center, center, scale, statistics)
            for _ in range(self.steps - 1):
                gaussian = self._step(gaussian.mean, center, scale, statistics)
        return gaussian

    def _step(self, z: Tensor, center: Tensor, scale: Tensor, statistics: Tensor) -> FullGaussian:
        """One of Newton's method from z (*, B, D)."""
        precision = scale**-2
        slope = self.curvature.at(z, _STRIDE * scale, statistics, self.units)
        information = slope.information + torch.diag_embed(precision.expand(z.shape))
        uphill = slope.gradient + precision * (center - z)
        factor = covariance_factor(information)
        way = (factor @ (factor.mT @ uphill.unsqueeze(-1))).squeeze(-1)
        # Where pixels are wrong and saturated, the slope is steep and the curvature none: Newton would go anywhere.
        length = torch.linalg.vector_norm(way, dim=-1, keepdim=True)
        z = z + way * (_REACH * scale / length.clamp_min(_REACH * scale))
        rows, columns = torch.tril_indices(z.shape[-1], z.shape[-1], device=z.device)
        return FullGaussian(z, factor[..., rows, columns])
