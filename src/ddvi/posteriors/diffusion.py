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

from typing import final

import torch
from torch import Tensor, nn

from ddvi.gaussians import DiagonalGaussian, FullGaussian, Gaussian, stack
from ddvi.networks import Denoiser
from ddvi.noise import NoisingProcess, point
from ddvi.posteriors.base import VARIANCE_FLOOR, Conditional, Draw, Posterior
from ddvi.posteriors.gaussian import GaussianHead
from ddvi.priors import Prior
from ddvi.randomness import generator

_LARGEST_LOG_FACTOR = 6.0  # of a variance against its anchor: e^±6 either way


@final
class DiffusionConditional(Conditional):
    """The chain z_T → … → z_0.

    Args:
        posterior: the networks.
        start: the Gaussian (*batch_shape, D) whose noised version is q(z_T | x).
        anchor: the Gaussian whose exact denoiser the network corrects; usually the same.
        context: what the denoiser knows of x, (*batch_shape, denoiser_size).
    """

    def __init__(
        self, posterior: DiffusionPosterior, start: DiagonalGaussian, anchor: DiagonalGaussian, context: Tensor
    ) -> None:
        self.posterior = posterior
        self.noise = posterior.noise
        self.auxiliaries = posterior.noise.steps
        self.start = self.noise.marginal(start, posterior.levels[-1])
        self.anchor = anchor
        self.context = context

    def predict(self, z_t: Tensor, t: Tensor) -> Gaussian:
        """The prediction of z_0; z_t is (*, *batch_shape, D), t broadcastable to z_t.shape[:-1]."""
        alpha, sigma = self.noise.at(self.noise.alpha, t), self.noise.at(self.noise.sigma, t)
        total = alpha**2 * self.anchor.variance + sigma**2
        mean = (sigma**2 * self.anchor.mean + alpha * self.anchor.variance * z_t) / total
        variance = self.anchor.variance * sigma**2 / total
        whitened = (z_t - alpha * self.anchor.mean) * total.rsqrt()
        return self.posterior.corrected(DiagonalGaussian(mean, variance), z_t, whitened, t, self.context)

    def step(self, z_t: Tensor, t: Tensor) -> Gaussian:
        """q(z_{t-1} | z_t, x), shapes as in `predict`."""
        return self.noise.step_back(self.predict(z_t, t), z_t, t)

    def draw(self, sample_shape: tuple[int, ...] = ()) -> Draw:
        path, steps = [self.start.sample(sample_shape)], []
        for t in self.posterior.levels.flip(0):
            steps.append(self.step(path[-1], t))
            path.append(steps[-1].sample())
        stacked = torch.stack(path[::-1])
        # Scored after the chain, all steps at once.
        log_q = self.start.log_prob(stacked[-1]) + stack(steps[::-1]).log_prob(stacked[:-1]).sum(0)
        return Draw(stacked[0], log_q - self.log_reverse(stacked), stacked)

    def log_ratio(self, path: Tensor) -> Tensor:
        steps = self.step(path[1:], self._levels_for(path[1:])).log_prob(path[:-1]).sum(0)
        return self.start.log_prob(path[-1]) + steps - self.log_reverse(path)

    def log_reverse(self, path: Tensor) -> Tensor:
        """log r(z_1:T | z_0) = log r(z_T | z_0) + Σ_{t ≥ 2} log r(z_{t-1} | z_t, z_0)."""
        z, t = point(path[0]), self._levels_for(path[1:])
        value = self.noise.marginal(z, self.posterior.levels[-1]).log_prob(path[-1])
        return value + self.noise.step_back(z, path[2:], t[1:]).log_prob(path[1:-1]).sum(0)

    def reverse_path(self, z: Tensor) -> Tensor:
        return self.noise.path(z)

    def log_bound(self, z: Tensor, levels: int | None = None) -> Tensor:
        """The bound on log q(z_0 | x) that denoising maximises:

        E_r[ log q(z_0|z_1,x) ] − Σ_{t≥2} E_r KL( r(z_{t-1}|z_t,z_0) ‖ q(z_{t-1}|z_t,x) ) − KL( r(z_T|z_0) ‖ q(z_T|x) )

        Every KL in closed form, each z_t drawn once from its marginal. With `levels` of the T terms, drawn uniformly
        per example, the sum is T/levels times theirs; the z_T term is always there.
        """
        steps, known = self.noise.steps, point(z)
        if levels is None or levels >= steps:
            t = self._levels_for(z.expand(steps, *z.shape)).expand(steps, *z.shape[:-1])
        else:
            t = torch.randint(1, steps + 1, (levels, *z.shape[:-1]), device=z.device)
        z_t = self.noise.marginal(known, t).sample()
        q, r = self.step(z_t, t), self.noise.step_back(known, z_t, t)
        first = t == 1
        # r(z_0|z_1,z_0) is a point: its term is the density itself. The filler keeps the unused branch finite.
        r = r._replace(variance=r.variance.masked_fill(first.unsqueeze(-1), 1.0))
        terms = torch.where(first, q.log_prob(z), -q.divergence_from(r))
        last = self.start.divergence_from(self.noise.marginal(known, self.posterior.levels[-1]))
        return terms.sum(0) * (steps / t.shape[0]) - last

    def _levels_for(self, stacked: Tensor) -> Tensor:
        """t = 1 … T shaped to broadcast against stacked latents (T, *, D) without their last axis."""
        return self.posterior.levels.view(-1, *[1] * (stacked.dim() - 2))


@final
class DiffusionPosterior(Posterior):
    """q(z_T | x) Π_t q(z_{t-1} | z_t, x), see the module.

    Args:
        steps: T.
        noise: name of the noise schedule, see `ddvi.noise`.
        denoiser_size: width of the denoiser's layers.
        denoiser_layers: their number.
        covariance: of the steps, "diagonal" or "full"; "auto" takes full ones for up to 4 dimensions.
        prior_denoiser: a prior whose own denoiser E[z_0 | z_t] is given to the network as an input, for D = 2.
    """

    levels: Tensor

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
    ) -> None:
        super().__init__(encoder, latent_size, labels)
        self.noise = NoisingProcess(steps, noise)
        self.register_buffer("levels", torch.arange(1, steps + 1), persistent=False)
        self.anchor = GaussianHead(self.features, latent_size)
        self.prior_denoiser: PriorDenoiser | None = None
        if prior_denoiser is not None and latent_size == 2:
            self.prior_denoiser = PriorDenoiser(prior_denoiser, self.noise)
        known = 4 if self.prior_denoiser else 2
        full = covariance == "full" or (covariance == "auto" and 1 < latent_size <= 4)
        self.couplings = latent_size * (latent_size - 1) // 2 if full else 0
        outputs = 2 * latent_size + self.couplings
        self.denoiser = Denoiser(known * latent_size, outputs, self.features, steps, denoiser_size, denoiser_layers)

    def condition(self, features: Tensor) -> DiffusionConditional:
        anchor = self.anchor.gaussian(features)
        return DiffusionConditional(self, anchor, anchor, self.denoiser.context(features))

    def without_context(self, features: Tensor) -> DiffusionConditional:
        """The simpler model that warm-up trains: the start depends on x, the steps denoise the prior alone."""
        start = self.anchor.gaussian(features)
        standard = DiagonalGaussian(torch.zeros_like(start.mean), torch.ones_like(start.variance))
        return DiffusionConditional(self, start, standard, features.new_zeros(()))

    def corrected(
        self, anchored: DiagonalGaussian, z_t: Tensor, whitened: Tensor, t: Tensor, context: Tensor
    ) -> Gaussian:
        """The anchored prediction (*, D) of z_0, its mean and covariance corrected by the network.

        The network sees z_t, the same in units of its own spread, and the prior's prediction of z_0, as it is and as a
        correction in the units that the network answers in.
        """
        scale = anchored.variance.sqrt()
        inputs = [z_t, whitened]
        if self.prior_denoiser is not None:
            believed = self.prior_denoiser(z_t, t)
            inputs += [believed, torch.asinh((believed - anchored.mean) / scale)]
        size = self.latent_size
        correction, log_factor, coupling = self.denoiser(torch.cat(inputs, -1), t, context).split(
            [size, size, self.couplings], -1
        )
        mean = anchored.mean + scale * correction
        log_factor = _LARGEST_LOG_FACTOR * torch.tanh(log_factor / _LARGEST_LOG_FACTOR)
        variance = (anchored.variance * log_factor.exp()).clamp_min(VARIANCE_FLOOR)
        if not self.couplings:
            return DiagonalGaussian(mean, variance)
        factor = torch.diag_embed(variance.sqrt())
        below = torch.zeros_like(factor)
        rows, columns = torch.tril_indices(size, size, -1, device=z_t.device)
        below[..., rows, columns] = coupling * scale[..., rows]
        return FullGaussian(mean, factor + below)


@final
class PriorDenoiser(nn.Module):
    """E[z_0 | z_t] under the prior, tabulated per t on a grid and interpolated, for D = 2.

        E[z_0 | z_t] = ∫ z p(z) N(z_t; α_t z, σ_t² I) dz / ∫ p(z) N(z_t; α_t z, σ_t² I) dz

    by quadrature over a finer grid, where the Gaussian separates and each integral is two matrix products. Any prior
    with a density will do. Constant beyond the grid.

    Args:
        prior: p(z) with D = 2.
        noise: the chain.
        cells: of the table, along each side.
        nodes: of the quadrature, along each side.
    """

    table: Tensor
    extent: Tensor

    def __init__(self, prior: Prior, noise: NoisingProcess, cells: int = 256, nodes: int = 384) -> None:
        super().__init__()
        self.cells = cells
        draws = prior.sample((10_000,), generator=generator(0, "extent"))
        extent = float(draws.abs().max()) * 1.1 + 0.5
        with torch.no_grad():
            table = _tabulate(_density(prior, draws, extent, nodes), noise, extent, cells)
        # (t, cell of the first coordinate, cell of the second) in rows, so that one index finds a pair.
        self.register_buffer("table", table.flatten(0, 2).to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("extent", torch.tensor(extent), persistent=False)

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        """z_t (*, 2), t broadcastable to (*,): (*, 2), by bilinear interpolation."""
        position = ((z_t / self.extent).clamp(-1, 1) + 1) * (0.5 * (self.cells - 1))
        corner = position.detach().floor().clamp_max(self.cells - 2)
        u, v = (position - corner).unsqueeze(-1).unbind(-2)
        i, j = corner.long().unbind(-1)
        row = ((t - 1) * self.cells + i) * self.cells + j
        table, below = self.table, self.cells
        near = table[row] * (1 - v) + table[row + 1] * v
        far = table[row + below] * (1 - v) + table[row + below + 1] * v
        return near * (1 - u) + far * u


def _density(prior: Prior, draws: Tensor, extent: float, nodes: int, boxes: int = 64) -> Tensor:
    """p(z) up to a factor on a grid (nodes, nodes) over [−extent, extent]²; only near draws (N, 2) is it asked for."""
    box = ((draws / extent + 1) * (0.5 * boxes)).long().clamp(0, boxes - 1)
    near = torch.zeros(1, 1, boxes, boxes)
    near[0, 0, box[:, 0], box[:, 1]] = 1
    near = nn.functional.interpolate(nn.functional.max_pool2d(near, 9, 1, 4), size=(nodes, nodes))[0, 0] > 0
    axis = torch.linspace(-extent, extent, nodes)
    points = axis[near.nonzero()].split(1 << 16)
    log_density = torch.full((nodes, nodes), -torch.inf, dtype=torch.float64)
    log_density[near] = torch.cat([prior.log_prob(part).double() for part in points])
    return (log_density - log_density.max()).exp()


def _tabulate(density: Tensor, noise: NoisingProcess, extent: float, cells: int) -> Tensor:
    """The table (T, cells, cells, 2) on [−extent, extent]², in double precision, of a density on a finer grid."""
    fine = torch.linspace(-extent, extent, len(density), dtype=torch.float64)
    coarse = torch.linspace(-extent, extent, cells, dtype=torch.float64)
    table = torch.stack(torch.meshgrid(coarse, coarse, indexing="ij"), -1)
    levels = []
    # From the noisiest on: where a level underflows, far from the prior's mass, that of the level before stands in.
    for alpha, sigma in zip(noise.alpha[1:].flip(0).double(), noise.sigma[1:].flip(0).double(), strict=True):
        kernel = (-0.5 * ((coarse[:, None] - alpha * fine) / sigma) ** 2).exp()
        mass = kernel @ density @ kernel.T
        first = kernel @ (density * fine[:, None]) @ kernel.T
        second = kernel @ (density * fine) @ kernel.T
        table = torch.where(mass[..., None] > 1e-280, torch.stack([first, second], -1) / mass[..., None], table)
        levels.append(table)
    return torch.stack(levels[::-1])
