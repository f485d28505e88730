"""Every posterior against closed forms: where the evidence is known, bounds are held to it digit by digit."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from conftest import LinearGaussian, set_linear
from ddvi.errors import InputError
from ddvi.likelihoods import BernoulliLikelihood, DistributionLikelihood, FixedLikelihood, GaussianLikelihood
from ddvi.networks import DenseDecoder
from ddvi.noise import SCHEDULES, NoisingProcess, point
from ddvi.objectives.base import Batch
from ddvi.objectives.elbo import ELBO, ImportanceWeighted
from ddvi.posteriors.base import VARIANCE_FLOOR, Draw
from ddvi.posteriors.diffusion import DiffusionPosterior
from ddvi.posteriors.flow import FlowPosterior
from ddvi.posteriors.gaussian import GaussianPosterior
from ddvi.posteriors.guidance import Guidance
from ddvi.posteriors.hierarchical import HierarchicalPosterior
from ddvi.posteriors.implicit import ImplicitPosterior
from ddvi.posteriors.laplace import Laplace, LaplacePosterior
from ddvi.posteriors.prior_denoiser import PriorDenoiser
from ddvi.posteriors.scaled import ScaledPosterior
from ddvi.posteriors.spline import SplinePosterior
from ddvi.posteriors.transformed import TransformedPosterior
from ddvi.priors import as_prior, make_prior
from ddvi.randomness import seeded

pytestmark = pytest.mark.usefixtures("float64")

DENSITIES = ("gaussian", "flow", "spline", "hierarchical", "diffusion", "transformed", "transformed_gaussian", "scaled")
densities = pytest.mark.parametrize("name", DENSITIES)
all_densities = pytest.mark.parametrize("name", [*DENSITIES, "laplace", "laplace_gaussian"])
SCALE = torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64)


def build(name, encoder, latent_size=2, labels=0, steps=3, noise="log_snr", prior=None, **options):
    match name:
        case "gaussian":
            return GaussianPosterior(encoder, latent_size, labels)
        case "flow":
            return FlowPosterior(encoder, latent_size, labels, flow_layers=2, context_size=2 * latent_size)
        case "spline":
            return SplinePosterior(encoder, latent_size, labels, flow_layers=2, context_size=2 * latent_size)
        case "hierarchical":
            return HierarchicalPosterior(encoder, latent_size, labels, flow_layers=2, context_size=2 * latent_size)
        case "diffusion":
            sizes = {"denoiser_size": 16, "denoiser_layers": 2}
            return DiffusionPosterior(
                encoder, latent_size, labels, steps, noise, **sizes, prior_denoiser=prior, **options
            )
        case "scaled":
            base = build("diffusion", encoder, latent_size, labels, steps, noise, prior, **options)
            return ScaledPosterior(base, SCALE[:latent_size])
        case "laplace" | "laplace_gaussian":
            base = build("gaussian" if "_" in name else "diffusion", encoder, latent_size, labels, steps, noise)
            likelihood = BernoulliLikelihood(DenseDecoder(latent_size, torch.Size([3]), 4), torch.Size([3]))
            return LaplacePosterior(base, likelihood, make_prior("gaussian", latent_size), **options)
        case "transformed_gaussian":
            return TransformedPosterior(encoder, latent_size, labels, GaussianPosterior)
        case "transformed":
            sizes = {"denoiser_size": 16, "denoiser_layers": 2}
            return TransformedPosterior(
                encoder, latent_size, labels, context_size=2 * latent_size, steps=steps, noise=noise, **sizes, **options
            )


def set_gaussian(name, posterior, gain, offset, variance):
    """Give a posterior the parameters at which q(z|x) = N( gain (x − offset), diag variance ), a independent of all."""
    size = len(variance)
    mean, none, eye = -gain @ offset, torch.zeros(size, size), torch.eye(size)
    both = torch.cat([gain, torch.zeros_like(gain)])

    def set_head(head, weight, bias, variance):
        set_linear(head, weight, torch.cat([bias, (variance - VARIANCE_FLOOR).log()]))

    match name:
        case "gaussian":
            set_head(posterior.head, both, mean, variance)
        case "diffusion":
            set_head(posterior.anchor, both, mean, variance)
        case "transformed":
            set_head(posterior.base.anchor, both, mean, variance)
        case "scaled":
            scale = posterior.scale
            set_head(
                posterior.base.anchor, both / torch.cat([scale, scale])[:, None], mean / scale, variance / scale**2
            )
        case "transformed_gaussian":
            set_head(posterior.base.head, both, mean, variance)
        case "flow" | "spline":
            set_linear(posterior.context, both, torch.cat([mean, torch.zeros(size)]))
            set_head(
                posterior.flow.base if name == "flow" else posterior.base,
                torch.eye(2 * size) * torch.eye(2)[0].repeat_interleave(size),
                mean * 0,
                variance,
            )
        case "hierarchical":
            # The context passes a SiLU on its way to z, and silu(u) − silu(−u) = u.
            set_linear(posterior.context, torch.cat([gain, -gain]), torch.cat([mean, -mean]))
            set_linear(posterior.entrance, torch.cat([none, none]), torch.zeros(2 * size))
            set_head(posterior.auxiliary_flow.base, torch.zeros(2 * size, 2 * size), mean * 0, torch.ones(size))
            difference = torch.cat([torch.cat([eye, -eye], 1), torch.cat([none, none], 1)])
            set_head(posterior.latent_flow.base, difference, mean * 0, variance)
    return posterior


def exact(name, world, **options):
    """The posterior at the parameters where it is that of a world with orthogonal decoder columns."""
    posterior = build(name, world.encoder(), **options)
    return set_gaussian(name, posterior, world.gain, world.offset, world.covariance.diagonal())


def best_diagonal(name, world, **options):
    """The Gaussian that loses least: the posterior's mean, and variances 1/Λ_ii."""
    posterior = build(name, world.encoder(), **options)
    return set_gaussian(name, posterior, world.gain, world.offset, 1 / world.precision.diagonal())


def perturbed(name, size=0.3, **options):
    """A posterior of random parameters over observations of 3 entries, with nothing left at its initial zero."""
    encoder = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    encoder.out_features = 5
    posterior = build(name, encoder, **options)
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return posterior


def assert_agree(difference, message, limit=4.5):
    """The mean of independent values (N, …) is 0 within `limit` standard errors."""
    error = difference.std(0) / math.sqrt(len(difference))
    deviation = float((difference.mean(0) / error).abs().max())
    assert deviation < limit, f"{message}: {deviation:.1f} standard errors apart"


def flat_gradient(loss, module):
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, parameters, strict=True)]
    )


# Bounds where the evidence is known


exact_posteriors = pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gaussian", {}),
        ("flow", {}),
        ("spline", {}),
        ("hierarchical", {}),
        ("transformed", {}),
        *[("diffusion", {"steps": steps, "noise": noise}) for steps in (1, 5, 40) for noise in SCHEDULES],
    ],
)


@exact_posteriors
def test_bound_of_the_exact_posterior_is_the_evidence(orthogonal, name, options):
    model = orthogonal.model(exact(name, orthogonal, **options))
    _, x = orthogonal.simulate(16)
    with torch.no_grad():  # every single draw weighs p(x), not only their mean
        error = model.log_weights(x, 5) - orthogonal.evidence().log_prob(x)
        importance_weighted = model.importance_weighted_bound(x, 5) - orthogonal.evidence().log_prob(x)
    assert error.abs().max() <= 1e-6
    assert importance_weighted.abs().max() <= 1e-6


@exact_posteriors
def test_exact_posterior_scores_given_latents_exactly(orthogonal, name, options):
    posterior = exact(name, orthogonal, **options)
    z, x = orthogonal.simulate(16)
    with torch.no_grad():
        conditional, truth = posterior(x), orthogonal.posterior(x).log_prob(z)
        value, error = conditional.log_prob(z, 4)
        ratio = conditional.log_ratio(conditional.reverse_path(z))
    torch.testing.assert_close(value, truth, atol=1e-9, rtol=0)
    torch.testing.assert_close(ratio, truth, atol=1e-9, rtol=0)
    assert error.max() < 1e-9


@pytest.mark.parametrize("name", ["gaussian", "flow", "spline"])
def test_bound_of_the_best_diagonal_gaussian_loses_the_known_amount(correlated, name):
    posterior = best_diagonal(name, correlated)
    model = correlated.model(posterior)
    _, x = correlated.simulate(16)
    with torch.no_grad():
        # log w is quadratic in z, so that its mean over the points m ± √2 s_i e_i is its mean over N(m, diag s²).
        deviations = correlated.precision.diagonal().rsqrt().diag() * math.sqrt(2)
        points = (x - correlated.offset) @ correlated.gain.T + torch.cat([deviations, -deviations])[:, None]
        ratio = posterior(x).log_ratio(points[None])
        bound = model.weigh(x, Draw(points, ratio, points[None])).log_weight().mean(0)
        drawn = correlated.evidence().log_prob(x) - model.log_weights(x, 20_000)
    gap = correlated.evidence().log_prob(x) - bound
    torch.testing.assert_close(gap, torch.full_like(gap, correlated.diagonal_gap), atol=1e-6, rtol=0)
    assert_agree(drawn.mean(1) - correlated.diagonal_gap, "gap of drawn bounds and KL(q‖p)")


@pytest.mark.parametrize(("name", "options"), [("gaussian", {}), ("diffusion", {"steps": 5})])
def test_importance_weighted_bound_grows_with_draws_and_stays_below_the_evidence(correlated, name, options):
    posterior = best_diagonal(name, correlated, **options)
    if name == "diffusion":
        with torch.no_grad():
            posterior.denoiser.exit.bias.add_(torch.tensor([0.2, -0.3, 0.3, -0.2, 0.1]))
    model = correlated.model(posterior)
    _, x = correlated.simulate(4)
    repeats, largest = 2000, 64
    with torch.no_grad():
        gaps = correlated.evidence().log_prob(x) - model.log_weights(x, repeats * largest)
    bounds = {k: -(math.log(k) - (-gaps[: repeats * k].view(repeats, k, 4)).logsumexp(1)) for k in (1, 4, 16, 64)}
    means = torch.stack([value.mean() for value in bounds.values()])
    errors = torch.stack([value.mean(1).std() / math.sqrt(repeats) for value in bounds.values()])
    assert (means.diff() > 4 * errors[:-1]).all(), f"not growing: {means.tolist()}"
    assert (means <= 4 * errors).all(), f"above log p(x): {means.tolist()}"
    assert means[0] < -0.3, "one draw loses a lot here"
    assert means[-1] > 0.5 * means[0], "64 draws win back less than half of it"


def train_diffusion(world):
    """From the Gaussian of the right moments: simulator training in batches, then the ELBO with path gradients."""
    posterior = DiffusionPosterior(world.encoder(), 2, steps=20, noise="cosine", denoiser_size=32, denoiser_layers=2)
    set_gaussian("diffusion", posterior, world.gain, world.offset, world.covariance.diagonal())
    model = world.model(posterior)

    def simulated(progress):
        z, x = world.simulate(128)
        return -posterior(x).log_bound(z, levels=4)

    def bound(progress):
        _, x = world.simulate(128)
        return next(ELBO(path_gradient=True).updates(model, Batch(x))).loss

    for loss, steps, lr in ((simulated, 1500, 1e-2), (bound, 60, 2e-3)):
        optimizer = torch.optim.Adam(posterior.parameters(), fused=True)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss(step / steps).mean().backward()
            optimizer.step()
    return posterior


@pytest.mark.slow
def test_trained_diffusion_recovers_a_correlated_posterior(float64):
    decoder = torch.tensor([[1.0, 0.5], [0.3, 0.5], [0.5, 0.6]])
    world = LinearGaussian(decoder, torch.tensor([0.5, -1.0, 0.0]), 0.5)  # correlation −0.72
    posterior = train_diffusion(world)
    _, x = world.simulate(3)
    with torch.no_grad():
        draws = [posterior(x).draw((4000,)) for _ in range(8)]
        model = world.model(posterior)
        gap = (world.evidence().log_prob(x) - torch.cat([model.weigh(x, d).log_weight() for d in draws])).mean(0)
    z = torch.cat([draw.z for draw in draws])
    truth = world.posterior(x)
    mean_error = ((z.mean(0) - truth.mean) / truth.stddev).abs().max()
    centred = z - z.mean(0)
    covariance = torch.einsum("sbi,sbj->bij", centred, centred) / len(z)
    covariance_error = ((covariance - world.covariance).flatten(1).norm(dim=1) / world.covariance.norm()).max()
    assert mean_error < 0.02, f"posterior mean is {mean_error:.3f} standard deviations off"
    assert covariance_error < 0.05, f"posterior covariance is {covariance_error:.1%} off"
    assert gap.max() < 0.05, f"the bound loses {gap.max():.3f} nat"
    assert gap.max() < 0.5 * world.diagonal_gap


# Drawing and scoring


@all_densities
@pytest.mark.parametrize("sample_shape", [(), (4,), (2, 3)])
def test_a_draw_is_scored_as_its_path(name, sample_shape):
    posterior = perturbed(name)
    conditional = posterior(torch.randn(5, 3))
    draw = conditional.draw(sample_shape)
    assert draw.z.shape == (*sample_shape, 5, 2)
    assert draw.path.shape == (1 + conditional.auxiliaries, *sample_shape, 5, 2)
    torch.testing.assert_close(draw.path[0], draw.z, atol=0, rtol=0)
    torch.testing.assert_close(draw.log_ratio, conditional.log_ratio(draw.path), atol=1e-9, rtol=0)


@all_densities
@pytest.mark.parametrize("latent_size", [1, 2, 3])
def test_drawn_latents_have_the_density_that_scoring_says(name, latent_size):
    """E_q[ r(a|z) g(z)/q(z,a|x) ] = ∫ g = 1 for any density g of z: normalisation and draws in one."""
    posterior = perturbed(name, size=0.1, latent_size=latent_size)
    with torch.no_grad():
        draw = posterior(torch.randn(1, 3)).draw((200_000,))
        centre, spread = draw.z.mean(0), draw.z.std(0)
        weight = (Normal(centre, 0.7 * spread).log_prob(draw.z).sum(-1) - draw.log_ratio).exp()
    assert weight.std() < 10, "the test has lost its power"
    assert_agree(weight - 1, "the density integrates to 1 and")


@all_densities
def test_labels_broadcast_in_front_of_the_batch(name):
    labels, batch = 4, 3
    posterior = perturbed(name, size=0.1, labels=labels)
    x = torch.randn(batch, 3)
    conditional = posterior(x, torch.arange(labels)[:, None])
    draw = conditional.draw((2,))
    assert draw.z.shape == (2, labels, batch, 2)
    value, error = conditional.log_prob(draw.z, 10)
    assert value.shape == error.shape == conditional.log_bound(draw.z).shape == (2, labels, batch)
    assert conditional.log_bound(draw.z, levels=1).shape == (2, labels, batch)
    for label in range(labels):
        alone = posterior(x, torch.full((batch,), label)).log_ratio(draw.path[:, :, label])
        torch.testing.assert_close(draw.log_ratio[:, label], alone, atol=1e-9, rtol=0)
    assert (draw.log_ratio[:, 0] - conditional.log_ratio(draw.path.roll(1, 2))[:, 0]).abs().min() > 1e-6


def test_layers_refuse_a_base_that_has_no_density_or_speaks_of_latents():
    encoder, prior = nn.Linear(3, 5), make_prior("pinwheel", 2)
    for settings, message in (
        ({"base": ImplicitPosterior}, "has no density"),
        ({"prior_denoiser": prior}, "prior_denoiser is about z"),
        ({"level_weights": "plain"}, "level_weights=plain is about z"),
    ):
        with pytest.raises(InputError, match=message):
            TransformedPosterior(encoder, 2, **settings)


def test_a_label_without_labels_and_impossible_sizes_are_refused():
    with pytest.raises(InputError, match="build it with labels=C"):
        perturbed("gaussian")(torch.randn(2, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(InputError, match="latent size is at least 1, not 0"):
        perturbed("gaussian", latent_size=0)
    with pytest.raises(InputError, match="at least 2 samples, not 1"):
        perturbed("diffusion")(torch.randn(2, 3)).log_prob(torch.randn(2, 2), samples=1)


def test_implicit_posterior_draws_and_refuses_to_score():
    encoder = nn.Flatten()
    encoder.out_features = 3
    conditional = ImplicitPosterior(encoder, 2)(torch.randn(5, 3))
    draw = conditional.draw((4,))
    assert draw.z.shape == (4, 5, 2)
    assert (draw.z == draw.z[0]).all()
    assert draw.log_ratio.isnan().all()
    for score in (conditional.log_bound, conditional.log_prob, conditional.reverse_path):
        with pytest.raises(InputError, match=r"^an adversarial autoencoder's encoder is a point, not a density[^.]*$"):
            score(draw.z)
    with pytest.raises(InputError, match="is a point"):
        conditional.log_ratio(draw.path)


# The diffusion posterior


chains = pytest.mark.parametrize(("steps", "noise"), [(steps, noise) for steps in (1, 3, 10) for noise in SCHEDULES])


@chains
def test_untrained_chain_is_the_gaussian_posterior(steps, noise):
    encoder = nn.Identity()
    encoder.out_features = 3
    posterior = build("diffusion", encoder, steps=steps, noise=noise)
    x, z = torch.randn(6, 3), 2 * torch.randn(50, 6, 2)
    with torch.no_grad():
        conditional = posterior(x)
        mean, variance = posterior.anchor.gaussian(x)
        truth = Normal(mean, variance.sqrt()).log_prob(z).sum(-1)
        value, error = conditional.log_prob(z, 3)
        draws = conditional.draw((20_000,)).z
        bound = torch.stack([conditional.log_bound(z) for _ in range(250)])
    torch.testing.assert_close(value, truth, atol=1e-10, rtol=0)
    assert error.max() < 1e-10
    assert_agree(draws - mean, "mean of the chain")
    assert_agree((draws - mean) ** 2 - variance, "variance of the chain")
    assert_agree(bound - truth, "the bound of a chain that loses nothing and log q(z|x)", limit=5)


@pytest.mark.parametrize(
    ("steps", "noise", "guided"),
    [
        (steps, noise, guided)
        for steps in (1, 3, 10)
        for noise in SCHEDULES
        for guided in (False, True)
        if not (guided and noise == "learned")
    ],
)
def test_bound_is_the_average_log_ratio_over_the_noising_process(steps, noise, guided):
    guidance = Guidance(BernoulliLikelihood(DenseDecoder(2, torch.Size([3]), 4), torch.Size([3]))) if guided else None
    posterior = perturbed("diffusion", steps=steps, noise=noise, guidance=guidance)
    x = torch.randn(4, 3)
    repeats = 10_000
    with torch.no_grad():
        conditional = posterior(x)
        z = conditional.draw().z.expand(repeats, 4, 2)
        full = conditional.log_bound(z)
        brute_force = conditional.log_ratio(conditional.reverse_path(z))
        one_level = conditional.log_bound(z, levels=1)
        several = conditional.log_bound(z, levels=max(1, min(2, steps - 1)))
        value, error = conditional.log_prob(z[0], repeats)
    assert_agree(full - brute_force, "closed-form KL terms and E_r[log_ratio]")
    assert_agree(full - one_level, "the sum over t and T times one drawn t")
    assert_agree(full - several, "the sum over t and a part of it")
    excess = full.mean(0) - value
    assert (excess < 4 * (error + full.std(0) / math.sqrt(repeats))).all(), "the bound exceeds log q(z|x)"


def test_importance_sampled_density_agrees_with_quadrature():
    """log q(z_0|x) = log ∫∫ q(z_0|z_1) q(z_1|z_2) q(z_2) dz_1 dz_2 for T = 2, D = 1, by the trapezoidal rule."""
    posterior = perturbed("diffusion", size=0.5, latent_size=1, steps=2, noise="cosine")
    with torch.no_grad():
        conditional = posterior(torch.randn(1, 3))
        z = conditional.draw((5,)).z
        mean, variance = conditional.start
        top = mean + variance.sqrt() * torch.linspace(-9, 9, 601)[:, None]
        middle = torch.linspace(-12, 12, 2401)[:, None, None]

        def step(z_t, level):
            mean, variance = conditional.step(z_t[..., None, :], torch.tensor(level))
            return Normal(mean[..., 0, :], variance[..., 0, :].sqrt())

        joint = Normal(mean, variance.sqrt()).log_prob(top) + step(top, 2).log_prob(middle)
        density_of_middle = torch.trapezoid(joint.exp()[..., 0], top[:, 0])
        given = step(middle[:, 0], 1)
        density = torch.stack(
            [
                torch.trapezoid(density_of_middle * given.log_prob(point).exp()[:, 0], middle[:, 0, 0])
                for point in z[:, 0]
            ]
        )
        value, error = conditional.log_prob(z, 100_000)
    assert torch.trapezoid(density_of_middle, middle[:, 0, 0]) == pytest.approx(1, abs=1e-8)
    assert error.max() < 0.02
    deviation = ((value[:, 0] - density.log()) / error[:, 0]).abs().max()
    assert deviation < 4.5, f"importance sampling and quadrature are {deviation:.1f} standard errors apart"


def test_without_context_only_the_start_depends_on_the_observation():
    posterior = perturbed("diffusion", steps=4)
    features = posterior.encode(torch.randn(2, 3))
    conditional = posterior.without_context(features)
    z_t, t = torch.randn(7, 1, 2), torch.tensor(3)
    mean, variance = conditional.step(z_t.expand(7, 2, 2), t)
    torch.testing.assert_close(mean[:, 0], mean[:, 1], atol=0, rtol=0)
    torch.testing.assert_close(variance[:, 0], variance[:, 1], atol=0, rtol=0)
    for found, full in zip(conditional.start, posterior.condition(features).start, strict=True):
        torch.testing.assert_close(found, full, atol=0, rtol=0)
    draw = conditional.draw((5,))
    torch.testing.assert_close(draw.log_ratio, conditional.log_ratio(draw.path), atol=1e-9, rtol=0)


@pytest.mark.parametrize("scale", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.inf], [1.0, math.nan], 0.1])
def test_units_are_a_positive_number_for_each_latent(scale):
    base = build("gaussian", perturbed("gaussian").encoder)
    with pytest.raises(InputError, match=r"^the scale is .*; give 2 positive numbers, one for each latent$"):
        ScaledPosterior(base, torch.tensor(scale))


def test_without_context_units_are_those_of_the_posterior():
    posterior = build("scaled", perturbed("gaussian").encoder, steps=4)
    features = posterior.encode(torch.randn(3, 3))
    z = torch.randn(3, 2)
    torch.manual_seed(0)
    found = posterior.without_context(features).log_bound(z)
    torch.manual_seed(0)
    expected = posterior.base.without_context(features).log_bound(z / SCALE[:2]) - SCALE[:2].log().sum()
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_untrained_chain_without_context_denoises_a_standard_gaussian():
    posterior = build("diffusion", perturbed("gaussian").encoder, steps=4)
    conditional = posterior.without_context(posterior.encode(torch.randn(3, 3)))
    z_t, noise = torch.randn(3, 2), posterior.noise
    for t in range(1, 5):
        # Of N(0, I) and its noised version: z_0 given z_t is N(α_t z_t, σ_t²).
        prediction = conditional.predict(z_t, torch.tensor(t))
        torch.testing.assert_close(prediction.mean, noise.constants().alpha[t] * z_t, atol=1e-12, rtol=0)
        factor = noise.constants().sigma[t] * torch.eye(2).expand(3, 2, 2)
        torch.testing.assert_close(prediction.factor, factor, atol=1e-12, rtol=0)


@pytest.mark.parametrize("steps", [1, 3])
def test_guidance_is_exact_where_the_model_is_gaussian(steps):
    """p(z_0 | z_1, x) of N(c, s² I) and a linear decoder: precision I/s² + WᵀW/τ², however many steps are taken."""
    decoder, scale = nn.Linear(2, 5), torch.rand(5) + 0.5
    guidance = Guidance(FixedLikelihood(GaussianLikelihood(decoder, torch.Size([5]), scale)), steps)
    x, center, width = torch.randn(4, 5), torch.randn(7, 4, 2), torch.tensor([0.3])
    with torch.no_grad():
        found = guidance(center, width, guidance.likelihood.statistics(x)[0])
        weight = decoder.weight / scale[:, None]
        precision = torch.eye(2) / width**2 + weight.T @ weight
        target = (x - decoder.bias) / scale @ weight + center / width**2
        expected = torch.linalg.solve(precision, target.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.mean, expected, atol=1e-10, rtol=0)
    covariance = torch.linalg.inv(precision).expand(7, 4, 2, 2)
    torch.testing.assert_close(found.factor @ found.factor.mT, covariance, atol=1e-10, rtol=0)


def test_steps_of_guidance_go_to_the_peak():
    """Where the gradient of log p(z_0 | z_1) + log p(x | z_0) vanishes, but for the width of J's differences."""
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 30))
    likelihood = BernoulliLikelihood(decoder, torch.Size([30]))
    x, center, width = (torch.rand(4, 30) < 0.5).double(), torch.randn(4, 2), torch.tensor([0.2])

    def slope(z):
        z = z.detach().requires_grad_()
        log_joint = likelihood.log_prob(x, z) - 0.5 * ((z - center) / width).square().sum(-1)
        return float(torch.autograd.grad(log_joint.sum(), z)[0].abs().max())

    found = [Guidance(likelihood, steps)(center, width, x).mean for steps in (1, 2, 20)]
    start, first, second, last = map(slope, [center, *found])
    assert start > first > second
    assert last < 0.02 * start


def test_guidance_ignores_dropout_and_leaves_the_decoders_mode():
    decoder = DenseDecoder(2, torch.Size([3]), 8, dropout=0.5).train()
    guidance = Guidance(BernoulliLikelihood(decoder, torch.Size([3])))
    center, width, x = torch.randn(4, 2), torch.tensor([0.3]), torch.ones(4, 3)
    first, again = (guidance(center, width, x) for _ in range(2))
    torch.testing.assert_close(first.mean, again.mean, atol=0, rtol=0)
    assert all(part.training for part in decoder.modules())


def test_guidance_in_other_units_is_that_of_a_scaled_decoder():
    decoder, shape, units = DenseDecoder(3, torch.Size([5]), 6), torch.Size([5]), SCALE
    first = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        first.weight.copy_(units.diag())
    plain = Guidance(BernoulliLikelihood(nn.Sequential(first, decoder), shape), 2)
    found = Guidance(BernoulliLikelihood(decoder, shape), 2, units)
    center, width, x = torch.randn(4, 3), torch.tensor(0.3), torch.randint(0, 2, (4, 5)).double()
    for value, expected in zip(found(center, width, x), plain(center, width, x), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)


def test_a_stopped_score_stops_the_likelihood_that_guides_too():
    decoder = DenseDecoder(2, torch.Size([3]), 4)
    posterior = perturbed("diffusion", guidance=Guidance(BernoulliLikelihood(decoder, torch.Size([3]))))
    features = posterior.encode(torch.randn(5, 3))
    features = features.detach()
    path = posterior.condition(features).draw().path.detach().requires_grad_()
    score = posterior._stopped_log_ratio(features, path).sum()
    known = [path, *decoder.parameters(), *posterior.parameters()]
    slope, *others = torch.autograd.grad(score, known, allow_unused=True)
    assert slope.abs().sum() > 0
    assert all(other is None for other in others)


def test_guidance_without_an_exponential_family_or_full_covariances_is_refused():
    shape = torch.Size([3])
    other = DistributionLikelihood(lambda z: Normal(z, 1.0), shape)
    with pytest.raises(InputError, match=r"^guidance needs .*, not DistributionLikelihood; use guidance=0$"):
        Guidance(other)
    guidance = Guidance(BernoulliLikelihood(nn.Linear(2, 3), shape))
    with pytest.raises(InputError, match="use covariance=full"):
        perturbed("diffusion", guidance=guidance, covariance="diagonal")
    with pytest.raises(InputError, match="fixed levels of noise"):
        perturbed("diffusion", guidance=guidance, noise="learned")


@pytest.mark.parametrize("base", [GaussianPosterior, partial(DiffusionPosterior, steps=4)])
def test_laplace_begins_as_the_posterior_where_that_is_gaussian(correlated, base):
    """Whatever is guessed, as far as steps reach: every draw's weight is the evidence."""
    decoder, shape = nn.Linear(2, 3), torch.Size([3])
    set_linear(decoder, correlated.decoder, correlated.offset)
    likelihood, prior = GaussianLikelihood(decoder, shape, torch.tensor(correlated.scale)), make_prior("gaussian", 2)
    posterior = LaplacePosterior(base(correlated.encoder(), 2), likelihood, prior, steps=4)
    posterior.center.zero_()
    posterior.spread.fill_(1.0)
    _, x = correlated.simulate(6)
    with torch.no_grad():
        posterior.guess.bias += 3.0
        draw = posterior(x).draw((50,))
        log_weight = likelihood.log_prob(x, draw.z) + prior.log_prob(draw.z) - draw.log_ratio
    evidence = correlated.evidence().log_prob(x).expand(50, 6)
    torch.testing.assert_close(log_weight, evidence, atol=1e-4, rtol=0)


def test_laplace_climbs_to_the_peak_over_the_walls_of_a_structured_prior():
    """From guesses anywhere; its precision is the curvature there, where that is positive."""
    decoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 200))
    likelihood, prior = BernoulliLikelihood(decoder, torch.Size([200])), make_prior("pinwheel", 3)
    x = likelihood(prior.sample((40,))).sample()
    moments = prior.sample((10_000,))
    center, spread = moments.mean(0), moments.std(0)
    start, statistics = 2 * torch.randn(40, 3), likelihood.statistics(x)[0]

    def log_joint(z):
        return likelihood.log_prob(x, z) + prior.log_prob(z)

    def peak(steps):
        mean, factor = Laplace(likelihood, prior, steps)(start, statistics, center, spread)
        return center + spread * mean, spread.unsqueeze(-1) * factor

    (z, factor), (early, _) = peak(30), peak(1)
    assert (log_joint(z) >= log_joint(early) - 1e-6).double().mean() > 0.9, "another peak may be the nearer one"
    assert log_joint(z).mean() > log_joint(early).mean() + 1

    def slope(z):
        z = z.detach().requires_grad_()
        return torch.autograd.grad(log_joint(z).sum(), z)[0]

    reached = torch.linalg.vector_norm(factor.mT @ slope(z).unsqueeze(-1), dim=(-2, -1)) < 0.05
    assert reached.double().mean() > 0.9, "a slope of a twentieth in units of the approximation is a peak"
    precision = torch.stack([(slope(z - 1e-5 * way) - slope(z + 1e-5 * way)) / 2e-5 for way in torch.eye(3)], -1)
    ratio = torch.linalg.eigvalsh(factor.mT @ precision @ factor)[reached]
    assert ((ratio > 0.3) & (ratio < 1.5)).double().mean() > 0.9


def test_laplace_takes_no_step_down_and_stays_where_there_are_no_numbers():
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 30))
    with torch.no_grad():
        decoder[2].weight *= 30  # saturated: Newton's steps mislead
    likelihood, prior = BernoulliLikelihood(decoder, torch.Size([30])), make_prior("gaussian", 2)
    x, start = torch.randint(0, 2, (100, 30)).double(), torch.randn(100, 2)
    found = [Laplace(likelihood, prior, steps)(start, x, torch.zeros(2), torch.ones(2))[0] for steps in (1, 2, 4)]
    heights = [likelihood.log_prob(x, z) + prior.log_prob(z) for z in (start, *found)]
    for reached in heights[1:]:
        assert (reached >= heights[0] - 1e-9).all()
    assert heights[-1].mean() > heights[0].mean() + 10
    start[3] = math.nan
    mean, factor = Laplace(likelihood, prior, 2)(start, x, torch.zeros(2), torch.ones(2))
    broken = mean.isnan().any(-1) & factor.isnan().flatten(1).any(-1)
    assert broken.tolist() == [row == 3 for row in range(100)], "its neighbours don't notice"


def test_laplace_in_portions_is_that_of_all(monkeypatch):
    posterior, x, label = perturbed("laplace", labels=2), torch.randn(7, 3), torch.arange(2)[:, None]
    whole = posterior.coordinates(posterior.encode(x, label))
    monkeypatch.setattr("ddvi.posteriors.laplace.ROWS_AT_ONCE", 9)
    for part, expected in zip(posterior.coordinates(posterior.encode(x, label)), whole, strict=True):
        torch.testing.assert_close(part, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("what", ["draw", "path draw", "bound"])
def test_what_laplaces_guess_learns_is_where_newtons_method_ends(what):
    """D (√(1 + |L⁻¹(v_0 − m)|²/D) − 1), whichever loss it is: scores of draws are to fall, bounds to rise."""
    posterior, x, z = perturbed("laplace", steps=3), torch.randn(5, 3), torch.randn(5, 2)
    features = posterior.encode(x)
    guess = posterior.guess(posterior.inner(features))
    mean, factor = posterior.laplace(guess.detach(), x, posterior.center, posterior.spread)
    away = torch.linalg.solve_triangular(factor, (guess - mean).unsqueeze(-1), upper=False)
    lesson = 2 * (1 + 0.5 * away.square().sum((-2, -1))).sqrt().sum()
    expected = torch.autograd.grad(lesson, posterior.guess.weight, retain_graph=True)[0]
    torch.manual_seed(1)
    match what:
        case "draw":
            loss = posterior.condition(features).draw().log_ratio.sum()
        case "path draw":
            loss = posterior.path_draw(features).log_ratio.sum()
        case _:
            loss = -posterior.condition(features).log_bound(z).sum()
    found = torch.autograd.grad(loss, posterior.guess.weight)[0]
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert not posterior.coordinates(features).lesson.any()


def test_a_wild_guess_of_laplaces_is_no_harm():
    posterior, x = perturbed("laplace", steps=3), torch.randn(5, 3)
    with torch.no_grad():
        posterior.guess.bias.fill_(1e6)
    mean = posterior(x).coordinates.mean
    assert mean.abs().max() < 20
    posterior(x).draw().log_ratio.sum().backward()
    assert (posterior.guess.bias.grad > 0).all(), "and it is called back"


def test_a_path_draw_in_laplaces_coordinates_has_the_value_of_a_draw():
    posterior = perturbed("laplace", steps=3)
    features = posterior.encode(torch.randn(4, 3))
    torch.manual_seed(3)
    plain = posterior.condition(features).draw((2,))
    torch.manual_seed(3)
    for found, expected in zip(posterior.path_draw(features, (2,)), plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_laplace_without_an_exponential_family_or_latents_of_its_own_is_refused():
    shape, prior = torch.Size([3]), make_prior("pinwheel", 2)
    likelihood, encoder = BernoulliLikelihood(nn.Linear(2, 3), shape), nn.Linear(3, 5)
    other = DistributionLikelihood(lambda z: Normal(z, 1.0), shape)
    with pytest.raises(InputError, match=r"^laplace needs .*, not DistributionLikelihood; use laplace=0$"):
        LaplacePosterior(GaussianPosterior(encoder, 2), other, prior)
    chain = DiffusionPosterior(encoder, 2, prior_denoiser=prior)
    stuck = as_prior(Independent(Normal(torch.zeros(2), 1.0), 1))
    stuck._log_density = lambda z, label: torch.zeros(len(z))
    for base, given, steps, message in (
        (GaussianPosterior(encoder, 2), prior, 0, "takes at least 1 step, not 0; give a whole number"),
        (GaussianPosterior(encoder, 2), prior, 2.5, "takes at least 1 step, not 2.5; give a whole number"),
        (GaussianPosterior(encoder, 3), prior, 2, "the prior has 2 latents, the base 3; give them one size"),
        (GaussianPosterior(encoder, 2), stuck, 2, "log_prob can be differentiated; use laplace=0"),
        (ImplicitPosterior(encoder, 2), prior, 2, "ImplicitPosterior has no density"),
        (chain, prior, 2, "prior_denoiser is about z, but the coordinates are .*; leave it out"),
        (ScaledPosterior(chain, torch.ones(2)), prior, 2, "prior_denoiser is about z"),
    ):
        with pytest.raises(InputError, match=message):
            LaplacePosterior(base, likelihood, given, steps)
    with pytest.raises(InputError, match="use warmup=0"):
        perturbed("laplace").without_context(torch.randn(2, 8))


@pytest.mark.parametrize("way", ["inference mode", "sixteen bits"])
def test_laplace_is_the_same_where_nothing_is_differentiated_or_little_is_kept(way):
    posterior = perturbed("laplace", steps=3).float()
    posterior.laplace.curvature.likelihood.float()
    x = torch.randn(4, 3).float()
    expected = posterior.coordinates(posterior.encode(x))
    mode = torch.inference_mode() if way == "inference mode" else torch.autocast("cpu", torch.bfloat16)
    with mode:
        conditional = posterior(x)
        draw = conditional.draw((3,))
        again = conditional.log_ratio(draw.path)
    tolerance = 1e-5 if way == "inference mode" else 0.05
    torch.testing.assert_close(conditional.coordinates.mean, expected.mean, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(conditional.coordinates.factor, expected.factor, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(again.float(), draw.log_ratio.float(), atol=1e-3 if tolerance < 0.01 else 0.3, rtol=0)


@pytest.mark.parametrize("latent_size", [2, 3, 4])
def test_a_wild_chain_stays_a_number_in_single_precision(latent_size):
    with seeded(0, "wild chain"):
        posterior = DiffusionPosterior(nn.Linear(6, 8), latent_size, steps=5)
        nn.init.normal_(posterior.denoiser.exit.weight, std=5.0)
        draw = posterior(torch.randn(50, 6)).draw((400,))
    assert torch.isfinite(draw.path).all()
    assert torch.isfinite(draw.log_ratio).all()


def test_every_variance_has_its_floor():
    posterior = build("diffusion", perturbed("gaussian").encoder, steps=3)
    with torch.no_grad():
        posterior.anchor.bias[2:] = -60.0
        posterior.denoiser.exit.bias[2:] = -60.0
    draw = posterior(torch.randn(4, 3)).draw((10,))
    factor = posterior(torch.randn(4, 3)).predict(torch.randn(4, 2), torch.tensor(1)).factor
    assert factor.diagonal(dim1=-2, dim2=-1).min() ** 2 >= VARIANCE_FLOOR * (1 - 1e-9)
    assert draw.log_ratio.isfinite().all()


# Gradients


@pytest.mark.parametrize(
    "options", [{"latent_size": 2}, {"latent_size": 3, "steps": 1}, {"prior": "pinwheel"}, {"guided": 2}]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_chains_fast_gradient_is_that_of_its_steps(options, dtype, tolerance):
    """Jacobians of all steps at once against differentiation step by step, with the same random numbers."""
    prior = make_prior(options["prior"]) if "prior" in options else None
    guidance = None
    if "guided" in options:
        decoder = DenseDecoder(2, torch.Size([3]), 4).to(dtype)
        guidance = Guidance(BernoulliLikelihood(decoder, torch.Size([3])), options["guided"])
    shape = {name: value for name, value in options.items() if name not in ("guided", "prior")}
    posterior = perturbed("diffusion", **shape, prior=prior, guidance=guidance).to(dtype)
    x, target = torch.randn(5, 3, dtype=dtype), torch.randn(5, posterior.latent_size, dtype=dtype)
    found = []
    for plain in (False, True):
        posterior.plain_gradient = plain
        torch.manual_seed(3)
        draw = posterior(x).draw((4,))
        value = (draw.log_ratio + ((draw.z - target) ** 2).sum(-1) + draw.path.sin().sum((0, -1))).mean()
        found.append([draw.z, draw.log_ratio, *torch.autograd.grad(value, list(posterior.parameters()))])
    largest = max(float(value.abs().max()) for value in found[1][2:])
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=tolerance * largest, rtol=tolerance)


@densities
def test_a_path_draw_has_the_value_of_a_draw_and_no_gradient_of_parameters_but_through_the_path(name):
    posterior = perturbed(name)
    features = posterior.encode(torch.randn(4, 3))
    torch.manual_seed(2)
    expected = posterior.condition(features).draw((6,))
    torch.manual_seed(2)
    found = posterior.path_draw(features, (6,), weigh=torch.zeros_like)
    for value, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(value, plain, atol=1e-9, rtol=0)
    transformed = name.startswith("transformed")  # whose layers learn by their plain gradient
    base = posterior.base if transformed else posterior
    assert not flat_gradient(found.log_ratio.sum() + found.path.sum(), base).any()
    if transformed:
        assert flat_gradient(found.log_ratio.sum(), posterior.layers).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in DENSITIES), ("diffusion", {"noise": "learned"})]
)
@pytest.mark.parametrize(("objective", "samples"), [(ELBO, 1), (ImportanceWeighted, 5)])
def test_path_gradient_has_the_expectation_of_the_plain_gradient(correlated, name, options, objective, samples):
    posterior = perturbed(name, size=0.15, **options)
    model = correlated.model(posterior)
    x = correlated.simulate(4)[1].repeat(25, 1)
    plain, path = [], []
    for seed in range(32):
        for found, stopped in ((plain, False), (path, True)):
            torch.manual_seed(seed)
            loss = next(objective(samples, path_gradient=stopped).updates(model, Batch(x))).loss
            found.append(flat_gradient(loss.mean(), posterior))
    plain, path = torch.stack(plain), torch.stack(path)
    directions = torch.randn(20, plain.shape[1]).T / math.sqrt(plain.shape[1])
    assert_agree((path - plain) @ directions, "path gradient and plain gradient")
    along = plain.mean(0) / plain.mean(0).norm()
    assert_agree((path - plain) @ along, "path gradient and plain gradient, along it")
    noise = ((path - plain) @ along).std() / math.sqrt(len(plain))
    assert noise < 0.03 * plain.mean(0).norm(), "the test has lost its power"


@exact_posteriors
def test_path_gradient_vanishes_at_the_exact_posterior(orthogonal, name, options):
    posterior = exact(name, orthogonal, **options)
    model = orthogonal.model(posterior)
    batch = Batch(orthogonal.simulate(8)[1])
    # A learned noising process is no part of q: its gradient is 0 on average alone.
    q = nn.ParameterList(value for name, value in posterior.named_parameters() if not name.startswith("noise."))
    path = flat_gradient(next(ELBO(path_gradient=True).updates(model, batch)).loss.mean(), q)
    plain = flat_gradient(next(ELBO().updates(model, batch)).loss.mean(), q)
    if name != "transformed":  # whose layers learn by their plain gradient
        assert path.abs().max() < 1e-8
    assert plain.abs().max() > 1e-2, "the plain gradient is noise around 0"


@densities
@pytest.mark.parametrize("what", ["bound", "score"])
def test_gradients_agree_with_finite_differences(correlated, name, what):
    posterior = perturbed(name)
    model = correlated.model(posterior)
    z, x = correlated.simulate(4)

    def value():
        torch.manual_seed(1)
        return model.log_weights(x, 3).mean() if what == "bound" else posterior(x).log_bound(z).mean()

    gradient = flat_gradient(value(), posterior)
    start = nn.utils.parameters_to_vector(posterior.parameters()).detach()
    for _ in range(5):
        direction = torch.randn_like(start)
        sides = []
        with torch.no_grad():
            for sign in (1, -1):
                nn.utils.vector_to_parameters(start + sign * 1e-6 * direction, posterior.parameters())
                sides.append(value())
            nn.utils.vector_to_parameters(start, posterior.parameters())
        slope = (sides[0] - sides[1]) / 2e-6
        torch.testing.assert_close(gradient @ direction, slope, rtol=1e-5, atol=1e-6)


# The prior's own denoiser


def test_prior_denoiser_is_the_conditional_mean_of_a_mixture():
    """For parts N(c_k, S_k) the answer is Σ_k w_k(z_t) ( c_k + α S_k (α² S_k + σ²)^-1 (z_t − α c_k) )."""
    prior, noise = make_prior("gaussian_mixture", 2, 3), NoisingProcess(4)
    denoiser = PriorDenoiser(prior, noise)
    angle = torch.arange(3) * (2 * math.pi / 3)
    axes = torch.stack([torch.stack([angle.cos(), angle.sin()], -1), torch.stack([-angle.sin(), angle.cos()], -1)], -1)
    centres = 1.4 * axes[..., 0]
    covariances = axes @ torch.tensor([0.25, 0.01]).diag() @ axes.mT
    for t in (1, 2, 3, 4):
        alpha, sigma = noise.constants().alpha[t], noise.constants().sigma[t]
        z_t = alpha * prior.sample((500,)) + sigma * torch.randn(500, 2)
        total = alpha**2 * covariances + sigma**2 * torch.eye(2)
        parts = torch.distributions.MultivariateNormal(alpha * centres, total)
        weights = parts.log_prob(z_t[:, None]).softmax(-1)
        gain = alpha * covariances @ total.inverse()
        means = centres + torch.einsum("kij,nkj->nki", gain, z_t[:, None] - alpha * centres)
        truth = (weights[..., None] * means).sum(1)
        error = (denoiser(z_t, torch.tensor(t)) - truth).norm(dim=-1)
        assert error.max() < 2e-3, f"t = {t}: {error.max():.1e}"


def test_the_table_of_a_priors_denoiser_is_that_of_its_law():
    one, other = (PriorDenoiser(make_prior("pinwheel", 2, 3), NoisingProcess(2), 16, 32) for _ in range(2))
    torch.testing.assert_close(one.table, other.table, rtol=0, atol=0)
    with torch.no_grad():
        other.table.zero_()
    again = PriorDenoiser(make_prior("pinwheel", 2, 3), NoisingProcess(2), 16, 32)
    torch.testing.assert_close(one.table, again.table, rtol=0, atol=0)
    assert not PriorDenoiser(make_prior("pinwheel", 2, 3), NoisingProcess(3), 16, 32).table.equal(one.table)

    class Shifted(type(make_prior("gaussian", 2))):
        """Of a user's own, with arguments of its own."""

        def __init__(self, shift):
            super().__init__(2)
            self.shift = shift

        def _draw(self, *arguments):
            return super()._draw(*arguments) + self.shift

        def _log_density(self, z, label):
            return super()._log_density(z - self.shift, label)

    near, far = (PriorDenoiser(Shifted(shift), NoisingProcess(2), 16, 32) for shift in (0.0, 3.0))
    assert far.extent > near.extent + 2


def test_prior_denoiser_is_constant_beyond_its_grid_and_broadcasts_levels():
    denoiser = PriorDenoiser(make_prior("gaussian", 2), NoisingProcess(3), cells=16, nodes=64)
    edge = torch.tensor([[1.0, 0.3]]) * denoiser.extent
    far = torch.tensor([[50.0, 0.3]]) * denoiser.extent
    torch.testing.assert_close(denoiser(edge, torch.tensor(2)), denoiser(far, torch.tensor(2)))
    z_t = torch.randn(3, 5, 2)
    together = denoiser(z_t, slice(1, 4))
    for t in (1, 2, 3):
        torch.testing.assert_close(together[t - 1], denoiser(z_t[t - 1], torch.tensor(t)))
        torch.testing.assert_close(together[t - 1], denoiser(z_t[t - 1], t))
    torch.testing.assert_close(together, denoiser(z_t, torch.tensor([1, 2, 3])[:, None]))
    t = torch.tensor([[3, 1, 2, 3, 1], [2, 2, 1, 3, 3]])
    mixed = denoiser(z_t[:2], t)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
        torch.testing.assert_close(mixed[*place], denoiser(z_t[*place], int(t[*place])))


def test_prior_denoiser_meets_its_table_at_the_nodes():
    denoiser = PriorDenoiser(make_prior("gaussian", 2), NoisingProcess(2), cells=16, nodes=64)
    axis = torch.linspace(-1, 1, 16) * denoiser.extent
    nodes = torch.cartesian_prod(axis, axis)
    for t in (1, 2):
        table = denoiser.table[t - 1].permute(2, 1, 0).reshape(256, 2)
        torch.testing.assert_close(denoiser(nodes, torch.tensor(t)), table, atol=1e-9, rtol=0)


@pytest.mark.parametrize("plain", [False, True])
def test_a_learned_noising_process_gets_the_gradient_of_the_bound(plain):
    """Of E_r[log q(z,a|x) − log r(a|z)] with respect to the levels, against finite differences under one noise."""
    posterior = perturbed("diffusion", steps=4, noise="learned")
    posterior.plain_gradient = plain
    levels = posterior.noise.log_snr
    x, z = torch.randn(5, 3), torch.randn(200, 5, 2)

    def value(what):
        torch.manual_seed(0)
        conditional = posterior(x)
        return (conditional.log_bound(z) if what == "bound" else conditional.draw((200,)).log_ratio).mean()

    for what in ("bound", "draw"):
        for values, found in zip(levels, torch.autograd.grad(value(what), list(levels)), strict=True):
            for index in range(len(values)):
                with torch.no_grad():
                    ends = []
                    for step in (1e-5, -2e-5):
                        values[index] += step
                        ends.append(value(what))
                    values[index] += 1e-5
                assert float((ends[0] - ends[1]) / 2e-5) == pytest.approx(float(found[index]), rel=1e-4, abs=1e-6)
    assert (posterior.noise.constants().alpha.diff() < 0).all()


def test_plain_level_weights_change_the_gradient_of_the_means_alone():
    bound, plain = (perturbed("diffusion", steps=4, level_weights=weights) for weights in ("bound", "plain"))
    plain.load_state_dict(bound.state_dict())
    x, z = torch.randn(6, 3), torch.randn(6, 2)

    def value(posterior):
        torch.manual_seed(0)
        return posterior(x).log_bound(z).sum()

    torch.testing.assert_close(value(plain), value(bound), atol=1e-10, rtol=0)
    torch.manual_seed(0)
    conditional, t = plain(x), slice(1, 5)
    z_t = conditional.noise.marginal(point(z.expand(4, 6, 2)), conditional.noise.at(t, 1)).sample()
    by_hand = -0.5 * (conditional.predict(z_t, t).mean - z).square().sum()
    # The last layer's rows for the means hear of the plain loss alone, those for the covariance of the bound alone.
    weight = plain.denoiser.exit.weight
    found, denoising, whole = (
        torch.autograd.grad(v, w)[0]
        for v, w in ((value(plain), weight), (by_hand, weight), (value(bound), bound.denoiser.exit.weight))
    )
    torch.testing.assert_close(found[:2], denoising[:2], atol=1e-10, rtol=0)
    torch.testing.assert_close(found[2:], whole[2:], atol=1e-10, rtol=0)
    assert (found[:2] - whole[:2]).abs().max() > 1e-3


@pytest.mark.parametrize(("option", "given"), [("covariance", "ful"), ("level_weights", "plian")])
def test_unknown_forms_of_a_chain_are_refused(option, given):
    with pytest.raises(InputError, match=f"'{given}'.*did you mean"):
        DiffusionPosterior(nn.Linear(3, 4), 2, **{option: given})
