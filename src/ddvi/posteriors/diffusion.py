"""The diffusion posterior of denoising diffusion variational inference.

The auxiliary variables are noised latents z_1 … z_T, and r is the noising process, fixed (`ddvi.noise`). The posterior
starts from a Gaussian and denoises:

    z_T ~ q(z_T | x) = N( α_T m, α_T² s² + σ_T² ),    z_{t-1} ~ q(z_{t-1} | z_t, x),    t = T … 1.

Each step predicts z_0 given z_t as N(ẑ, ŝ²) and pushes the prediction through the noising process's own step back:

    q(z_{t-1} | z_t, x) = N( w0_t ẑ + wt_t z_t,  v_t + w0_t² ŝ² ),    at t = 1: N(ẑ, ŝ²).

The prediction is anchored: with Gaussian m(x), s(x) from the encoder, the exact denoiser of N(m, s²) is

    N( (σ_t² m + α_t s² z_t)/c_t,  s² σ_t²/c_t ),    c_t = α_t² s² + σ_t²,

and a network corrects its mean, in units of its standard deviation, and its log variance. With the corrections at zero
the chain is the Gaussian posterior N(m, s²) exactly and the bound loses nothing to the chain, so that diffusion starts
as the variational autoencoder and refines it.

Source: Piriyakulkij, Wang, Kuleshov, Denoising Diffusion Variational Inference, AAAI 2025. Learned variances, the
anchor and the prior's own denoiser are ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, Self, final

import torch
from torch import Tensor, nn

from ddvi.errors import InputError, check_name
from ddvi.fusing import fusible
from ddvi.gaussians import DiagonalGaussian, FullGaussian, Gaussian, normal, packed, stack
from ddvi.networks import Denoiser
from ddvi.noise import Levels, NoisingProcess, point
from ddvi.posteriors.base import VARIANCE_FLOOR, Conditional, Draw, Posterior
from ddvi.posteriors.curvature import behind
from ddvi.posteriors.gaussian import GaussianHead
from ddvi.posteriors.guidance import Guidance
from ddvi.posteriors.linked import Linked
from ddvi.posteriors.prior_denoiser import PriorDenoiser, Tables
from ddvi.priors import Prior
from ddvi.randomness import draw

_LARGEST_LOG_FACTOR = 6.0  # of a variance against its anchor: e^±6 either way
_LARGEST_COUPLING = 20.0  # e³, as far as a standard deviation may go: single precision follows no narrower slant
_ROWS_AT_ONCE = 2560  # draws × levels that a CPU differentiates together: what stays in its cache is fastest
_ROWS_AT_ONCE_ELSEWHERE = 2**17
_JACOBIANS_UP_TO = 4  # latent dimensions: a pass for each of them is cheaper than T small ones


class _Steps(NamedTuple):
    """What the steps at some levels know before they see z_t, each broadcastable to latents (*, D).

    The exact denoiser of the anchor is N( gain z_t + offset, scale² ), and rate z_t + shift is z_t in units of its own
    spread.
    """

    t: Tensor | int | slice
    """The levels, broadcastable to (*), or a slice of them where z_t are stacked in front."""
    gain: Tensor
    offset: Tensor
    scale: Tensor
    rate: Tensor
    shift: Tensor
    levels: Levels
    biases: tuple[Tensor, ...]
    """The denoiser's, broadcastable to (*, denoiser_size)."""
    tables: Tables | None
    """The prior's denoiser."""

    @classmethod
    def of(cls, posterior: DiffusionPosterior, anchor: DiagonalGaussian, t: Tensor | slice, axes: int) -> Self:
        """At levels t of latents with so many axes between the levels' own and D."""
        levels, biases = posterior.noise.at(t, axes), posterior.denoiser.biases(t)
        if isinstance(t, slice):
            biases = [bias.view(len(bias), *[1] * axes, -1) for bias in biases]
        alpha, sigma = levels.alpha, levels.sigma
        total = alpha**2 * anchor.variance + sigma**2
        rate = total.rsqrt()
        gain = alpha * anchor.variance / total
        offset = sigma**2 / total * anchor.mean
        scale, shift = anchor.variance.sqrt() * sigma * rate, -alpha * rate * anchor.mean
        tables = None if posterior.prior_denoiser is None else posterior.prior_denoiser.at(t)
        return cls(t, gain, offset, scale, rate, shift, levels, tuple(biases), tables)

    @property
    def above_first(self) -> bool:
        """Whether it is plain that t = 1 isn't among the levels."""
        return (self.t if isinstance(self.t, int) else self.t.start if isinstance(self.t, slice) else 1) > 1

    def unbind(self) -> list[Self]:
        """Level by level, where they are those of a slice."""
        assert isinstance(self.t, slice)
        affine = (self.gain, self.offset, self.scale, self.rate, self.shift)
        levels = [Levels(*each) for each in zip(*(_aligned(value).unbind() for value in self.levels), strict=True)]
        biases = zip(*(bias.flatten(0, -2).unbind() for bias in self.biases), strict=True)
        tables = [Tables(each) for each in self.tables.pictures.split(1)] if self.tables else [None] * len(levels)
        parts = (*(value.unbind() for value in affine), levels, biases, tables)
        return [type(self)(*each) for each in zip(range(self.t.start, self.t.stop), *parts, strict=True)]


def _aligned(values: Tensor) -> Tensor:
    """One value a level (T, 1 …, 1), 16 bytes from each to the next: from elsewhere compiled code copies it first."""
    return nn.functional.pad(values, (0, 3))[..., :1]


@final
class DiffusionConditional(Conditional):
    """The chain z_T → … → z_0.

    Args:
        posterior: the networks.
        start: the Gaussian (*batch_shape, D) whose noised version is q(z_T | x).
        anchor: the Gaussian whose exact denoiser the network corrects; usually the same.
        context: what the denoiser knows of x, (*batch_shape, denoiser_size).
        statistics: T(x) for the guidance of the last step, (*batch_shape, F), or None without.
    """

    def __init__(
        self,
        posterior: DiffusionPosterior,
        start: DiagonalGaussian,
        anchor: DiagonalGaussian,
        context: Tensor,
        statistics: Tensor | None = None,
    ) -> None:
        self.posterior = posterior
        self.noise: NoisingProcess = posterior.noise
        self.auxiliaries: int = posterior.noise.steps
        self.every: slice = slice(1, posterior.noise.steps + 1)
        self.last: Levels = self.noise.at(posterior.noise.steps)
        self.start: DiagonalGaussian = self.noise.marginal(start, self.last)
        self.anchor = anchor
        self.context = context
        self.statistics = statistics

    def predict(self, z_t: Tensor, t: Tensor | slice) -> Gaussian:
        """The prediction of z_0.

        Args:
            z_t: (*, *batch_shape, D).
            t: broadcastable to (*, *batch_shape), or a slice of 1 … T where the z_t of these levels are stacked.
        """
        return self.posterior.predict(z_t, self._known(t, z_t.dim() - 2), self.context, self.statistics)

    def step(self, z_t: Tensor, t: Tensor | slice) -> Gaussian:
        """q(z_{t-1} | z_t, x), shapes as in `predict`."""
        return self._law(z_t, self._known(t, z_t.dim() - 2))

    def _known(self, t: Tensor | slice, axes: int) -> _Steps:
        """What the steps at levels t know, with so many axes between the levels' own and D."""
        return _Steps.of(self.posterior, self.anchor, t, axes)

    def _law(self, z_t: Tensor, known: _Steps) -> Gaussian:
        """q(z_{t-1} | z_t, x) of z_t (*, *batch_shape, D)."""
        prediction = self.posterior.predict(z_t, known, self.context, self.statistics)
        return self.noise.step_back(prediction, z_t, known.levels)

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        ((z, _, _),) = deque(self._run(sample_shape), maxlen=1)
        return z

    def draw(self, sample_shape: tuple[int, ...] = ()) -> Draw:
        if torch.is_grad_enabled() and not self.posterior.plain_gradient:
            path, log_q, noise = self._linked(sample_shape)
        else:
            latents, laws, (noise, *noises) = zip(*self._run(sample_shape), strict=True)
            path = torch.stack(latents[::-1])
            # Scored after the chain, all steps at once.
            log_q = stack(laws[1:]).drawn_log_prob(torch.stack(noises))
        return Draw(path[0], self._drawn_log_ratio(path, log_q, noise), path)

    def _run(self, sample_shape: tuple[int, ...]) -> Iterator[tuple[Tensor, Gaussian, Tensor]]:
        """Draw z_T … z_0, one after the other, each with its law and the standard normal noise that made it."""
        law: Gaussian = self.start
        noise = normal(law.mean, sample_shape)
        z = law.transform(noise)
        yield z, law, noise
        for known in reversed(self._known(self.every, self.anchor.mean.dim() - 1).unbind()):
            noise = normal(z)
            z, *parts = self._step_from(z, noise, known)
            law = self.posterior.law(*parts)
            yield z, law, noise

    @fusible
    def _step_from(self, z_t: Tensor, noise: Tensor, known: _Steps) -> tuple[Tensor, ...]:
        """What the noise makes of z_t (*, *batch_shape, D), and the law that this was drawn from."""
        law = self._law(z_t, known)
        return law.transform(noise), *law

    @fusible
    def _scored_steps(self, z_t: Tensor, noise: Tensor, t: slice) -> tuple[Tensor, Tensor]:
        """What the noise makes of z_t at many levels, and its log density."""
        steps = self.step(z_t, t)
        return steps.transform(noise), steps.drawn_log_prob(noise)

    @fusible
    def _drawn_log_ratio(self, path: Tensor, log_q: Tensor, noise: Tensor) -> Tensor:
        """Of a path whose steps have log densities (T, …) and whose z_T was made by noise."""
        return self.start.drawn_log_prob(noise) + log_q.sum(0) - self.noise.log_prob(path)

    def _linked(self, sample_shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The path (1 + T, …, D), log q of its steps (T, …), with the gradient of the whole chain, and z_T's noise.

        The chain is drawn without gradient. Then the steps are taken again from where it went, many at once, and linked
        by the chain rule with the Jacobian of each.
        """
        with torch.no_grad():
            latents, _, noises = zip(*self._run(sample_shape), strict=True)
        latents, noises = latents[::-1], noises[::-1]
        rows = _ROWS_AT_ONCE if latents[0].device.type == "cpu" else _ROWS_AT_ONCE_ELSEWHERE
        at_once = max(1, rows // latents[0][..., 0].numel())
        parts: list[tuple[Tensor, ...]] = []
        for first in range(1, self.noise.steps + 1, at_once):
            t = slice(first, min(first + at_once, self.noise.steps + 1))
            came_from = torch.stack(latents[t]).requires_grad_()
            noise = torch.stack(noises[t.start - 1 : t.stop - 1])
            went_to, log_q = self._scored_steps(came_from, noise, t)
            outputs = [*went_to.unbind(-1), log_q]
            slopes = (torch.autograd.grad(out.sum(), came_from, retain_graph=True)[0] for out in outputs)
            parts.append((went_to, log_q, *slopes))
        went_to, log_q, *jacobian, slope = map(torch.cat, zip(*parts, strict=True))
        top = self.start.transform(noises[-1])
        linked: Any = Linked.apply(torch.cat([went_to, top[None]]), log_q, torch.stack(jacobian), slope)
        return *linked, noises[-1]

    def log_ratio(self, path: Tensor) -> Tensor:
        steps = self.step(path[1:], self.every).log_prob(path[:-1]).sum(0)
        return self.start.log_prob(path[-1]) + steps - self.noise.log_prob(path)

    def reverse_path(self, z: Tensor) -> Tensor:
        return self.noise.path(z)

    def log_bound(self, z: Tensor, levels: int | None = None) -> Tensor:
        """The bound on log q(z_0 | x) that denoising maximises:

        E_r[ log q(z_0|z_1,x) ] − Σ_{t≥2} E_r KL( r(z_{t-1}|z_t,z_0) ‖ q(z_{t-1}|z_t,x) ) − KL( r(z_T|z_0) ‖ q(z_T|x) )

        Every KL in closed form, each z_t drawn once from its marginal. With `levels` of the T terms, drawn uniformly
        per example, the sum is T/levels times theirs; the z_T term is always there.

        With plain level weights the value is the same, but means learn from Σ_t ½|ẑ − z_0|² instead.
        """
        steps = self.noise.steps
        if levels is None or levels >= steps:
            levels, t = steps, self.every
            first = self.posterior.first.view(-1, *[1] * (z.dim() - 1))
        else:
            t = draw(partial(torch.randint, 1, steps + 1), (levels, *z.shape[:-1]), -1, device=z.device)
            first = t == 1
        return self._denoising_bound(z, normal(z, (levels,)), t, first)

    @fusible
    def _denoising_bound(self, z: Tensor, noise: Tensor, t: Tensor | slice, first: Tensor) -> Tensor:
        """`log_bound` at levels t, where noise makes z_t of z; `first` is whether t = 1."""
        known, levels = point(z), len(noise)
        constants = self.noise.at(t, z.dim() - 1)
        z_t = self.noise.marginal(point(z.expand(levels, *z.shape)), constants).transform(noise)
        prediction = self.predict(z_t, t)
        error = z.new_zeros(())
        if self.posterior.plain_weights:
            error = 0.5 * (prediction.mean - z).square().sum(-1)
            prediction = prediction._replace(mean=prediction.mean.detach())
        q, r = self.noise.step_back(prediction, z_t, constants), self.noise.step_back(known, z_t, constants)
        # r(z_0|z_1,z_0) is a point: its term is the density itself. The filler keeps the unused branch finite.
        r = r._replace(variance=r.variance.masked_fill(first.unsqueeze(-1), 1.0))
        terms = torch.where(first, q.log_prob(z), -q.divergence_from(r)) - (error - error.detach())
        last = self.start.divergence_from(self.noise.marginal(known, self.last))
        return terms.sum(0) * (self.noise.steps / levels) - last


@final
class DiffusionPosterior(Posterior):
    """The diffusion posterior: a chain that starts from noise and denoises it, guided by x.

        q(z_T | x) Π_t q(z_{t-1} | z_t, x),    z_T ~ N( α_T m, α_T² s² + σ_T² )
        z_{t-1} ~ N( w0_t ẑ + wt_t z_t, v_t I + w0_t² Ŝ ),    at t = 1: N(ẑ, Ŝ)

    ẑ and Ŝ are those of the exact denoiser of N(m(x), s(x)²), corrected by a network that sees z_t, t and x. With no
    correction, as at initialisation, the chain is that Gaussian. Variances differ from the exact ones by at most e^±6,
    and couplings are at most 20 of their standard deviations. Paths are (1 + T, *sample_shape, B, D).

    Args:
        encoder: from observations (B, *event) to features (B, encoder.out_features).
        latent_size: D.
        labels: number of classes for q(z, a | x, label); 0 without labels.
        steps: T.
        noise: name of the noise schedule, see `ddvi.noise`.
        denoiser_size: width of the denoiser's layers.
        denoiser_layers: their number.
        covariance: of the steps, "diagonal" or "full"; "auto" takes full ones for up to 4 dimensions.
        prior_denoiser: a prior whose own denoiser E[z_0 | z_t] is given to the network as an input, for D = 2.
        level_weights: "bound", or "plain" for a denoising loss that weighs all levels alike, see `log_bound`.
        guidance: what the last step is anchored at instead, see `Guidance`; takes full covariances.

    Raises:
        InputError: D or T is not positive, no schedule is called so, or guidance meets diagonal covariances or learned
            levels.

    Source: Piriyakulkij et al., Denoising Diffusion Variational Inference, AAAI 2025.

    Example:
        >>> posterior = DiffusionPosterior(nn.Linear(6, 8), latent_size=2, steps=4)
        >>> conditional = posterior(torch.ones(3, 6))
        >>> draw = conditional.draw((10,))
        >>> draw.path.shape, conditional.log_bound(draw.z).shape
        (torch.Size([5, 10, 3, 2]), torch.Size([10, 3]))
    """

    first: Tensor
    rows: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        latent_size: int,
        labels: int = 0,
        steps: int = 10,
        noise: str = "log_snr",
        denoiser_size: int = 128,
        denoiser_layers: int = 3,
        covariance: str = "auto",
        prior_denoiser: Prior | None = None,
        level_weights: str = "bound",
        guidance: Guidance | None = None,
    ) -> None:
        super().__init__(encoder, latent_size, labels)
        check_name("covariance", covariance, ("auto", "diagonal", "full"))
        check_name("weighting of levels", level_weights, ("bound", "plain"))
        if guidance and covariance == "diagonal":
            raise InputError("guidance gives the last step a full covariance; use covariance=full, or no guidance")
        if guidance and noise == "learned":  # whose gradient would reach the decoder where latents are held fixed
            raise InputError("guidance is for fixed levels of noise; use another noise than learned, or no guidance")
        self.guidance = guidance
        self.noise: NoisingProcess = NoisingProcess(steps, noise)
        self.register_buffer("first", torch.arange(steps) == 0, persistent=False)
        self.anchor: GaussianHead = GaussianHead(self.features, latent_size)
        self.prior_denoiser: PriorDenoiser | None = None
        if prior_denoiser is not None and latent_size == 2:
            self.prior_denoiser = PriorDenoiser(prior_denoiser, self.noise)
        known = 4 if self.prior_denoiser else 2
        self.full: bool = covariance == "full" or bool(guidance) or (covariance == "auto" and 1 < latent_size <= 4)
        self.law: type[Gaussian] = FullGaussian if self.full else DiagonalGaussian
        """Of a step."""
        self.couplings: int = latent_size * (latent_size - 1) // 2 if self.full else 0
        self.register_buffer("rows", torch.tril_indices(latent_size, latent_size, -1)[0], persistent=False)
        outputs = 2 * latent_size + self.couplings
        self.denoiser: Denoiser = Denoiser(
            known * latent_size, outputs, self.features, steps, denoiser_size, denoiser_layers
        )
        self.plain_weights: bool = level_weights == "plain"
        self.plain_gradient: bool = latent_size > _JACOBIANS_UP_TO
        """Whether a draw is differentiated step by step rather than with the Jacobians of all steps at once."""

    def encode(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        features = super().encode(x, label)
        # What the guidance must know of x goes along, behind the features.
        return features if self.guidance is None else self.guidance.curvature.beside(features, x)

    def with_label(self, features: Tensor, label: Tensor) -> Tensor:
        own, statistics = features[..., : self.features], features[..., self.features :]
        told = super().with_label(own, label)
        return behind(told, statistics) if self.guidance else told

    def condition(self, features: Tensor) -> DiffusionConditional:
        statistics = features[..., self.features :] if self.guidance else None
        features = features[..., : self.features]
        anchor = self.anchor.gaussian(features)
        return DiffusionConditional(self, anchor, anchor, self.denoiser.context(features), statistics)

    def without_context(self, features: Tensor) -> DiffusionConditional:
        """The simpler model that warm-up trains: the start depends on x, the steps denoise the prior alone."""
        start = self.anchor.gaussian(features[..., : self.features])
        standard = DiagonalGaussian(torch.zeros_like(start.mean), torch.ones_like(start.variance))
        return DiffusionConditional(self, start, standard, features.new_zeros(()))

    def _stopped_log_ratio(self, features: Tensor, path: Tensor) -> Tensor:
        score = super()._stopped_log_ratio(features, path)
        if self.noise.log_snr is None:
            return score
        # Only log q has a score of mean 0: a learned process keeps its own gradient.
        log_reverse = self.noise.log_prob(path.detach())
        return score - (log_reverse - log_reverse.detach())

    def predict(
        self,
        z_t: Tensor,
        known: _Steps,
        context: Tensor,
        statistics: Tensor | None = None,
    ) -> Gaussian:
        """The anchored prediction (*, D) of z_0, its mean and covariance corrected by the network.

        The network sees z_t, the same in units of its own spread, and the prior's prediction of z_0, as it is and as a
        correction in the units that the network answers in.

        Args:
            z_t: (*, D).
            known: what the steps know at their levels.
            context: the denoiser's view of x.
            statistics: T(x) where there is guidance.
        """
        mean = torch.addcmul(known.offset, known.gain, z_t)
        inputs = [z_t, torch.addcmul(known.shift, known.rate, z_t)]
        believed = None
        if self.prior_denoiser is not None and known.tables is not None:
            believed = self.prior_denoiser.read(z_t, known.tables)
            inputs += [believed, torch.asinh((believed - mean) / known.scale)]
        size = self.latent_size
        sizes = [size, size, self.couplings]
        correction, log_factor, coupling = self.denoiser(torch.cat(inputs, -1), known.biases, context).split(sizes, -1)
        factor = (0.5 * _LARGEST_LOG_FACTOR * torch.tanh(log_factor / _LARGEST_LOG_FACTOR)).exp()
        mean = torch.addcmul(mean, known.scale, correction)
        scale = (known.scale * factor).clamp_min(VARIANCE_FLOOR**0.5)
        if not self.full:
            return DiagonalGaussian(mean, scale**2)
        coupling = _LARGEST_COUPLING * torch.tanh(coupling / _LARGEST_COUPLING)
        plain = FullGaussian(mean, packed(scale, coupling * known.scale[..., self.rows]))
        if self.guidance is None or statistics is None or known.above_first:
            return plain
        inner = FullGaussian(correction, packed(factor, coupling))
        return self._guided(plain, inner, z_t, known.t, believed, statistics)

    def _guided(
        self,
        plain: FullGaussian,
        correction: FullGaussian,
        z_t: Tensor,
        t: Tensor | int | slice,
        believed: Tensor | None,
        statistics: Tensor,
    ) -> FullGaussian:
        """The prediction where the last step, t = 1, corrects what the guidance says instead."""
        assert self.guidance is not None
        levels = self.noise.at(1)
        center = z_t / levels.alpha if believed is None else believed
        if isinstance(t, slice):
            center, correction = center[0], FullGaussian(*(part[0] for part in correction))
        guided = self.guidance(center, levels.sigma / levels.alpha, statistics).after(correction)
        if isinstance(t, int):
            return guided
        if isinstance(t, slice):
            return FullGaussian(*(torch.cat([a[None], b[1:]]) for a, b in zip(guided, plain, strict=True)))
        last = (t == 1).unsqueeze(-1)
        return FullGaussian(*(torch.where(last, a, b) for a, b in zip(guided, plain, strict=True)))


def check_own_latents(posterior: Posterior, why: str) -> None:
    """Refuse a chain whose settings speak of z where its latents are others.

    Raises:
        InputError: it is such a chain.
    """
    for chain in posterior.modules():
        if not isinstance(chain, DiffusionPosterior):
            continue
        about_latents = {
            "guidance": chain.guidance,
            "prior_denoiser": chain.prior_denoiser,
            "level_weights=plain": chain.plain_weights,
        }
        for name, value in about_latents.items():
            if value:
                raise InputError(f"{name} is about z, but {why}; leave it out")
