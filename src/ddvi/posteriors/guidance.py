"""What the likelihood says of the latent behind a barely noised one: p(z_0 | z_1, x) near its peak."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor, nn

from ddvi.errors import InputError
from ddvi.gaussians import FullGaussian
from ddvi.likelihoods import ExponentialFamily, FixedLikelihood, Likelihood

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
        inner = likelihood.likelihood if isinstance(likelihood, FixedLikelihood) else likelihood
        if not isinstance(inner, ExponentialFamily) or type(inner).moments is ExponentialFamily.moments:
            raise InputError(
                f"guidance needs an exponential family and its moments, not {type(inner).__name__}; use guidance=0"
            )
        self.likelihood: ExponentialFamily = inner
        self.steps = steps
        self.units = units

    def statistics(self, x: Tensor) -> Tensor:
        """T(x) of x (B, *event): (B, F)."""
        return self.likelihood.statistics(x)[0]

    def __call__(self, center: Tensor, scale: Tensor, statistics: Tensor) -> FullGaussian:
        """The approximation for c (*, B, D), s broadcastable to it, and T(x) broadcastable to (*, B, F)."""
        wanted = torch.is_grad_enabled() and center.requires_grad
        with torch.set_grad_enabled(wanted), _at_rest(self.likelihood):
            gaussian = self._step(center, center, scale, statistics)
            for _ in range(self.steps - 1):
                gaussian = self._step(gaussian.mean, center, scale, statistics)
        return gaussian

    def _step(self, z: Tensor, center: Tensor, scale: Tensor, statistics: Tensor) -> FullGaussian:
        """One of Newton's method from z (*, B, D)."""
        precision = scale**-2
        parameters, jacobian = self._linearised(z, _STRIDE * scale)
        mean, variance = self.likelihood.moments(parameters)
        information = torch.einsum("i...f,...f,j...f->...ij", jacobian, variance, jacobian)
        information = information + torch.diag_embed(precision.expand(z.shape))
        uphill = torch.einsum("i...f,...f->...i", jacobian, statistics - mean) + precision * (center - z)
        # With P = U Uᵀ, U upper triangular: P⁻¹ = L Lᵀ, L = U⁻ᵀ.
        upper = torch.linalg.cholesky(information.flip(-1, -2)).flip(-1, -2)
        factor = torch.linalg.inv(upper).mT
        way = (factor @ (factor.mT @ uphill.unsqueeze(-1))).squeeze(-1)
        # Where pixels are wrong and saturated, the slope is steep and the curvature none: Newton would go anywhere.
        length = torch.linalg.vector_norm(way, dim=-1, keepdim=True)
        z = z + way * (_REACH * scale / length.clamp_min(_REACH * scale))
        rows, columns = torch.tril_indices(z.shape[-1], z.shape[-1], device=z.device)
        return FullGaussian(z, factor[..., rows, columns])

    def _linearised(self, z: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """η (*, F) at z (*, D), and its Jacobian (D, *, F) from there over steps of a width."""
        away = width * torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        moved = z + away.view(-1, *[1] * (z.dim() - 1), z.shape[-1])
        every = torch.cat([z[None], moved])
        if self.units is not None:
            every = every * self.units.to(every)
        # All in one pass of the decoder.
        parameters = self.likelihood.natural(every)
        return parameters[0], (parameters[1:] - parameters[0]) / width


@contextlib.contextmanager
def _at_rest(module: nn.Module) -> Iterator[None]:
    """A module as it is outside of training, without dropout."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
