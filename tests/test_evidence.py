"""The exact evidence against closed forms, brute force and importance sampling."""

import math
import os

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from conftest import LinearGaussian, set_linear
from ddvi import data
from ddvi.composition import build_model, make_objective, observe
from ddvi.errors import InputError
from ddvi.evaluation import importance_weighted_bound, prepared
from ddvi.evidence import exact_log_likelihood
from ddvi.likelihoods import BernoulliLikelihood, GaussianLikelihood, Likelihood
from ddvi.posteriors.gaussian import GaussianPosterior
from ddvi.priors import make_prior
from ddvi.randomness import generator, random_state, seeded
from ddvi.schedule import Phase, Schedule
from ddvi.settings import resolve
from ddvi.training import Trainer

QUICK_NODES = 10_000  # what a quick evaluation takes
STRUCTURED = ("pinwheel", "swiss_roll", "less_noisy_square", "gaussian_mixture")
double = pytest.mark.usefixtures("float64")


def linear_gaussian(decoder, scale):
    """Prior N(0, I), likelihood N(A z, scale²), and the evidence."""
    layer = nn.Linear(2, len(decoder))
    set_linear(layer, decoder, torch.zeros(len(decoder)))
    likelihood = GaussianLikelihood(layer, torch.Size([len(decoder)]), torch.full((1,), scale))
    return likelihood, MultivariateNormal(torch.zeros(len(decoder)), decoder @ decoder.T + scale**2 * torch.eye(2))


def bernoulli(steepness=1.0, features=30, dtype=None):
    """A random nonlinear decoder, the steeper the narrower its posteriors."""
    with seeded(3):
        decoder = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, features)).to(torch.float64)
        with torch.no_grad():
            for layer in (decoder[0], decoder[2]):
                layer.weight.copy_(torch.randn_like(layer.weight) * (1.2 if layer is decoder[0] else steepness))
                layer.bias.copy_(torch.randn_like(layer.bias))
    return BernoulliLikelihood(decoder.to(dtype or torch.float64), torch.Size([features]))


def simulate(prior, likelihood, count, seed=4):
    with seeded(seed), torch.no_grad():
        z = prior.sample((count,))
        return z, likelihood(z).sample()


@torch.no_grad()
def brute_force(prior, likelihood, x, half, finest):
    """log p(x) by the centres of small squares: of spacing `finest` wherever a coarser grid finds anything at all."""
    coarse = 2 * half / 240
    steps = torch.arange(-half, half, coarse) + coarse / 2
    z = torch.cartesian_prod(steps, steps)
    joint = likelihood.pairwise_log_prob(x, z) + prior.log_prob(z)
    z = z[(joint - joint.amax(1, keepdim=True) > -60).any(0)]
    parts = max(1, math.ceil(coarse / finest))
    fine = (torch.arange(parts) + 0.5) / parts - 0.5
    z = (z[:, None] + coarse * torch.cartesian_prod(fine, fine).view(-1, 2)).view(-1, 2)
    chunks = [likelihood.pairwise_log_prob(x, part) + prior.log_prob(part) for part in z.split(50_000)]
    return torch.cat(chunks, 1).logsumexp(1) + 2 * math.log(coarse / parts)


# Against closed forms


@double
@pytest.mark.parametrize("scale", [1.0, 0.3, 0.05, 0.01, 0.003])
@pytest.mark.parametrize("shape", ["round", "oblique", "along one axis", "flat"])
def test_linear_gaussian_evidence(scale, shape):
    """Posteriors down to a fiftieth of the lattice's spacing, anywhere between its nodes, each example exact."""
    cosine, sine = math.cos(0.6), math.sin(0.6)
    decoder = {
        "round": torch.eye(2),
        "oblique": torch.tensor([[cosine, -sine], [0.05 * sine, 0.05 * cosine]]),
        "along one axis": torch.tensor([[1.0, 0.0], [0.0, 0.02]]),
        "flat": torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
    }[shape]
    likelihood, evidence = linear_gaussian(decoder, scale)
    z = torch.randn(100, 2)
    x = z @ decoder.T + scale * torch.randn(100, 2)
    found = exact_log_likelihood(make_prior("gaussian"), likelihood, x, nodes=QUICK_NODES)
    error = (found.log_likelihood - evidence.log_prob(x)).abs()
    assert found.change.max() < 0.01
    assert error.max() < 0.01
    assert error.mean() < 5e-4, "a doubling cancels the leading error, so most are far better than the tolerance"


@double
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3, 0.4, 1.0])
def test_never_done_by_accident(fraction):
    """Old and new nodes agree by accident for a few percent of posteriors much narrower than the spacing."""
    scale = fraction * 0.15  # the spacing of a quick evaluation's lattice
    likelihood, evidence = linear_gaussian(torch.eye(2), scale)
    x = torch.randn(600, 2)
    found = exact_log_likelihood(make_prior("gaussian"), likelihood, x, nodes=QUICK_NODES)
    assert (found.log_likelihood - evidence.log_prob(x)).abs().max() < 0.01


@double
@pytest.mark.parametrize("scale", [0.3, 0.01])
def test_each_alone_is_as_exact_as_in_company(scale):
    """Cells are dropped for want of mass, and a narrow posterior has none at nodes beside it."""
    likelihood, evidence = linear_gaussian(torch.eye(2), scale)
    for x in torch.randn(8, 1, 2):
        found = exact_log_likelihood(make_prior("gaussian"), likelihood, x, nodes=QUICK_NODES)
        assert found.log_likelihood.item() == pytest.approx(evidence.log_prob(x).item(), abs=0.01)


class Box(Likelihood):
    """p(x | z) = ¼ where all entries of x − z are within 1, and nothing beyond."""

    event_shape = torch.Size([2])

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, z):
        raise NotImplementedError

    def log_prob(self, x, z):
        return torch.where(((x - z).abs() < 1).all(-1), -math.log(4), -math.inf)

    def pairwise_log_prob(self, x, z):
        return self.log_prob(x[:, None], z)


@double
def test_an_impossible_example_leaves_the_others_as_they_are():
    x = torch.tensor([[0.0, 0.0], [0.5, 0.3], [-1.0, 1.5], [40.0, 40.0]])
    normal = torch.distributions.Normal(0.0, 1.0)
    exact = ((normal.cdf(x + 1) - normal.cdf(x - 1)).prod(-1) / 4).log()
    found = exact_log_likelihood(make_prior("gaussian"), Box(), x, nodes=1000)
    torch.testing.assert_close(found.log_likelihood[:3], exact[:3], atol=0.02, rtol=0)
    assert found.log_likelihood[3] == -math.inf


@double
@pytest.mark.parametrize("scale", [0.5, 0.02])
def test_outliers_in_the_tail_of_the_prior(scale):
    likelihood, evidence = linear_gaussian(torch.eye(2), scale)
    x = torch.tensor([[4.5, 0.0], [0.0, -5.0], [3.6, 3.6], [-4.0, 4.0]])
    found = exact_log_likelihood(make_prior("gaussian"), likelihood, x)
    torch.testing.assert_close(found.log_likelihood, evidence.log_prob(x), atol=0.01, rtol=0)


@double
@pytest.mark.parametrize("name", STRUCTURED)
def test_a_likelihood_that_ignores_z_is_the_evidence(name):
    """Or: the lattice holds all of the prior."""
    likelihood = bernoulli()
    with torch.no_grad():
        likelihood.decoder[2].weight.zero_()
        x = torch.ones(1, 30)
        expected = likelihood.log_prob(x, torch.zeros(1, 2))
    found = exact_log_likelihood(make_prior(name), likelihood, x, nodes=QUICK_NODES)
    torch.testing.assert_close(found.log_likelihood, expected, atol=1e-6, rtol=0)


def test_not_resolved_is_said(float64):
    likelihood, _ = linear_gaussian(torch.eye(2), 1e-3)
    x = torch.randn(20, 2)
    found = exact_log_likelihood(make_prior("gaussian"), likelihood, x, nodes=QUICK_NODES, doublings=6)
    assert (found.change == math.inf).all(), "no lattice of this spacing can tell"


# Against brute force


@double
@pytest.mark.parametrize("name", STRUCTURED)
def test_brute_force(name):
    prior, likelihood = make_prior(name), bernoulli()
    _, x = simulate(prior, likelihood, 12)
    found = exact_log_likelihood(prior, likelihood, x, nodes=QUICK_NODES)
    expected = brute_force(prior, likelihood, x, half=3.6, finest=0.02)
    assert found.change.max() < 0.01
    torch.testing.assert_close(found.log_likelihood, expected, atol=2e-3, rtol=0)


@double
@pytest.mark.parametrize("steepness", [5.0, 40.0])
def test_brute_force_narrow_posteriors_on_the_swiss_roll(steepness):
    prior, likelihood = make_prior("swiss_roll"), bernoulli(steepness)
    _, x = simulate(prior, likelihood, 8)
    found = exact_log_likelihood(prior, likelihood, x, nodes=QUICK_NODES)
    expected = brute_force(prior, likelihood, x, half=3.6, finest=0.025 / max(1.0, steepness / 5))
    assert found.change.max() < 0.01
    torch.testing.assert_close(found.log_likelihood, expected, atol=0.02, rtol=0)


# Stability


@pytest.mark.parametrize("name", [*STRUCTURED, "gaussian"])
@pytest.mark.parametrize("steepness", [1.0, 8.0])
def test_change_bounds_the_error(name, steepness):
    """Four times the nodes and a tenth of the tolerance don't move a smooth posterior's evidence beyond its `change`.

    Steep decoders fold the plane: single examples move by more, the mean doesn't.
    """
    prior, likelihood = make_prior(name), bernoulli(steepness, dtype=torch.float32)
    _, x = simulate(prior, likelihood, 40)
    coarse = exact_log_likelihood(prior, likelihood, x, nodes=5000)
    fine = exact_log_likelihood(prior, likelihood, x, nodes=20_000, tolerance=1e-3)
    moved = (fine.log_likelihood - coarse.log_likelihood).abs()
    if steepness == 1:
        assert (moved <= coarse.change + fine.change + 1e-4).all()
    assert (moved < 0.01).double().mean() > 0.8
    assert moved.mean() < 0.01
    assert moved.max() < 0.1
    assert coarse.change.max() <= 0.01
    assert fine.nodes > coarse.nodes > 5000


@pytest.mark.parametrize("name", ["pinwheel", "less_noisy_square"])
def test_single_precision_is_enough(name):
    prior, single, full = make_prior(name), bernoulli(3.0, dtype=torch.float32), bernoulli(3.0)
    _, x = simulate(prior, single, 20)
    found = exact_log_likelihood(prior, single, x, nodes=5000)
    expected = exact_log_likelihood(prior.double(), full, x.double(), nodes=5000)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, atol=1e-3, rtol=0)
    assert found.log_likelihood.dtype == torch.float64


# Against importance sampling


@double
@pytest.mark.parametrize("draws", [5000])
def test_importance_sampling_from_an_anchored_posterior(correlated: LinearGaussian, draws):
    posterior = GaussianPosterior(correlated.encoder(), 2)
    weight = torch.cat([correlated.gain, torch.zeros(2, 3)])
    # Half as wide again as the best diagonal Gaussian, so that the weights are bounded.
    variance = 2.25 * correlated.covariance.diagonal()
    set_linear(posterior.head, weight, torch.cat([-correlated.gain @ correlated.offset, variance.log()]))
    model = correlated.model(posterior)
    _, x = correlated.simulate(40)
    with torch.no_grad():
        log_weights = model.log_weights(x, draws)
        found = exact_log_likelihood(model.prior, model.likelihood, x, nodes=QUICK_NODES)
    assert_agrees_with_importance_sampling(found, log_weights)


@double
@pytest.mark.parametrize("name", ["pinwheel", "less_noisy_square", "gaussian_mixture"])
def test_importance_sampling_from_the_prior(name):
    """The prior is the broadest proposal there is: its bound converges for posteriors that aren't too narrow."""
    prior, likelihood = make_prior(name), bernoulli(0.5)
    _, x = simulate(prior, likelihood, 30)
    found = exact_log_likelihood(prior, likelihood, x, nodes=QUICK_NODES)
    with torch.no_grad():
        log_weights = likelihood.pairwise_log_prob(x, prior.sample((5000,), generator=generator(1))).T
    assert_agrees_with_importance_sampling(found, log_weights)


def assert_agrees_with_importance_sampling(found, log_weights):
    bound = log_weights.logsumexp(0) - math.log(len(log_weights))
    error = (log_weights - bound).exp().std(0) / math.sqrt(len(log_weights))
    assert error.max() < 0.1
    assert ((found.log_likelihood - bound).abs() < 4.5 * error + found.change + 0.002).all()
    assert (found.log_likelihood - bound).mean() > -4 * error.mean() / math.sqrt(bound.numel()) - 0.002


# Contract


def test_only_the_plane():
    with pytest.raises(InputError, match="2 dimensions, not \\(3,\\)"):
        exact_log_likelihood(make_prior("gaussian", 3), bernoulli(), torch.zeros(1, 30))


def test_random_state_and_parameters_are_left_alone():
    prior, likelihood = make_prior("less_noisy_square"), bernoulli(dtype=torch.float32)
    _, x = simulate(prior, likelihood, 3)
    before, said = random_state()["cpu"], []
    first = exact_log_likelihood(prior, likelihood, x, nodes=2000, report=said.append)
    assert torch.equal(random_state()["cpu"], before)
    torch.rand(7)
    second = exact_log_likelihood(prior, likelihood, x, nodes=2000)
    assert torch.equal(first.log_likelihood, second.log_likelihood), "the lattice is the same for every caller"
    assert first.nodes == second.nodes
    assert not first.log_likelihood.requires_grad
    assert len(said) >= 2
    assert f"{first.nodes:,} nodes, 0 of 3 examples" in said[-1]


# On real data


@pytest.mark.slow
@pytest.mark.skipif("DDVI_DATA" not in os.environ, reason="DDVI_DATA names no folder with MNIST")
@pytest.mark.parametrize("name", [*STRUCTURED, "gaussian"])
def test_mnist(name):
    dataset = data.load("mnist", os.environ["DDVI_DATA"], limit=2000)
    settings = resolve("mnist", "vae", name, {"hidden_size": 200})
    with seeded(0):
        model = build_model(settings, observe(dataset, settings))
        phases = (Phase(1, make_objective(settings)),)
        Trainer(model, Schedule(phases, batch_size=50, lr=2e-3), dataset.train_x).fit()
        model.eval()
        x = prepared(model.preprocessing, dataset.test_x[:300])
        found = exact_log_likelihood(model.prior, model.likelihood, x, nodes=QUICK_NODES)
        double = exact_log_likelihood(model.prior, model.likelihood, x, nodes=2 * QUICK_NODES)
        with torch.no_grad():
            bound = importance_weighted_bound(model, x[:100], 1000)
    assert (found.log_likelihood.mean() - double.log_likelihood.mean()).abs() < 0.05
    assert (found.log_likelihood - double.log_likelihood).abs().max() < 0.05
    assert found.change.max() <= 0.01
    excess = bound - found.log_likelihood[:100]
    assert excess.mean() < 0.05
    assert -600 < found.log_likelihood.mean() < -100
