"""Noise schedules and the noising process r.

The auxiliary variables of a diffusion posterior are noised copies z_1 … z_T of the latent variable z = z_0, made by a
Markov chain that the user fixes:

    r(z_t | z_{t-1}) = N( (α_t/α_{t-1}) z_{t-1}, (1 − α_t²/α_{t-1}²) I ),    α_0 = 1,  α_t² + σ_t² = 1.

Its marginals and, by Bayes' rule, its steps back are Gaussian too:

    r(z_t | z_0)          = N( α_t z_0, σ_t² I )
    r(z_{t-1} | z_t, z_0) = N( w0_t z_0 + wt_t z_t, v_t I ),    t ≥ 2.

A learned process has its log signal-to-noise ratios as parameters, falling from level to level by positive steps.

Source: Ho et al., Denoising Diffusion Probabilistic Models, 2020, equations 2 to 7; Kingma et al., Variational
Diffusion Models, 2021, section 2, for schedules in terms of the signal-to-noise ratio, and learnt ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddvi.catalogue import NOISE_SCHEDULES
from ddvi.errors import InputError, check_name
from ddvi.gaussians import AnyGaussian, DiagonalGaussian, normal


def log_snr_schedule(steps: int) -> Tensor:
    """α_t² with log(α_t²/σ_t²) falling linearly from 8 at t = 1 to −4 at t = T, shape (T,)."""
    start, stop = (8.0, -4.0) if steps > 1 else (-4.0, -4.0)
    return torch.sigmoid(torch.linspace(start, stop, steps, dtype=torch.float64))


def cosine_schedule(steps: int) -> Tensor:
    """α_t² = cos²(π/2 · t/(T + 1)), shape (T,) (after Nichol & Dhariwal 2021, equation 17)."""
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    return torch.cos(0.5 * math.pi * t / (steps + 1)) ** 2


def linear_beta_schedule(steps: int) -> Tensor:
    """α_t² = Π_s (1 − β_s), β linear from 1e-4 to 0.02, shape (T,) (Ho et al. 2020; the schedule of the DDVI paper)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), dim=0)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "log_snr": log_snr_schedule,
    "cosine": cosine_schedule,
    "linear_beta": linear_beta_schedule,
    "learned": log_snr_schedule,
}
"""α_t² of each; of the learned one what it starts from."""


def point(z: Tensor) -> DiagonalGaussian:
    """The law of a known z (*, D): no variance."""
    return DiagonalGaussian(z, torch.zeros_like(z))


class Levels(NamedTuple):
    """The chain's constants at some levels t, each broadcastable to latents (*, D)."""

    alpha: Tensor
    sigma: Tensor
    weight_start: Tensor
    """w0_t."""
    weight_current: Tensor
    """wt_t."""
    step_variance: Tensor
    """v_t."""


def _constants(alpha_squared: Tensor, sigma_squared: Tensor) -> Levels:
    """Of a chain with α_1² … α_T² and σ_1² … σ_T², each constant of shape (T + 1,), indexed by t."""
    alpha_squared = torch.cat([torch.ones_like(alpha_squared[:1]), alpha_squared])
    sigma_squared = torch.cat([torch.zeros_like(sigma_squared[:1]), sigma_squared])
    # Of the step from t − 1 to t; entry 0 is never used and entry 1 of the steps back stands for z_0 itself.
    ratio_squared = torch.cat([torch.ones_like(alpha_squared[:1]), alpha_squared[1:] / alpha_squared[:-1]])
    previous_sigma_squared = torch.cat([sigma_squared[:1], sigma_squared[:-1]])
    previous_alpha_squared = torch.cat([alpha_squared[:1], alpha_squared[:-1]])
    noise = (sigma_squared - previous_sigma_squared) / previous_alpha_squared
    # σ_0 = 0: its root and what is divided by it would have no gradient.
    safe = torch.cat([torch.ones_like(sigma_squared[:1]), sigma_squared[1:]])
    return Levels(
        alpha_squared.sqrt(),
        torch.cat([sigma_squared[:1], safe[1:].sqrt()]),
        previous_alpha_squared.sqrt() * noise / safe,
        ratio_squared.sqrt() * previous_sigma_squared / safe,
        previous_sigma_squared * noise / safe,
    )


class NoisingProcess(nn.Module):
    """The chain r of T steps.

        r(z_t | z_0) = N( α_t z_0, σ_t² I ),    r(z_{t-1} | z_t, z_0) = N( w0_t z_0 + wt_t z_t, v_t I )

    Constants are of shape (T + 1,), indexed by t; latents of shape (*, D).

    Args:
        steps: T.
        schedule: a name from `ddvi.catalogue.NOISE_SCHEDULES`.

    Raises:
        InputError: fewer than one step, or an unknown schedule.

    Sources: Ho et al., 2020; Kingma et al., Variational Diffusion Models, 2021.

    Example:
        >>> noise = NoisingProcess(steps=4)
        >>> noise.path(torch.zeros(3, 2)).shape
        torch.Size([5, 3, 2])
        >>> alpha, sigma, *_ = noise.constants()
        >>> bool(((alpha**2 + sigma**2 - 1).abs() < 1e-6).all())
        True
    """

    def __init__(self, steps: int, schedule: str = "log_snr") -> None:
        super().__init__()
        if steps < 1:
            raise InputError(f"a noising process has at least 1 step, not {steps}")
        alpha_squared = SCHEDULES[check_name("noise schedule", schedule, NOISE_SCHEDULES)](steps)
        self.steps = steps
        self.log_snr: nn.ParameterList | None = None
        """Of a learned process: log(α_1²/σ_1²), and the logs of how much each level falls below the one before."""
        if schedule == "learned":
            log_snr = torch.logit(alpha_squared).to(torch.get_default_dtype())
            self.log_snr = nn.ParameterList([log_snr[:1], (-log_snr.diff()).log()])
            self._constants: dict[str, Tensor] = {}
            return
        # Kept in double precision beside the buffers, so that a cast to float64 gets digits and not padded float32.
        self._constants = _constants(alpha_squared, 1 - alpha_squared)._asdict()
        for name, value in self._constants.items():
            self.register_buffer(name, value.to(torch.get_default_dtype()), persistent=False)

    def constants(self) -> Levels:
        """Every constant, (T + 1,), indexed by t; those of a learned process have a gradient."""
        if self.log_snr is None:
            return Levels(*(getattr(self, name) for name in Levels._fields))
        first, falls = self.log_snr
        log_snr = torch.cat([first, first - falls.exp().cumsum(0)])
        return _constants(torch.sigmoid(log_snr), torch.sigmoid(-log_snr))  # 1 − α² would lose the digits of a small σ²

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoisingProcess:
        super()._apply(fn, recurse)
        for name, value in self._constants.items():
            setattr(self, name, value.to(getattr(self, name)))
        return self

    def at(self, t: Tensor | slice | int, axes: int = 0) -> Levels:
        """The constants at levels t (*), each (*, 1); at a slice of levels with so many axes behind it, (·, 1 …, 1)."""
        shape = (-1, *[1] * (axes + 1)) if isinstance(t, slice) else (*t.shape, 1) if isinstance(t, Tensor) else (1,)
        return Levels(*(value[t].view(shape) for value in self.constants()))

    def marginal(self, start: DiagonalGaussian, t: Levels) -> DiagonalGaussian:
        """The law of z_t where z_0 has the law `start` (*, D)."""
        return start.mapped(t.alpha, None, t.sigma**2)

    def step_back(self, start: AnyGaussian, z_t: Tensor, t: Levels) -> AnyGaussian:
        """The law of z_{t-1} given z_t (*, D) where z_0 given z_t has the law `start`; at t = 1 that law itself.

        With `point(z_0)` it is r(z_{t-1} | z_t, z_0).
        """
        return start.mapped(t.weight_start, t.weight_current * z_t, t.step_variance)

    def log_prob(self, path: Tensor) -> Tensor:
        """log r(z_1:T | z_0) = log r(z_T | z_0) + Σ_{t ≥ 2} log r(z_{t-1} | z_t, z_0) of a path (T + 1, *, D): (*,)."""
        z, later = point(path[0]), self.at(slice(2, self.steps + 1), path.dim() - 2)
        value = self.marginal(z, self.at(self.steps)).log_prob(path[-1])
        return value + self.step_back(z, path[2:], later).log_prob(path[1:-1]).sum(0)

    def path(self, z: Tensor) -> Tensor:
        """One draw of (z_0, z_1 … z_T) from r given z_0 = z of shape (*, D): shape (T + 1, *, D)."""
        path, alpha = [z], self.constants().alpha
        for t in range(1, self.steps + 1):
            ratio = alpha[t] / alpha[t - 1]
            path.append(ratio * path[-1] + (1 - ratio**2).clamp_min(0).sqrt() * normal(z))
        return torch.stack(path)
