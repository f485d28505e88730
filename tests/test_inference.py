"""Own models: what is learnt is held to posteriors that are known in closed form."""

import functools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import (
    Beta,
    Dirichlet,
    Distribution,
    Gamma,
    Independent,
    Multinomial,
    MultivariateNormal,
    Normal,
    Poisson,
    Uniform,
    constraints,
)
from torch.utils.data import DataLoader, TensorDataset

import ddvi
from ddvi import checkpoint
from ddvi.arrays import as_tensor
from ddvi.errors import InputError
from ddvi.own import check_scored
from ddvi.posteriors.diffusion import DiffusionConditional
from ddvi.randomness import random_state
from ddvi.supports import Bijection, sections

SMALL = {"hidden_size": 32, "steps": 4, "denoiser_size": 32, "denoiser_layers": 2}
DECODER = torch.tensor([[1.0, 0.8], [0.3, 0.5], [0.5, 0.6]])
SCALE = 0.4
MEAN = torch.tensor([1.0, -2.0])
COVARIANCE = (torch.eye(2) / 4 + DECODER.T @ DECODER / SCALE**2).inverse()
"""Of the posterior of z ~ N(MEAN, 4 I), x = DECODER z + SCALE ε, whose correlation is −0.94."""


@pytest.fixture(autouse=True)
def _own_randomness():
    with ddvi.seeded(0, "inference"):
        yield


def prior():
    return MultivariateNormal(MEAN, 4 * torch.eye(2))


def likelihood(z):
    return Independent(Normal(z @ DECODER.T, SCALE), 1)


def observations(count):
    return likelihood(prior().sample((count,))).sample()


def exact(x):
    mean = (MEAN / 4 + x @ DECODER / SCALE**2) @ COVARIANCE
    return MultivariateNormal(mean, COVARIANCE)


def evidence(x):
    covariance = 4 * DECODER @ DECODER.T + SCALE**2 * torch.eye(3)
    return MultivariateNormal(DECODER @ MEAN, covariance).log_prob(x)


@pytest.fixture(scope="module")
def learnt():
    with ddvi.seeded(0, "learnt"):
        x = observations(2000)
    return ddvi.Inference(prior(), likelihood, **SMALL).fit(x, validation=100, epochs=25, lr=3e-3)


def misfit(posterior, expected, draws=4000):
    """Largest error of the means, in deviations of the posterior, and of the covariances, relative."""
    z = posterior.sample((draws,), seed=1)
    deviation = expected.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    errors = ((z.mean(0) - expected.mean) / deviation).abs().mean()
    covariance = torch.stack([torch.cov(part.T) for part in z.unbind(1)]).mean(0)
    return float(errors), float((covariance - COVARIANCE).norm() / COVARIANCE.norm())


@pytest.mark.slow
def test_a_correlated_posterior_is_found_and_its_numbers_are_honest(learnt):
    x = observations(100)
    posterior, expected = learnt.posterior(x), exact(x)
    mean, covariance = misfit(posterior, expected)
    assert mean < 0.12
    assert covariance < 0.1
    elbo, bound = posterior.elbo(100, seed=1), posterior.importance_weighted_bound(500, seed=1)
    gap = evidence(x) - elbo.value
    assert -0.02 < gap.mean() < 0.08, "the best diagonal Gaussian loses 1.06 nats"
    error = (bound.value - evidence(x)) / bound.standard_error
    assert error.mean().abs() < 1
    assert (elbo.samples, bound.samples) == (100, 500)
    assert learnt.history[-1]["validation_bound"] > learnt.history[0]["validation_bound"]


@pytest.mark.slow
def test_the_density_and_its_standard_error_fit_repetitions(learnt):
    x = observations(20)
    posterior = learnt.posterior(x)
    z = posterior.sample((5,), seed=1)
    repeated = [posterior.log_prob(z, 50, seed) for seed in range(40)]
    spread = torch.stack([estimate.value for estimate in repeated]).std(0).square().mean().sqrt()
    said = torch.stack([estimate.standard_error for estimate in repeated]).square().mean().sqrt()
    assert 0.8 < said / spread < 1.25
    assert repeated[0].samples == 50
    closer = posterior.log_prob(z, 2000, seed=1).value - exact(x).log_prob(z)
    assert closer.mean().abs() < 0.05


@pytest.mark.slow
def test_saved_and_loaded_it_answers_the_same_and_goes_on(learnt, tmp_path):
    path = tmp_path / "posterior.safetensors"
    learnt.save(path)
    loaded = ddvi.Inference.load(path, prior(), likelihood)
    x = observations(4)
    for ask in (
        lambda posterior: posterior.sample((3,), seed=1),
        lambda posterior: posterior.predictive((3,), seed=1),
        lambda posterior: posterior.elbo(10, seed=1).value,
    ):
        assert torch.equal(ask(loaded.posterior(x)), ask(learnt.posterior(x)))
    assert loaded.history == learnt.history
    assert loaded.fit(observations(200), epochs=1).history[-1]["epoch"] == len(learnt.history) + 1


def test_predictive_draws_are_those_of_the_model():
    """At z ~ q the predictive mean and variance are those of DECODER z + SCALE ε."""
    posterior = ddvi.Inference(prior(), likelihood, "vae").fit(observations(64), epochs=1).posterior(observations(2))
    x, z = posterior.predictive((20_000,), seed=1), posterior.sample((20_000,), seed=2)
    variance = (z @ DECODER.T).var(0) + SCALE**2
    assert (((x.mean(0) - (z @ DECODER.T).mean(0)) / (2 * variance / 20_000).sqrt()).abs() < 4.5).all()
    torch.testing.assert_close(x.var(0), variance, rtol=0.06, atol=0)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "fixed pairs"])
@pytest.mark.slow
def test_simulations_alone_teach_the_posterior(fresh):
    def simulate(count):
        z = prior().sample((count,))
        return z.numpy(), likelihood(z).sample().numpy()

    inference = ddvi.Inference(**SMALL)
    inference.fit_simulations(simulate if fresh else simulate(5000), count=5000, validation=200, epochs=25, lr=3e-3)
    x = observations(100)
    mean, covariance = misfit(inference.posterior(x), exact(x))
    assert mean < 0.15
    assert covariance < 0.04
    bound = inference.history[-1]["validation_bound"] - float(inference.bijection.scale.log().sum())
    assert -0.3 < bound + exact(x).entropy()[0] < 0.15, "the best is the negative entropy of the posterior"
    with pytest.raises(InputError, match="simulations alone, so there is no prior"):
        inference.posterior(x).elbo(2)


@pytest.mark.slow
def test_a_positive_rate_has_the_posterior_of_its_conjugate_prior():
    """rate ~ Gamma(2, 0.5), five Poisson counts: Gamma(2 + Σ x, 0.5 + 5)."""
    rates = Gamma(2.0, 0.5)
    inference = ddvi.Inference(
        rates, lambda rate: Independent(Poisson(rate[..., None].expand(*rate.shape, 5)), 1), **SMALL
    )
    x = Poisson(rates.sample((1000, 1)).expand(1000, 5)).sample()
    inference.fit(x.long(), epochs=40, lr=3e-3)
    x = torch.tensor([[0.0, 1, 0, 0, 1], [3, 5, 2, 4, 6], [9, 12, 8, 15, 10]])
    posterior, expected = inference.posterior(x), Gamma(2 + x.sum(-1), 5.5)
    z = posterior.sample((5000,), seed=1)
    assert z.shape == (5000, 3)
    assert (z > 0).all()
    assert ((z.mean(0) - expected.mean) / expected.stddev).abs().max() < 0.2
    torch.testing.assert_close(z.std(0), expected.stddev, rtol=0.2, atol=0)
    grid = expected.mean * torch.tensor([0.8, 1.0, 1.3])[:, None]
    assert (posterior.log_prob(grid, 500, seed=1).value - expected.log_prob(grid)).abs().max() < 0.4
    evidence = (
        Gamma(2.0, 0.5).log_prob(grid[1]) + Poisson(grid[1, :, None]).log_prob(x).sum(-1) - expected.log_prob(grid[1])
    )
    torch.testing.assert_close(posterior.importance_weighted_bound(1000, seed=1).value, evidence, atol=0.02, rtol=0)


@pytest.mark.slow
class Rates(nn.Module):
    """Positive latents (*, 2) to the natural parameters of counts (*, 20)."""

    def forward(self, z):
        return (z @ torch.tensor([[3.0] * 10 + [0.5] * 10, [0.5] * 10 + [3.0] * 10])).log()


@pytest.mark.parametrize("setting", ["laplace", "guidance"])
def test_curvature_guides_constrained_latents_of_a_family(setting, tmp_path):
    """Where rates are positive: as many epochs with the curvature lose less. A loaded one is the same."""
    positive = Independent(Gamma(torch.full((2,), 3.0), 1.0), 1)
    family = ddvi.PoissonLikelihood(Rates(), torch.Size([20]))
    x = family(positive.sample((200,))).sample()
    given = {"train_likelihood": False, **SMALL}
    curved, plain = (ddvi.Inference(positive, family, **given, **more).fit(x, epochs=3) for more in ({setting: 2}, {}))
    found = [each.posterior(x[:50]).elbo(100, seed=1).value for each in (curved, plain)]
    assert found[0].mean() > found[1].mean() + 0.2
    curved.save(tmp_path / "curved.safetensors")
    again = ddvi.Inference.load(tmp_path / "curved.safetensors", positive, family, train_likelihood=False)
    torch.testing.assert_close(again.posterior(x[:50]).elbo(100, seed=1).value, found[0], atol=1e-4, rtol=0)


def test_weights_on_a_simplex_have_the_posterior_of_their_conjugate_prior():
    """weights ~ Dirichlet(1, 2, 3), 20 draws of categories: Dirichlet(concentration + counts)."""
    concentration = torch.tensor([1.0, 2.0, 3.0])

    def draws(weights):
        return Multinomial(20, weights, validate_args=False)

    inference = ddvi.Inference(Dirichlet(concentration), draws, **SMALL)
    x = draws(Dirichlet(concentration).sample((1000,))).sample()
    inference.fit(x, epochs=40, lr=3e-3)
    x = torch.tensor([[2.0, 8.0, 10.0], [10.0, 6.0, 4.0]])
    posterior, expected = inference.posterior(x), Dirichlet(concentration + x)
    z = posterior.sample((5000,), seed=1)
    torch.testing.assert_close(z.sum(-1), torch.ones(5000, 2))
    assert ((z.mean(0) - expected.mean) / expected.variance.sqrt()).abs().max() < 0.15
    torch.testing.assert_close(z.std(0), expected.variance.sqrt(), rtol=0.1, atol=0)
    value = posterior.log_prob(expected.mean, 500, seed=1).value
    assert (value - expected.log_prob(expected.mean)).abs().max() < 0.15


def test_a_product_scores_and_splits_its_parts():
    product = ddvi.Product(Gamma(2.0, 1.0), Dirichlet(torch.ones(3)), Independent(Beta(torch.ones(2), 2.0), 1))
    z = product.sample((4,))
    rate, weights, shares = product.split(z)
    assert [tuple(part.shape) for part in (z, rate, weights, shares)] == [(4, 6), (4,), (4, 3), (4, 2)]
    expected = Gamma(2.0, 1.0).log_prob(rate) + Dirichlet(torch.ones(3)).log_prob(weights)
    expected += Beta(torch.ones(2), 2.0).log_prob(shares).sum(-1)
    torch.testing.assert_close(product.log_prob(z), expected)
    nested = ddvi.Product(ddvi.Product(*product.factors[:2]), product.factors[2])
    torch.testing.assert_close(nested.log_prob(z), expected)
    inference = ddvi.Inference(product, lambda z: Independent(Normal(z, 0.1), 1), "vae")
    draws = inference.fit(product.sample((200,)), epochs=2).posterior(z).sample((50,))
    assert inference.bijection.contains(draws).all()
    assert inference.bijection.size == 5


class Scored:
    """A likelihood as an object."""

    def log_prob(self, x, z):
        return likelihood(z).log_prob(x)

    def sample(self, z):
        return likelihood(z).sample()


@pytest.mark.parametrize("form", ["function", "module", "object"])
def test_every_form_of_a_likelihood_scores_and_draws_the_same(form):
    module = nn.Module()
    module.forward = likelihood
    source = {"function": likelihood, "module": module, "object": Scored()}[form]
    own = ddvi.as_likelihood(source, torch.Size([3]))
    z, x = torch.randn(5, 4, 2), torch.randn(4, 3)
    torch.testing.assert_close(own.log_prob(x, z), likelihood(z).log_prob(x))
    torch.testing.assert_close(own.pairwise_log_prob(x, z[0]), likelihood(z[0]).log_prob(x[:, None]))
    with ddvi.seeded(1):
        drawn = own(z).sample()
    with ddvi.seeded(1):
        assert torch.equal(drawn, likelihood(z).sample())
    assert len(ddvi.Inference(prior(), source, "vae").fit(x, epochs=2).history) == 2


def test_what_simulations_have_taught_goes_on_after_it_was_loaded(tmp_path):
    simulator = lambda z: likelihood(z).sample()  # noqa: E731
    ddvi.Inference(prior(), simulator, "vae").fit_simulations(count=200, epochs=1).save(tmp_path / "file")
    again = ddvi.Inference.load(tmp_path / "file", prior(), simulator).fit_simulations(count=200, epochs=1)
    assert len(again.history) == 2


def test_what_was_loaded_may_be_recorded_and_fused(tmp_path):
    ddvi.Inference(prior(), likelihood, "vae").fit(observations(10), epochs=1).save(tmp_path / "file")
    again = ddvi.Inference.load(tmp_path / "file", prior(), likelihood, graphs=True, compile=True)
    assert (again.settings.graphs, again.settings.compile) == (True, True)


def test_a_bijection_takes_the_bounds_of_its_support_along():
    box = Independent(Uniform(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 3.0])), 1)
    bijection = Bijection(sections(box))
    assert bijection.double()(torch.zeros(5, 2, dtype=torch.float64)).tolist() == [[0.5, 1.0]] * 5
    elsewhere = bijection.to("meta")
    u = torch.zeros(5, 2, device="meta")
    assert elsewhere(u).device.type == elsewhere.log_volume(u).device.type == "meta"


def test_densities_by_many_draws_are_taken_in_portions(monkeypatch):
    posterior = ddvi.Inference(prior(), likelihood, **SMALL).fit(observations(64), epochs=2).posterior(observations(4))
    z, rows = posterior.sample((3,), seed=0), []
    whole = posterior.log_prob(z, 400, seed=1)
    monkeypatch.setattr("ddvi.posteriors.base.ROWS_AT_ONCE", 100)
    score = DiffusionConditional.log_ratio
    monkeypatch.setattr(
        DiffusionConditional, "log_ratio", lambda self, path: rows.append(path[0, ..., 0].numel()) or score(self, path)
    )
    parts = posterior.log_prob(z, 400, seed=1)
    assert max(rows) <= 100
    assert sum(rows) == 400 * 12
    assert ((parts.value - whole.value).abs() < 6 * (parts.standard_error + whole.standard_error)).all()


def test_a_partial_of_a_posterior_is_trained_as_its_class():
    few = functools.partial(ddvi.DiffusionPosterior, steps=3)
    for made in (few, ddvi.DiffusionPosterior):
        assert ddvi.Inference(prior(), likelihood, made).settings.objective == "reweighted_wake_sleep"
    assert ddvi.Inference(prior(), likelihood, lambda encoder, size: few(encoder, size)).settings.objective == "elbo"


def test_a_simulator_without_a_density_sleeps_but_has_no_bound():
    simulator = lambda z: likelihood(z).sample()  # noqa: E731
    inference = ddvi.Inference(prior(), simulator, "vae")
    with pytest.raises(InputError, match="use fit_simulations"):
        inference.fit(observations(10))
    inference.fit_simulations(count=500, epochs=3)
    x = observations(5)
    assert inference.posterior(x).predictive((2,)).shape == (2, 5, 3)
    with pytest.raises(InputError, match="without a density"):
        inference.posterior(x).elbo(2)
    two = ddvi.as_likelihood(simulator, torch.Size([3]))(torch.zeros(1, 2)).sample((2,))
    assert not torch.equal(two[0], two[1]), "each draw is its own"


def test_a_fixed_likelihood_stays_as_it_is_and_a_free_one_learns(tmp_path):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

        def forward(self, z):
            return Independent(Normal(self.layers(z.reshape(-1, 2)).reshape(*z.shape[:-1], 3), 1.0), 1)

    for train in (False, True):
        decoder = Decoder()
        before = {name: value.clone() for name, value in decoder.state_dict().items()}
        inference = ddvi.Inference(prior(), decoder, "vae", train_likelihood=train).fit(observations(50), epochs=2)
        same = [torch.equal(value, before[name]) for name, value in decoder.state_dict().items()]
        assert all(same) if not train else not any(same)
        inference.save(tmp_path / "model")
        again = ddvi.Inference.load(
            tmp_path / "model", prior(), Decoder() if train else decoder, train_likelihood=train
        )
        drawn = [each.posterior(torch.zeros(1, 3)).predictive((2,), seed=1) for each in (again, inference)]
        assert torch.equal(*drawn)


@pytest.mark.parametrize("form", ["array", "tensor", "lists", "loader", "batches", "pairs"])
def test_data_may_come_in_many_forms(form):
    x = torch.arange(12.0).view(6, 2)
    given = {
        "array": x.double().numpy(),
        "tensor": x,
        "lists": x.tolist(),
        "loader": DataLoader(TensorDataset(x, torch.zeros(6)), batch_size=4),
        "batches": iter(x.split(4)),
        "pairs": [(part.numpy(), None) for part in x.split(4)],
    }[form]
    assert torch.equal(as_tensor(given), x)
    assert as_tensor(x.long()).dtype == torch.int64


def test_a_number_that_torch_has_no_place_for_is_refused():
    with pytest.raises(InputError, match="too large for whole numbers"):
        as_tensor(np.array([[2**63 + 5]], dtype=np.uint64))


def test_a_loaders_order_is_decided_by_the_seed():
    x, found = torch.randn(40, 3), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        loader = DataLoader(TensorDataset(x), batch_size=7, shuffle=True)
        inference = ddvi.Inference(prior(), likelihood, "vae", hidden_size=4).fit(loader, epochs=1)
        found.append(inference.posterior(loader).sample((2,), seed=0))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*found)


@pytest.mark.parametrize("shape", [(), (2, 2)], ids=str)
def test_observations_and_latents_of_any_shape(shape):
    """x = z + ε with both of that shape."""
    normal = Normal(torch.zeros(shape), 1.0)
    inference = ddvi.Inference(
        Independent(normal, len(shape)) if shape else normal,
        lambda z: Independent(Normal(z, 0.5), len(shape)) if shape else Normal(z, 0.5),
        "vae",
    )
    posterior = inference.fit(torch.randn(64, *shape), epochs=2).posterior(torch.randn(3, *shape))
    assert posterior.sample((4, 2)).shape == (4, 2, 3, *shape)
    assert posterior.predictive().shape == (3, *shape)
    assert posterior.log_prob(posterior.mean(10)).value.shape == (3,)


def test_a_posterior_and_an_objective_of_ones_own(tmp_path):
    x = observations(100)
    encoder = nn.Linear(3, 5)
    inference = ddvi.Inference(
        prior(), likelihood, lambda encoder, size: ddvi.FlowPosterior(encoder, size, flow_layers=1),
        ddvi.ImportanceWeighted(3), encoder=encoder,
    ).fit(x, epochs=2)  # fmt: skip
    assert inference.model.posterior.encoder is encoder
    inference.save(tmp_path / "own")
    with pytest.raises(InputError, match="was learnt with encoder="):
        ddvi.Inference.load(tmp_path / "own", prior(), likelihood, posterior=ddvi.FlowPosterior, objective=ddvi.ELBO())
    instance = ddvi.GaussianPosterior(nn.Linear(3, 3), 2)
    assert ddvi.Inference(prior(), likelihood, instance).fit(x, epochs=1).model.posterior is instance


def test_training_is_repeatable_and_leaves_the_callers_random_state():
    x, before = observations(64), random_state()["cpu"]
    draws = [
        ddvi.Inference(prior(), likelihood, "vae", seed=3).fit(x, epochs=1).posterior(x).sample(seed=0) for _ in "ab"
    ]
    assert torch.equal(*draws)
    assert torch.equal(random_state()["cpu"], before)


@pytest.mark.slow
def test_one_observation_is_enough_for_its_own_posterior():
    x = torch.tensor([[3.0, 0.5, 1.0]])
    posterior = ddvi.Inference(prior(), likelihood, **SMALL).fit(x, epochs=400, lr=3e-3).posterior(x)
    gap = evidence(x) - posterior.elbo(1000, seed=1).value
    assert gap.abs() < 0.08


def inference():
    return ddvi.Inference(prior(), likelihood, "vae")


class Discrete:
    support = constraints.nonnegative_integer

    def sample(self, shape):
        return torch.zeros(*shape, 2)

    def log_prob(self, z):
        return z.sum(-1)


class Located(nn.Module):
    """N(location, 1) with a location that learns."""

    def __init__(self):
        super().__init__()
        self.location = nn.Parameter(torch.zeros(2))

    def sample(self, shape):
        return self.location.detach() + torch.randn(*shape, 2)

    def log_prob(self, z):
        return Normal(self.location, 1.0).log_prob(z).sum(-1)


@pytest.mark.parametrize(
    ("method", "objective"), [("vae", "auto"), ("vae", "marginal_likelihood"), ("ddvi", "reweighted_wake_sleep")]
)
def test_a_prior_with_parameters_learns_and_is_saved(method, objective, tmp_path):
    """x = z + ε, with x around 2: the best location is the mean of x."""
    noise = lambda z: Independent(Normal(z, 0.5), 1)  # noqa: E731
    x = 2 + torch.randn(300, 2)
    size = {"steps": 2, "denoiser_size": 8} if method == "ddvi" else {}
    learnt = ddvi.Inference(Located(), noise, method, objective, hidden_size=16, **size)
    learnt.fit(x, epochs=100, lr=3e-2)
    torch.testing.assert_close(learnt.prior.location.detach(), x.mean(0), atol=0.15, rtol=0)
    learnt.save(tmp_path / "located")
    other = Located()
    with torch.no_grad():
        other.location += 1.0
    loaded = ddvi.Inference.load(tmp_path / "located", other, noise)
    assert torch.equal(loaded.prior.location, learnt.prior.location)
    assert torch.equal(loaded.posterior(x).sample(seed=1), learnt.posterior(x).sample(seed=1)), (
        "whatever the given one was before"
    )


class Fussy:
    """Of three numbers, as only its own code knows."""

    def sample(self, z):
        return likelihood(z).sample()

    def log_prob(self, x, z):
        return -(z @ DECODER.T - x).square().sum(-1)


def test_a_fit_that_is_refused_leaves_nothing_behind():
    fresh = ddvi.Inference(prior(), Fussy())
    with pytest.raises(RuntimeError, match="size of tensor"):
        fresh.fit(torch.zeros(4, 4))
    with pytest.raises(InputError, match="nothing has been learnt yet"):
        fresh.posterior(torch.zeros(2, 4))
    simulated = ddvi.Inference()
    with pytest.raises(InputError, match="epochs=0"):
        simulated.fit_simulations((torch.randn(50, 3), torch.randn(50, 2)), epochs=0)
    assert simulated.fit_simulations((torch.randn(50, 2), torch.randn(50, 2)), epochs=1).bijection.size == 2


def test_arrays_of_any_width_and_byte_order_are_read():
    for kind in (">f8", ">f4", ">i4", "longdouble"):
        assert as_tensor(np.array([[1, 2]], dtype=kind)).tolist() == [[1, 2]]


def test_what_was_learnt_of_counts_answers_for_numbers_below_zero():
    learnt = inference().fit(torch.randint(0, 5, (20, 3)).double(), epochs=1)
    assert learnt.posterior(torch.full((1, 3), -2.0)).sample().isfinite().all()


MISTAKES = {
    "no examples": (lambda: inference().fit(np.zeros((0, 3))), r"holds no examples; give \(N, \*event\)"),
    "not finite": (lambda: inference().fit([[0.0, math.nan, 1.0]]), r"1 NaN or infinite values, the first at \(0, 1\)"),
    "text": (lambda: inference().fit(np.array(["a"])), "has dtype <U1, but real numbers are needed"),
    "complex": (lambda: inference().fit(torch.zeros(2, 3, dtype=torch.cfloat)), "is complex"),
    "uneven rows": (lambda: inference().fit([[1.0], [1.0, 2.0]]), "rows of different lengths"),
    "used up": (lambda: inference().fit(iter([])), "used up"),
    "uneven batches": (lambda: inference().fit([torch.zeros(2, 3), torch.zeros(2, 4)]), "different kinds"),
    "nothing iterable": (lambda: inference().fit(3), "x is a int; give a tensor"),
    "odd batches": (lambda: inference().fit(iter(["ab"])), "batches of str"),
    "another event": (lambda: inference().fit(torch.zeros(4, 2)), r"event shape \(2,\) are needed"),
    "validation": (lambda: inference().fit(torch.zeros(4, 3), validation=4), "doesn't fit 4 examples; give 0 to 3"),
    "validation's shape": (
        lambda: inference().fit(torch.zeros(4, 3), validation=torch.zeros(1, 2)),
        r"validation has examples of shape \(2,\)",
    ),
    "epochs": (lambda: inference().fit(torch.zeros(4, 3), epochs=0), "epochs=0 must be at least 1"),
    "no rate": (lambda: inference().fit(torch.zeros(4, 3), lr=None), "lr=None is not a number"),
    "endless": (lambda: inference().fit(torch.zeros(4, 3), epochs=math.inf), "epochs=inf is not a whole number"),
    "too large": (
        lambda: inference().fit(np.array([[1e300, 0.0, 1.0]])),
        r"1 values too large for .*float32, the first at \(0, 0\)",
    ),
    "returns nothing": (
        lambda: ddvi.Inference(prior(), lambda z: None).fit(torch.zeros(4, 3)),
        "the likelihood returns nothing; let it return a torch distribution",
    ),
    "indexing": (
        lambda: ddvi.Inference(prior(), lambda z: Normal(z[:, 0], 1.0)).fit(torch.zeros(4)),
        r"as by z\[..., 0\]",
    ),
    "an array of latents": (
        lambda: inference().fit(torch.zeros(4, 3), epochs=1).posterior(torch.zeros(1, 3)).log_prob(np.zeros((1, 2))),
        r"z is a ndarray; give a tensor of latents \(\*, 1, 2\)",
    ),
    "not yet": (lambda: inference().posterior(torch.zeros(1, 3)), "nothing has been learnt yet"),
    "one example": (
        lambda: inference().fit(torch.zeros(4, 3), epochs=1).posterior(torch.zeros(3)), r"one example is x\[None\]"
    ),
    "few samples": (
        lambda: inference().fit(torch.zeros(4, 3), epochs=1).posterior(torch.zeros(1, 3)).elbo(1), "at least 2 samples"
    ),
    "half a model": (lambda: ddvi.Inference(prior()), "without a likelihood; give both"),
    "a class": (lambda: ddvi.Inference(Gamma, likelihood), "the class Gamma itself; give an object of it"),
    "no prior": (lambda: ddvi.Inference(3, likelihood), "int has no sample and log_prob"),
    "a batch of priors": (lambda: ddvi.Inference(Normal(torch.zeros(2), 1), likelihood), r"wrap it in .*Independent"),
    "discrete": (lambda: ddvi.Inference(Discrete(), likelihood), "needs continuous latents"),
    "support": (lambda: ddvi.Inference(Normal(0.0, 1), likelihood, support=constraints.simplex), "too few axes"),
    "no bijection": (
        lambda: ddvi.Inference(Gamma(1.0, 1.0), likelihood, support=constraints.positive_definite),
        "too few axes",
    ),
    "an empty product": (ddvi.Product, "at least one factor"),
    "no likelihood": (lambda: ddvi.Inference(prior(), 3).fit(torch.zeros(4, 3)), "int is no likelihood"),
    "likelihood's event": (
        lambda: ddvi.Inference(prior(), ddvi.PoissonLikelihood(nn.Linear(2, 3), (3,))).fit(torch.zeros(4, 2)),
        r"over observations of shape \(3,\), but x",
    ),
    "method": (lambda: ddvi.Inference(prior(), likelihood, "ddvy"), "did you mean 'ddvi'"),
    "posterior": (lambda: ddvi.Inference(prior(), likelihood, 3), "int is no posterior"),
    "posterior's size": (
        lambda: ddvi.Inference(prior(), likelihood, ddvi.GaussianPosterior(nn.Linear(3, 3), 4)).fit(torch.zeros(4, 3)),
        "has latents of size 4, but those of the model have 2",
    ),
    "what makes it": (
        lambda: ddvi.Inference(prior(), likelihood, lambda encoder, size: encoder).fit(torch.zeros(4, 3)),
        "let it return a ddvi.Posterior",
    ),
    "objective": (lambda: ddvi.Inference(prior(), likelihood, "vae", "sleep"), "unknown objective 'sleep'"),
    "setting": (lambda: ddvi.Inference(prior(), likelihood, step=3), "did you mean 'steps'"),
    "another's setting": (
        lambda: ddvi.Inference(prior(), likelihood, "vae", steps=3),
        "steps is a setting that vae by elbo can't take here; choose from compile, ",
    ),
    "how to train": (lambda: ddvi.Inference(prior(), likelihood, "vae", lr=3), "can't take here; say it in training"),
    "encoder": (lambda: ddvi.Inference(prior(), likelihood, encoder=nn.ReLU()), "has no out_features"),
    "two encoders": (
        lambda: ddvi.Inference(
            prior(), likelihood, ddvi.GaussianPosterior(nn.Linear(3, 3), 2), encoder=nn.Linear(3, 3)
        ),
        "leave one out",
    ),
    "device": (lambda: ddvi.Inference(prior(), likelihood, device="gpu"), "device"),
    "data without a model": (lambda: ddvi.Inference().fit(torch.zeros(4, 3)), "use fit_simulations"),
    "no simulator": (lambda: ddvi.Inference().fit_simulations(), "nothing to simulate"),
    "simulations by a bound": (
        lambda: ddvi.Inference(objective="elbo").fit_simulations((torch.zeros(4, 2),) * 2), "by Sleep alone"
    ),
    "no pairs": (lambda: ddvi.Inference().fit_simulations(torch.zeros(4, 2)), "pairs"),
    "uneven pairs": (
        lambda: ddvi.Inference().fit_simulations((torch.zeros(4, 2), torch.zeros(3, 2))), "4 latents for 3"
    ),
    "too few": (
        lambda: ddvi.Inference().fit_simulations(lambda count: (torch.zeros(4, 2),) * 2, count=9), "gave 4 pairs"
    ),
    "outside": (
        lambda: ddvi.Inference(support=constraints.positive).fit_simulations((-torch.ones(4, 2), torch.zeros(4, 2))),
        "4 latents lie outside of their support",
    ),
    "unlike the prior": (
        lambda: inference().fit_simulations((torch.zeros(4, 3), torch.zeros(4, 3))),
        r"latents have shape \(3,\), but \(2,\)",
    ),
    "no such file": (lambda: ddvi.Inference.load("/nowhere", prior(), likelihood), "there is no file"),
    "no density": (
        lambda: ddvi.Inference(prior(), likelihood, "aae")
        .fit(torch.zeros(4, 3), epochs=1).posterior(torch.zeros(1, 3)).elbo(2),
        "a point, not a density",
    ),
    "density's z": (
        lambda: inference().fit(torch.zeros(4, 3), epochs=1).posterior(torch.zeros(1, 3)).log_prob(torch.zeros(1, 3)),
        r"\(\*, 1, 2\) is needed",
    ),
    "sample's shape": (
        lambda: inference().fit(torch.zeros(4, 3), epochs=1).posterior(torch.zeros(1, 3)).sample(5),
        r"sample_shape=5 is no shape; give a tuple",
    ),
    "density's samples": (
        lambda: inference().fit(torch.zeros(4, 3), epochs=1).posterior(torch.zeros(1, 3))
        .log_prob(torch.zeros(1, 2), 0),
        "at least . samples, not 0",
    ),
    "on the edge": (
        lambda: ddvi.Inference(Gamma(1.0, 1.0), Poisson, "vae")
        .fit(torch.ones(4), epochs=1).posterior(torch.ones(1)).log_prob(torch.zeros(1)),
        "1 latents lie on the edge of their support",
    ),
    "simulated on the edge": (
        lambda: ddvi.Inference(support=constraints.nonnegative).fit_simulations((torch.zeros(4, 2), torch.zeros(4, 2))),
        "4 latents lie on the edge",
    ),
    "on an interval's edge": (
        lambda: ddvi.Inference(Uniform(0.0, 1.0), lambda z: Normal(z, 1.0), "vae")
        .fit(torch.ones(4), epochs=1).posterior(torch.ones(1)).log_prob(torch.ones(1)),
        "1 latents lie on the edge of their support",
    ),
    "simulated on an interval's edge": (
        lambda: ddvi.Inference(support=constraints.unit_interval)
        .fit_simulations((torch.tensor([[0.5], [0.2], [0.0]]), torch.zeros(3, 2))),
        "1 latents lie on the edge",
    ),
    "simulated on a simplex's edge": (
        lambda: ddvi.Inference(support=constraints.simplex)
        .fit_simulations((torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]), torch.zeros(2, 2))),
        "1 latents lie on the edge",
    ),
    "fewer draws than none": (
        lambda: inference().fit(torch.zeros(4, 3), epochs=1).posterior(torch.zeros(1, 3)).sample((2, -1)),
        r"sample_shape=\(2, -1\) is no shape; give whole numbers",
    ),
    "the mean of none": (
        lambda: inference().fit(torch.zeros(4, 3), epochs=1).posterior(torch.zeros(1, 3)).mean(0),
        "at least 1 sample, not 0",
    ),
    "no axis": (
        lambda: ddvi.PoissonLikelihood(nn.Linear(2, 1), ()),
        r"PoissonLikelihood takes no single numbers; give .* \(N, 1\)",
    ),
    "not binary": (
        lambda: ddvi.Inference(prior(), ddvi.BernoulliLikelihood(nn.Linear(2, 3), (3,))).fit(torch.full((4, 3), 0.5)),
        "x holds 0.5, but BernoulliLikelihood is of zeros and ones",
    ),
    "no counts": (
        lambda: ddvi.Inference(prior(), ddvi.PoissonLikelihood(nn.Linear(2, 3), (3,))).fit(-torch.ones(4, 3)),
        "x holds -1, but PoissonLikelihood is of whole numbers from 0 on",
    ),
    "torch's own refusal": (
        lambda: ddvi.Inference(prior(), lambda z: Independent(Poisson(z.exp()), 1)).fit(torch.full((4, 2), 0.5)),
        r"x lies outside of .*lower_bound=0\), where the likelihood is",
    ),
    "held out": (
        lambda: ddvi.Inference(prior(), ddvi.PoissonLikelihood(nn.Linear(2, 3), (3,)))
        .fit(torch.ones(4, 3), validation=-torch.ones(2, 3)),
        "x holds -1, but PoissonLikelihood",
    ),
    "parameters astray": (
        lambda: ddvi.Inference(prior(), lambda z: Independent(Normal(z, -1.0), 1)).fit(torch.zeros(4, 2)),
        "at 4 of 4 draws of the prior the likelihood of x is NaN; Expected parameter scale",
    ),
    "likelihood is no number": (
        lambda: ddvi.Inference(prior(), lambda z: Independent(Normal(z * math.nan, 1.0, validate_args=False), 1))
        .fit(torch.zeros(4, 2)),
        "at 4 of 4 draws of the prior the likelihood of x is NaN",
    ),
    "no folder": (
        lambda: inference().fit(torch.zeros(4, 3), epochs=1).save("/nowhere/inference"),
        "in a folder that doesn't exist",
    ),
    "density outside": (
        lambda: ddvi.Inference(Gamma(1.0, 1.0), Poisson, "vae")
        .fit(torch.ones(4), epochs=1).posterior(torch.ones(1)).log_prob(-torch.ones(1)),
        "lie outside of their support",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_in_a_sentence(mistake):
    attempt, message = MISTAKES[mistake]
    with pytest.raises(InputError, match=message) as caught:
        attempt()
    assert "\n" not in str(caught.value)


def test_a_file_of_something_else_is_refused(tmp_path):
    checkpoint.save(tmp_path / "other", {"a": torch.zeros(1)}, {"settings": {}})
    with pytest.raises(InputError, match="holds no inference that was saved"):
        ddvi.Inference.load(tmp_path / "other", prior(), likelihood)


def test_a_file_with_other_latents_is_refused(tmp_path):
    inference().fit(torch.zeros(4, 3), epochs=1).save(tmp_path / "plane")
    wider = MultivariateNormal(torch.zeros(3), torch.eye(3))
    with pytest.raises(InputError, match=r"has latents of shapes \[\(2,\)\]; give its own prior"):
        ddvi.Inference.load(tmp_path / "plane", wider, likelihood)
    with pytest.raises(InputError, match="was learnt with prior="):
        ddvi.Inference.load(tmp_path / "plane")


def test_refused_data_leaves_everything_as_it_was():
    fresh = inference()
    with pytest.raises(InputError):
        fresh.fit(torch.zeros(4, 2))
    assert len(fresh.fit(torch.zeros(4, 3), epochs=1).history) == 1


def test_a_posterior_follows_what_is_learnt_after_it():
    model = inference().fit(torch.zeros(4, 3), epochs=1)
    x = torch.ones(2, 3)
    before = model.posterior(x)
    old = before.sample((5,), seed=0)
    model.fit(torch.ones(4, 3), epochs=3)
    now = before.sample((5,), seed=0)
    assert not torch.equal(now, old)
    assert torch.equal(now, model.posterior(x).sample((5,), seed=0)), "neither the old one nor a mixture of both"


def test_no_draws_are_an_empty_tensor():
    posterior = inference().fit(torch.zeros(4, 3), epochs=1).posterior(torch.zeros(2, 3))
    assert posterior.sample((0,)).shape == (0, 2, 2)


@pytest.mark.parametrize("checks", [True, False])
def test_torchs_checks_of_distributions_are_the_callers(checks):
    Distribution.set_default_validate_args(checks)
    try:
        inference().fit(torch.zeros(4, 3), epochs=1)
        assert Distribution._validate_args is checks
    finally:
        Distribution.set_default_validate_args(True)


def test_a_seed_that_waits_for_cuda_is_the_callers_again(monkeypatch):
    """Before CUDA is begun there is a seed to come, and no state to keep."""
    seeds = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeds.append)
    caller = torch.initial_seed()
    with ddvi.seeded(3, "here"):
        assert torch.initial_seed() != caller
    assert seeds[-1] == caller


def test_using_the_library_switches_no_checks_off():
    code = "import ddvi, torch; ddvi.Inference; print(torch.distributions.Distribution._validate_args)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "True"


@pytest.mark.parametrize("validation", [0, torch.ones(3, 2)])
def test_a_few_draws_that_have_no_likelihood_are_no_mistake(validation):
    """Far out in a wide prior, a scale is rounded to 0."""
    wide = Independent(Normal(torch.zeros(2), 40.0), 1)
    scaled = ddvi.Inference(wide, lambda z: Independent(Normal(z, nn.functional.softplus(z[..., :1])), 1), **SMALL)
    scaled.fit(torch.ones(1000, 2), validation=validation, epochs=1)
    assert len(scaled.history) == 1


def test_an_infinite_latent_of_a_simulator_costs_its_step():
    calls = []

    def simulate(count):
        z = torch.rand(count, 2) + 0.1
        calls.append(count)
        z[0, 0] = 0.0 if len(calls) == 3 else z[0, 0]
        return z, z + torch.randn(count, 2)

    inference = ddvi.Inference(support=constraints.nonnegative, **SMALL)
    inference.fit_simulations(simulate, count=256, epochs=2, batch_size=64)
    assert sum(row["skipped"] for row in inference.history) == 1


def test_parameters_that_go_astray_on_the_way_cost_their_step():
    """Torch's own checks, which would end the training, rest meanwhile."""
    calls = []

    def astray(z):
        calls.append(len(z))
        return Independent(Normal(z * (math.nan if len(calls) == 9 else 1.0), 0.5), 1)

    inference = ddvi.Inference(Independent(Normal(torch.zeros(2), 1.0), 1), astray, "vae")
    inference.fit(torch.zeros(256, 2), epochs=2, batch_size=32)
    assert sum(row["skipped"] for row in inference.history) == 1


def test_a_support_that_moves_with_the_latents_is_learnt():
    narrow = ddvi.Inference(prior(), lambda z: Independent(Uniform(z - 1e-3, z + 1e-3), 1), **SMALL)
    narrow.fit_simulations(count=64, epochs=1)
    assert len(narrow.history) == 1
    check_scored(narrow.model, narrow.likelihood, torch.zeros(4, 2))
