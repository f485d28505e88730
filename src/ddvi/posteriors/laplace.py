"""Any posterior in coordinates of Laplace's approximation of p(z | x), found anew for each x.

    log p(x, z) ≈ const − ½ |L⁻¹ (z − m)|²  near a peak m(x),    z = m + L u,    (u, a) ~ q(u, a | x)

An encoder can't say of every x where the peak is and how it slants: with many latents that is most of what an amortised
posterior loses (`benchmarks/amortisation.py`). Newton's method can, from where an encoder has it begin. In u the
posterior is a standard Gaussian, as far as the approximation holds, and the base learns what is missing.

Sources: Tierney and Kadane, 1986, for Laplace's approximation; Park, Kim and Kim, Variational Laplace Autoencoders,
2019, for Newton steps from an encoder's guess. The two climbs, and what the guess learns from, are this project's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, final

import torch
from torch import Tensor

from ddvi.errors import InputError, is_whole
from ddvi.likelihoods import Likelihood
from ddvi.networks import Linear
from ddvi.posteriors.affine import AffineConditional, AffinePosterior, times
from ddvi.posteriors.base import ROWS_AT_ONCE, Posterior
from ddvi.posteriors.curvature import LikelihoodCurvature, at_rest, behind, covariance_factor
from ddvi.posteriors.diffusion import check_own_latents
from ddvi.posteriors.gaussian import begin_at
from ddvi.priors import Prior
from ddvi.priors.base import moments

_STRIDE = 0.01  # of differences, in units of the prior's spread: small beside its finest parts, large beside rounding
_REACH = 2.0  # of a Newton step in these units
_DAMPING = 10.0  # of the first step after one that went down
_FARTHEST = 5.0  # from the prior's mean, in each direction, that a climb begins


class _Place(NamedTuple):
    """What is known of a log density at v (N, D)."""

    height: Tensor
    """Up to a constant, (N,)."""
    gradient: Tensor
    """(N, D)."""
    precision: Tensor
    """Minus the curvature, as far as it is positive, (N, D, D)."""


def _chosen(better: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Of two tensors (N, …) the first where `better` (N,)."""
    return torch.where(better.view(-1, *[1] * (one.dim() - 1)), one, other)


@final
class Laplace:
    """Laplace's approximation N(m, L Lᵀ) of p(z | x) ∝ p(z) p_θ(x | z), by Newton's method.

    In units v of the prior's mean and spread, with T the statistics of x, η its natural parameters and J = ∂η/∂v, a
    step is

        v ← v + P⁻¹ ∇ log p(x, v),    P = Jᵀ Var(T) J + I + [ −∇² log p(v) − I ]₊

    where [·]₊ leaves out directions of negative eigenvalues. Some steps begin with a standard Gaussian for the prior,
    past the walls of a structured one, and as many go on with the prior itself. J is that of where these and those
    begin, which takes 1 + D decoded latents. A step that would lead down isn't taken, and the next is shorter. None is
    differentiated.

    It is no module: the likelihood's and the prior's parameters are not the posterior's.

    Args:
        likelihood: an exponential family, such as the built-in ones.
        prior: p(z).
        steps: of either climb, at least 1.

    Raises:
        InputError: the likelihood is of another kind.
    """

    def __init__(self, likelihood: Likelihood, prior: Prior, steps: int) -> None:
        self.curvature: LikelihoodCurvature = LikelihoodCurvature(likelihood, "laplace")
        self.prior: Prior = prior
        self.steps = steps

    def __call__(self, start: Tensor, statistics: Tensor, center: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """m (*, D) and L (*, D, D) in units of the prior.

        Args:
            start: where the first climb begins, (*, D), in these units.
            statistics: T(x), (*, F).
            center: the prior's mean (D,).
            spread: its standard deviations (D,).
        """
        # Slopes are wanted where the caller wants none, and differences are of what sixteen bits leave nothing of.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(start.device.type, enabled=False),
            at_rest(self.curvature.likelihood),
        ):
            dtype = torch.promote_types(start.dtype, torch.float32)
            start, statistics = start.to(dtype, copy=True), statistics.to(dtype, copy=True)
            return self._found(start, statistics, center, spread)

    def _found(self, start: Tensor, statistics: Tensor, center: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """In portions."""
        size = start.shape[-1]
        rows = max(1, ROWS_AT_ONCE // (1 + size))
        parts = zip(start.reshape(-1, size).split(rows), statistics.flatten(0, -2).split(rows), strict=True)
        found = [self._peak(v, known, center, spread) for v, known in parts]
        mean, precision = map(torch.cat, zip(*found, strict=True))
        return mean.view(start.shape), covariance_factor(precision).view(*start.shape, size)

    def _peak(self, v: Tensor, statistics: Tensor, center: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """The peak near v (N, D), and P there."""
        likelihood, width = self.curvature.likelihood, v.new_tensor(_STRIDE)

        def fit(v: Tensor) -> Tensor:
            parameters = likelihood.natural(center + spread * v)
            return (statistics * parameters).sum(-1) - likelihood.log_partition(parameters)

        precision = v
        for prior in (_standard, partial(self._believed, center, spread)):
            information = self.curvature.at(v + center / spread, width, statistics, spread).information
            v, precision = self._climb(v, partial(_looked, fit, information, prior))
        return v, precision

    def _climb(self, v: Tensor, look: Callable[[Tensor], _Place]) -> tuple[Tensor, Tensor]:
        """Where some steps lead from v (N, D), and P there."""
        here, damping = look(v), v.new_zeros(len(v))
        for _ in range(self.steps):
            factor = covariance_factor(here.precision + torch.diag_embed(damping[:, None].expand(v.shape)))
            way = times(factor, times(factor.mT, here.gradient))
            length = torch.linalg.vector_norm(way, dim=-1, keepdim=True)
            step = v + way * (_REACH / length.clamp_min(_REACH))
            there = look(step)
            better = there.height > here.height
            v = _chosen(better, step, v)
            here = _Place(*(_chosen(better, its, mine) for its, mine in zip(there, here, strict=True)))
            damping = torch.where(better, damping / 4, 4 * damping + _DAMPING)
        return v, here.precision

    def _believed(self, center: Tensor, spread: Tensor, v: Tensor) -> _Place:
        """The prior at v (N, D): its curvature is that of differences of its gradient."""
        away = _STRIDE * torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
        every = torch.cat([v[None], v + away.unsqueeze(1)])
        height, gradient = _differentiated(lambda every: self.prior.log_prob(center + spread * every), every)
        curvature = ((gradient[0] - gradient[1:]) / _STRIDE).movedim(0, -2)
        curvature = 0.5 * (curvature + curvature.mT)
        # Of no numbers there are no eigenvalues, but an error; they are seen elsewhere.
        values, directions = torch.linalg.eigh(curvature.nan_to_num(0.0, 0.0, 0.0))
        return _Place(height[0], gradient[0], (directions * values.clamp_min(1.0).unsqueeze(-2)) @ directions.mT)


def _differentiated(function: Callable[[Tensor], Tensor], v: Tensor) -> tuple[Tensor, Tensor]:
    """A function's values (*) at v (*, D), and its gradient there."""
    with torch.enable_grad():
        v = v.detach().requires_grad_()
        values = function(v)
        (gradient,) = torch.autograd.grad(values.sum(), v)
    return values.detach(), gradient


def _looked(
    fit: Callable[[Tensor], Tensor], information: Tensor, prior: Callable[[Tensor], _Place], v: Tensor
) -> _Place:
    """log p(x, v) at v (N, D), of a likelihood whose information is known already."""
    belief = prior(v)
    height, gradient = _differentiated(fit, v)
    return _Place(height + belief.height, gradient + belief.gradient, information + belief.precision)


def _standard(v: Tensor) -> _Place:
    """A standard Gaussian at v (N, D)."""
    unit = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    return _Place(-0.5 * v.square().sum(-1), -v, unit.expand(*v.shape, -1))


@final
class _LaplaceCoordinates(NamedTuple):
    """z = mean + factor u, mean (*batch_shape, D), factor (*batch_shape, D, D) lower triangular."""

    mean: Tensor
    factor: Tensor
    lesson: Tensor

    def outward(self, u: Tensor) -> Tensor:
        return self.mean + times(self.factor, u)

    def inward(self, z: Tensor) -> Tensor:
        return times(self.factor, z - self.mean, _solved)

    @property
    def log_volume(self) -> Tensor:
        return self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _solved(factor: Tensor, columns: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, columns, upper=False)


@final
class LaplacePosterior(AffinePosterior):
    """Another posterior in coordinates of Laplace's approximation of p(z | x).

        (u, a) ~ q(u, a | x),    z = m + L u,    log_ratio(z, a) = log_ratio(u, a) − log det L

    m and L are found anew for each x by `Laplace`, from a guess v_0(x) of the base's encoder; labels share them. At
    initialisation u is standard Gaussian, where the base is a Gaussian or a chain, and z Laplace's approximation.
    As m and L aren't differentiated, no bound teaches v_0. It learns where Newton's method ends: beside any score of a
    draw and any bound of a z there is D (√(1 + |L⁻¹(v_0 − m)|²/D) − 1) to be learnt from, with value 0. Alone the
    log-variance loss, whose draws are held fixed, teaches no v_0. Paths
    (1 + auxiliaries, *sample_shape, B, D) lie in the space of z.

    Args:
        base: the other posterior, which begins anew; what it knows of latents is in these coordinates.
        likelihood: an exponential family, such as the built-in ones; it is not the posterior's to train.
        prior: p(z). Its mean and spread are estimated once, by 10,000 draws, and kept with the weights.
        steps: of Newton's method for either climb, at least 1. Beside them, either decodes 1 + D latents.

    Raises:
        InputError: the likelihood is of another kind; the base has no density, settings that speak of z, or another
            size than the prior; the prior can't be differentiated; steps are no whole number from 1 on; it is warmed
            up.

    Sources: Tierney and Kadane, 1986; Park, Kim and Kim, 2019.

    Example:
        >>> likelihood = ddvi.BernoulliLikelihood(torch.nn.Linear(3, 6), torch.Size([6]))
        >>> base = ddvi.DiffusionPosterior(torch.nn.Linear(6, 8), latent_size=3, steps=4)
        >>> posterior = LaplacePosterior(base, likelihood, ddvi.Pinwheel(latent_size=3))
        >>> posterior(torch.ones(5, 6)).draw((10,)).path.shape
        torch.Size([5, 10, 5, 3])
    """

    center: Tensor
    spread: Tensor

    def __init__(self, base: Posterior, likelihood: Likelihood, prior: Prior, steps: int = 3) -> None:
        super().__init__(base)
        if not is_whole(steps) or steps < 1:
            raise InputError(f"Laplace's approximation takes at least 1 step, not {steps}; give a whole number")
        if not base.has_density:
            raise InputError(f"{type(base).__name__} has no density, which coordinates need; take another base")
        if prior.event_shape != (base.latent_size,):
            raise InputError(
                f"the prior has {prior.event_shape[0]} latents, the base {base.latent_size}; give them one size"
            )
        check_own_latents(base, "the coordinates are those of Laplace's approximation")
        self.laplace: Laplace = Laplace(likelihood, prior, steps)
        center, spread = moments(prior)
        try:
            _differentiated(prior.log_prob, center[None])
        except RuntimeError:
            raise InputError("laplace needs a prior whose log_prob can be differentiated; use laplace=0") from None
        self.register_buffer("center", center)
        self.register_buffer("spread", spread)
        begin_at(base)
        self.guess: Linear = Linear(base.features, base.latent_size)

    def encode(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        features = super().encode(x)
        guess = self.guess(features)
        statistics = self.laplace.curvature.likelihood.statistics(x)[0]
        # From far outside of the prior no peak is in reach, whatever has happened to the guess.
        start = guess.detach().clamp(-_FARTHEST, _FARTHEST)
        mean, factor = self.laplace(start, statistics, self.center, self.spread)
        # Found once, and behind the features from here on.
        found = behind(features, torch.cat([guess, mean, factor.flatten(-2)], -1))
        return found if label is None else self.with_label(found, label)

    def with_label(self, features: Tensor, label: Tensor) -> Tensor:
        return behind(super().with_label(self.inner(features), label), features[..., self.features :])

    def inner(self, features: Tensor) -> Tensor:
        return features[..., : self.features]

    def without_context(self, features: Tensor) -> AffineConditional:
        raise InputError("warm-up denoises the prior of z, but the coordinates are those of p(z | x); use warmup=0")

    def coordinates(self, features: Tensor) -> _LaplaceCoordinates:
        size = self.latent_size
        guess, mean, entries = features[..., self.features :].split([size, size, size**2], -1)
        factor = entries.unflatten(-1, (size, size))
        away = times(factor, guess - mean, _solved).square().sum(-1)
        # Few guesses that are far off must not be all that the encoder learns from.
        lesson = size * ((1 + away / size).sqrt() - 1)
        return _LaplaceCoordinates(
            self.center + self.spread * mean, self.spread.unsqueeze(-1) * factor, lesson - lesson.detach()
        )
