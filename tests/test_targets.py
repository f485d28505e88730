"""Fixed targets: log Z and draws are held to closed forms, weights to the identities that they must keep."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Gamma, Independent, MultivariateNormal, Normal, constraints

import ddvi
from ddvi.annealing import anneal
from ddvi.errors import InputError
from ddvi.objectives.reweighted import effective_share, propose
from ddvi.posteriors.base import VARIANCE_FLOOR
from ddvi.posteriors.gaussian import GaussianPosterior
from ddvi.randomness import random_state, resample

SMALL = {"steps": 4, "denoiser_size": 32, "denoiser_layers": 2}
LOG_Z = 3.5
GAUSSIAN = MultivariateNormal(torch.tensor([4.0, -2.0]), torch.tensor([[4.0, 1.5], [1.5, 1.0]]))
OBJECTIVES = {
    "reverse": ddvi.ELBO(64),
    "reverse, path gradient": ddvi.ELBO(64, path_gradient=True),
    "log variance": ddvi.LogVariance(64),
    "reweighted": ddvi.Reweighted(256, 64),
    "tempered": ddvi.Tempered(ddvi.ELBO(64)),
}


@pytest.fixture(autouse=True)
def _own_randomness():
    with ddvi.seeded(0, "targets"):
        yield


def gaussian(z):
    return LOG_Z + GAUSSIAN.log_prob(z)


def blind(z):
    """The same without a gradient, as of code that isn't torch's."""
    return gaussian(z.detach())


def box(z):
    """Uniform on a box, which has no gradient."""
    return torch.where((z.abs() < 2).all(-1), 0.0, -torch.inf)


def pair(z):
    """Two unit Gaussians at ±6, of weights ¼ and ¾ and log Z = −1."""
    left, right = Normal(-6.0, 1.0).log_prob(z[..., 0]), Normal(6.0, 1.0).log_prob(z[..., 0])
    return -1 + torch.logaddexp(left + math.log(0.25), right + math.log(0.75))


def exact_target():
    """A diagonal Gaussian whose posterior is the Gaussian posterior itself."""
    mean, scale = torch.tensor([1.0, -3.0]), torch.tensor([0.5, 2.0])
    target = ddvi.Target(lambda z: LOG_Z + Normal(mean, scale).log_prob(z).sum(-1), 2, "vae", location=1.0, scale=4.0)
    with torch.no_grad():
        target.model.posterior.head.bias.copy_(torch.cat([(mean - 1) / 4, ((scale / 4) ** 2 - VARIANCE_FLOOR).log()]))
    return target


def test_an_exact_posterior_has_equal_weights_and_no_loss(float64):
    target = exact_target()
    draws = target.posterior().weighted(1000, seed=1)
    torch.testing.assert_close(draws.log_weight, torch.full((1000,), LOG_Z), atol=1e-9, rtol=0)
    assert draws.log_evidence.standard_error < 1e-9
    assert draws.effective_samples == pytest.approx(1000, rel=1e-8)
    batch = ddvi.Batch(torch.ones(1, 1))
    (update,) = ddvi.LogVariance(100).updates(target.model, batch)
    assert float(update.loss.detach()) < 1e-9
    (update,) = ddvi.ELBO(100).updates(target.model, batch)
    assert float(update.loss.detach()) == pytest.approx(-LOG_Z, abs=1e-9)
    (update,) = ddvi.Reweighted(100, 50).updates(target.model, batch)
    assert float(update.terms["exponent"]) == 1
    z = torch.tensor([[1.0, -3.0], [2.0, 0.0]])
    expected = Normal(torch.tensor([1.0, -3.0]), torch.tensor([0.5, 2.0])).log_prob(z).sum(-1)
    torch.testing.assert_close(target.posterior().log_prob(z).value, expected, atol=1e-9, rtol=0)


def test_half_the_variance_of_log_weights_has_the_gradient_of_the_reverse_divergence(float64):
    """Of N(m, s²) against N(0, 1): KL = ½ (m² + s² − 1) − log s, so ∂KL/∂m = m and ∂KL/∂log s² = ½ (s² − 1)."""
    target = ddvi.Target(lambda z: Normal(0.0, 1.0).log_prob(z[..., 0]), 1, "vae")
    head = target.model.posterior.head
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.4, math.log(0.5)]))
    (update,) = ddvi.LogVariance(400_000).updates(target.model, ddvi.Batch(torch.ones(1, 1)))
    (gradient,) = torch.autograd.grad(update.loss.sum(), head.bias)
    torch.testing.assert_close(gradient, torch.tensor([0.4, -0.25]), atol=0.01, rtol=0)


@pytest.mark.parametrize("posterior", ["ddvi", "vae", "iaf_vae", "nsf_vae", "h_iaf_vae"])
def test_untrained_a_posterior_is_the_base(posterior):
    settings = SMALL if posterior == "ddvi" else {}
    target = ddvi.Target(gaussian, 2, posterior, location=3.0, scale=torch.tensor([5.0, 2.0]), **settings)
    z = target.posterior().sample((20_000,), seed=1)
    if posterior != "h_iaf_vae":  # which begins at a mixture of such
        torch.testing.assert_close(z.mean(0), torch.tensor([3.0, 3.0]), atol=0.15, rtol=0)
        torch.testing.assert_close(z.std(0), torch.tensor([5.0, 2.0]), rtol=0.03, atol=0)
    (update,) = ddvi.Reweighted(64, 32).updates(target.model, ddvi.Batch(torch.ones(1, 1)))
    assert update.loss.shape == (1,)
    assert update.loss.isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.slow
def test_every_objective_finds_a_correlated_gaussian_and_its_normaliser(objective):
    target = ddvi.Target(gaussian, 2, objective=objective, scale=6.0, **SMALL).fit(400, lr=5e-3)
    draws = target.posterior().weighted(20_000, seed=1)
    value, error, samples = draws.log_evidence
    assert samples == 20_000
    assert abs(value - LOG_Z) < max(4 * error, 0.02)
    assert draws.effective_samples > 4000
    assert LOG_Z - 0.7 < target.posterior().elbo(2000, seed=1).value < LOG_Z
    moments = draws.resample(10_000)
    torch.testing.assert_close(moments.mean(0), GAUSSIAN.mean, atol=0.1, rtol=0)
    torch.testing.assert_close(torch.cov(moments.T), GAUSSIAN.covariance_matrix, atol=0.25, rtol=0)


@pytest.mark.slow
def test_a_mode_that_the_posterior_has_lost_comes_back():
    """Weighted draws of the base find it again; the reverse divergence stays where it is."""
    for objective, found in ((ddvi.ELBO(64), 0.0), (ddvi.Reweighted(512, 128, least_effective=0), 0.75)):
        target = ddvi.Target(pair, 1, objective=objective, scale=6.0, **SMALL)
        with torch.no_grad():
            target.model.posterior.anchor.bias.copy_(torch.tensor([-1.0, 2 * math.log(1 / 6)]))  # at −6, of width 1
        target.fit(300, lr=5e-3)
        assert float((target.posterior().sample((4000,), seed=1) > 0).float().mean()) == pytest.approx(found, abs=0.08)


def test_draws_of_the_mixture_keep_the_evidence_where_draws_of_the_posterior_lose_a_mode():
    target = ddvi.Target(pair, 1, "vae", scale=6.0)
    with torch.no_grad():
        target.model.posterior.head.bias.copy_(torch.tensor([1.0, 2 * math.log(1 / 6)]))  # at 6, of width 1
    alone = target.posterior().weighted(20_000, seed=1).log_evidence.value
    both = target.posterior().weighted(20_000, seed=1, base_share=0.3).log_evidence
    assert alone == pytest.approx(-1 + math.log(0.75), abs=0.05)
    assert abs(both.value + 1) < 4 * both.standard_error < 0.1


def test_the_standard_error_fits_repetitions():
    fitted = ddvi.Target(gaussian, 2, "vae", location=2.0, scale=4.0).posterior()
    estimates = [fitted.log_evidence(2000, seed) for seed in range(60)]
    spread = torch.stack([estimate.value for estimate in estimates]).std()
    said = torch.stack([estimate.standard_error for estimate in estimates]).mean()
    assert 0.75 < said / spread < 1.35


def test_proposals_of_the_mixture_are_weighted_by_their_density():
    """E_m[ p(z) r(a | z) / m ] = 1 for any posterior, since the prior is normalised."""
    target = ddvi.Target(pair, 1, scale=6.0, **SMALL)
    with torch.no_grad():
        for parameter in target.model.posterior.denoiser.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    one = torch.ones(1, 1)
    proposals = propose(target.model, target.model.posterior(one), one, 100_000, 0.3)
    weight = (proposals.log_prior - proposals.log_mixture).exp()
    assert float(weight.max()) <= 1 / 0.3 + 1e-3
    assert abs(float(weight.mean()) - 1) < 4 * float(weight.std()) / 100_000**0.5


def test_systematic_resampling_gives_each_candidate_its_share():
    weight = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]]).T
    counts = torch.nn.functional.one_hot(resample(weight.log(), 1001), 4).sum(0).T
    assert ((counts - 1001 * weight).abs() < 1).all()
    assert effective_share(weight.log()).tolist() == pytest.approx([1 / 0.345 / 4, 1.0])


def test_what_has_no_weight_isnt_resampled(monkeypatch):
    monkeypatch.setattr(torch, "rand", torch.zeros)
    weight = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]]).T
    assert resample(weight.log(), 1).tolist() == [[1, 0]]


def test_every_one_of_those_resampled_is_a_fair_draw():
    weight = torch.tensor([0.1, 0.5, 0.15, 0.25])
    chosen = resample(weight.log()[:, None].expand(-1, 40_000), 3)
    for each in chosen:
        share = torch.nn.functional.one_hot(each, 4).double().mean(0)
        assert ((share - weight).abs() < 4 * (weight * (1 - weight) / 40_000).sqrt()).all()


def test_particles_reach_both_wells_and_estimate_the_evidence():
    target = ddvi.Target(pair, 1, steps=2, scale=8.0)
    runs = [anneal(target.model, torch.ones(1, 1), 4000) for _ in range(5)]
    z = target.bijection(torch.cat([run.z for run in runs]))
    assert float((z > 0).float().mean()) == pytest.approx(0.75, abs=0.04)
    torch.testing.assert_close(z[z > 0].std(), torch.tensor(1.0), atol=0.06, rtol=0)
    assert sum(run.log_evidence for run in runs) / 5 == pytest.approx(-1, abs=0.05)


@pytest.mark.slow
def test_annealed_particles_teach_eight_wells():
    def log_joint(z):
        return pair(z[..., :1]) + pair(z[..., 1:2]) + pair(z[..., 2:])

    target = ddvi.Target(log_joint, 3, scale=8.0, **SMALL).fit_annealed(8000, steps=600, lr=5e-3)
    draws = target.posterior().weighted(20_000, seed=1)
    assert abs(draws.log_evidence.value + 3) < 0.15
    right = (draws.resample(10_000) > 0).float()
    torch.testing.assert_close(right.mean(0), torch.full((3,), 0.75), atol=0.06, rtol=0)
    assert float((right == 0).all(-1).float().mean()) == pytest.approx(1 / 64, abs=0.015)


@pytest.mark.slow
def test_a_positive_target_has_its_normaliser_and_its_density():
    density = Independent(Gamma(torch.full((2, 1), 3.0), 2.0), 2)
    target = ddvi.Target(lambda z: 2 + density.log_prob(z), (2, 1), support=constraints.positive, **SMALL)
    fitted = target.fit(300, lr=5e-3).posterior()
    draws = fitted.weighted(20_000, seed=1)
    assert draws.z.shape == (20_000, 2, 1)
    assert abs(draws.log_evidence.value - 2) < 0.03
    z = torch.full((3, 2, 1), 1.3)
    estimate = fitted.log_prob(z, 200, seed=1)
    assert estimate.value.shape == (3,)
    torch.testing.assert_close(estimate.value, density.log_prob(z), atol=0.4, rtol=0)


def test_saved_and_loaded_it_answers_the_same(tmp_path):
    path = tmp_path / "target.safetensors"
    target = ddvi.Target(gaussian, 2, location=1.0, scale=torch.tensor([5.0, 3.0]), **SMALL).fit(5)
    target.save(path)
    loaded = ddvi.Target.load(path, gaussian)
    assert torch.equal(loaded.posterior().sample((5,), seed=1), target.posterior().sample((5,), seed=1))
    assert loaded.history == target.history
    for given in ({"posterior": GaussianPosterior}, {"objective": ddvi.ELBO()}, {"support": constraints.positive}):
        with pytest.raises(InputError, match=f"was learnt without {next(iter(given))}=; give load what Target"):
            ddvi.Target.load(path, gaussian, **given)
    with pytest.raises(InputError, match="holds no inference that was saved"):
        ddvi.Inference.load(path)
    with pytest.raises(InputError, match="there is no file"):
        ddvi.Target.load(tmp_path / "nothing", gaussian)


def test_objects_that_a_file_cannot_hold_are_asked_for_again(tmp_path):
    given = {"support": constraints.positive, "objective": ddvi.LogVariance(8)}
    ddvi.Target(lambda z: -z.sum(-1), 2, **given, **SMALL).save(tmp_path / "target")
    for name in given:
        fewer = {other: value for other, value in given.items() if other != name}
        with pytest.raises(InputError, match=f"was learnt with {name}=; give load what Target was given"):
            ddvi.Target.load(tmp_path / "target", lambda z: -z.sum(-1), **fewer)


def test_a_constant_density_has_no_slope_to_miss():
    """Of the uniform distribution on an interval."""
    flat = ddvi.Target(lambda z: torch.zeros(len(z)), 1, objective=ddvi.ELBO(16), support=constraints.unit_interval)
    assert flat.fit(3).history


def test_a_density_may_be_anything_but_torch():
    density = lambda z: torch.as_tensor(-np.square(z.numpy()).sum(-1))  # noqa: E731
    assert ddvi.Target(density, 2, objective=ddvi.LogVariance(8), steps=2).fit(3).history


def test_a_learned_noising_process_needs_nothing_else():
    assert ddvi.Target(gaussian, 2, noise="learned", steps=2).fit(3).history


def test_draws_that_torch_would_refuse_are_without_mass():
    """Of a distribution with a scale that overflows for the farthest draws of a broad base."""
    density = lambda z: Normal(0.0, z.exp()).log_prob(torch.tensor(1.0)).sum(-1) - (z / 50).square().sum(-1) / 2  # noqa: E731
    target = ddvi.Target(density, 1, scale=26.0, steps=2).fit(20)
    assert target.posterior().log_evidence(20_000, seed=1).samples == 20_000
    target.fit_annealed(300, moves=2, steps=5)
    with pytest.raises(InputError, match="NaN or"):
        ddvi.Target(density, 1, scale=100.0)


def test_the_same_seed_learns_the_same_and_the_callers_state_stays():
    before = random_state()["cpu"]
    fits = [ddvi.Target(gaussian, 2, **SMALL).fit(3) for _ in range(2)]
    assert torch.equal(random_state()["cpu"], before)
    assert torch.equal(*(target.posterior().sample((4,), seed=1) for target in fits))
    assert len(fits[0].fit(250).history) == 4
    assert fits[0].history[-1]["epoch"] == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ddvi.Target(lambda z: z, 2), r"gives shape \(64, 2\)"),
        (lambda: ddvi.Target(GAUSSIAN, 2), "can't be called; give its log_prob"),
        (lambda: ddvi.Target(gaussian, "2"), "shape='2' is no shape of a z"),
        (lambda: ddvi.Target(blind, 2, objective=ddvi.ELBO(8)), "no gradient in z, which ELBO needs; use ddvi.Rew"),
        (lambda: ddvi.Target(blind, 2, objective=ddvi.Tempered(ddvi.ELBO(8))), "no gradient in z, which Tempered"),
        (
            lambda: ddvi.Target(box, 2, objective=ddvi.ELBO(8)),
            "which ELBO needs; use ddvi.Reweighted$",
        ),
        (lambda: ddvi.Target(gaussian, 2).fit_annealed(1, batch_size=1), "particles=1 are too few"),
        (lambda: ddvi.Target(blind, 2).fit_annealed(300), "no gradient in z, which annealing needs"),
        (lambda: ddvi.Target(lambda z: z.sum(-1) * math.nan, 2), "NaN"),
        (lambda: ddvi.Target(lambda z: z.sum(-1) - math.inf, 2), "move it by location"),
        (lambda: ddvi.Target(gaussian, 2, scale=0.0), "scale isn't positive"),
        (lambda: ddvi.Target(gaussian, 2, location=torch.zeros(3)), "one for each of 2"),
        (lambda: ddvi.Target(gaussian, 2, hidden_size=3), "no effect on a fixed target"),
        (lambda: ddvi.Target(gaussian, 2, "aae"), "has no density"),
        (lambda: ddvi.Target(gaussian, 2, "ddvi", stepz=3), "did you mean 'steps'"),
        (lambda: ddvi.Target(gaussian, 2).fit(0), "at least 1"),
        (lambda: ddvi.Target(gaussian, 2).fit_annealed(10), "doesn't fit 10 particles"),
        (lambda: ddvi.Target(gaussian, 2).fit_annealed(steps=0), "steps=0 is too few"),
        (lambda: ddvi.Target(gaussian, 2).fit_annealed(lr=-1), "lr=-1 must be above 0"),
        (lambda: ddvi.Target(gaussian, 2).posterior().log_prob(torch.zeros(3)), "is needed"),
        (lambda: ddvi.Target(gaussian, 2).posterior().weighted(1), "at least 2 samples, not 1"),
        (lambda: ddvi.Target(gaussian, 2).posterior().log_evidence(1e3), "samples=1000.0 is no whole number"),
        (lambda: ddvi.Target(gaussian, 2).posterior().weighted(9, base_share=2.0), "base_share=2.0 is no share"),
        (lambda: ddvi.LogVariance(1), "samples=1 is impossible in LogVariance; give 2 or more"),
        (lambda: ddvi.Reweighted(levels=0), "levels=0 is impossible in Reweighted"),
        (lambda: ddvi.Reweighted(prior_share=1.0), "below 1"),
        (lambda: ddvi.Tempered(ddvi.ELBO(), rise=0.0), "correct them"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(("draws", "share"), [(10, 0.96), (2, 0.9), (3, 0.99)])
def test_a_share_that_rounds_to_all_draws_leaves_one_to_the_posterior(draws, share):
    target = ddvi.Target(gaussian, 2, steps=2).fit(steps=5)
    log_weight = target.posterior().weighted(draws, seed=0, base_share=share).log_weight
    assert log_weight.isfinite().all()
    assert len(log_weight) == draws
