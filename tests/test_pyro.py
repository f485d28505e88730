"""The guide keeps what Pyro asks of one, and its loss is the bound: held to a conjugate model's evidence."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributions import MultivariateNormal, transforms

import ddvi
from ddvi.errors import InputError
from ddvi.posteriors import GaussianPosterior
from ddvi.posteriors.base import VARIANCE_FLOOR

pyro = pytest.importorskip("pyro")
import pyro.distributions as dist  # noqa: E402
from pyro.infer import SVI, Predictive, Trace_ELBO  # noqa: E402
from pyro.infer.autoguide import AutoNormal  # noqa: E402

from ddvi.pyro import AutoDiffusion  # noqa: E402

SMALL = {"steps": 4, "denoiser_size": 32, "denoiser_layers": 2}
X = torch.tensor([1.0, 2.5])
MIXING = torch.tensor([[1.0, 0.9], [0.2, 1.0]])
SCALE = 0.5


@pytest.fixture(autouse=True)
def _own_randomness():
    with ddvi.seeded(0, "pyro"):
        pyro.clear_param_store()
        yield
    pyro.clear_param_store()


def conjugate(x=None):
    """z ~ N(0, I), x = MIXING z + SCALE ε, in two sites."""
    first = pyro.sample("first", dist.Normal(0.0, 1.0))
    second = pyro.sample("second", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    z = torch.stack([first, second[..., 0]], -1)
    mean = z @ MIXING.to(z).T
    return pyro.sample("x", dist.Normal(mean, SCALE).to_event(1), obs=X.to(z) if x is None else x)


def exact(x):
    covariance = (torch.eye(2) + MIXING.T @ MIXING / SCALE**2).inverse()
    return MultivariateNormal(x @ MIXING @ covariance / SCALE**2, covariance)


def evidence(x=X):
    return MultivariateNormal(torch.zeros(2), MIXING @ MIXING.T + SCALE**2 * torch.eye(2)).log_prob(x)


def mixed():
    """Sites of several supports and shapes, in plates and out of them."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("groups", 4):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        pair = pyro.sample("pair", dist.Beta(torch.ones(2), 2.0).to_event(1))
    with pyro.plate("data", 5):
        pyro.sample("x", dist.Normal(level.sum(-1, keepdim=True), rate.unsqueeze(-1)), obs=torch.zeros(5))
    return weights, pair


SHAPES = {"rate": (), "weights": (3,), "level": (4,), "pair": (4, 2)}


def train(guide, steps, *args, lr=5e-3, particles=16, model=conjugate):
    decay = 0.02 ** (1 / steps)
    optimizer = pyro.optim.ClippedAdam({"lr": lr, "lrd": decay})
    svi = SVI(model, guide, optimizer, Trace_ELBO(particles, vectorize_particles=True, max_plate_nesting=0))
    return [svi.step(*args) for _ in range(steps)]


def test_at_the_exact_posterior_every_loss_is_the_evidence(float64):
    """p(z) = N(0, 1), x = z + ε at x = 1: the posterior is N(½, ½)."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    guide = AutoDiffusion(model, GaussianPosterior)
    guide.setup()
    with torch.no_grad():
        guide.posterior.head.bias.copy_(torch.tensor([0.5 - guide.location[0], math.log(0.5 - VARIANCE_FLOOR)]))
    expected = -float(dist.Normal(0.0, math.sqrt(2)).log_prob(torch.tensor(1.0)))
    for _ in range(3):
        assert Trace_ELBO().loss(model, guide) == pytest.approx(expected, abs=1e-9)


def test_weights_of_a_chain_average_to_the_evidence():
    """E_q[ p(x, z) r(a | z) / q(z, a) ] = p(x), whatever the chain does."""
    guide = AutoDiffusion(conjugate, init_scale=0.8, **SMALL)
    guide.setup()
    with torch.no_grad():
        for parameter in [*guide.posterior.base.denoiser.parameters(), *guide.posterior.layers.parameters()]:
            parameter.add_(0.05 * torch.randn_like(parameter))
    loss = Trace_ELBO(50_000, vectorize_particles=True, max_plate_nesting=0)
    with torch.no_grad(), pyro.plate("many", 50_000, dim=-1):
        trace = pyro.poutine.trace(guide).get_trace()
        joint = pyro.poutine.trace(pyro.poutine.replay(conjugate, trace)).get_trace()
        trace.compute_log_prob()
        joint.compute_log_prob()
    sites = [joint.nodes[name]["log_prob"] for name in ("first", "second", "x")]
    log_weight = sum(sites) - sum(site["log_prob"] for _, site in trace.iter_stochastic_nodes())
    weight = (log_weight - evidence()).exp()
    assert abs(float(weight.mean()) - 1) < 5 * float(weight.std()) / 50_000**0.5
    assert float(log_weight.mean()) < evidence()
    assert loss.loss(conjugate, guide) == pytest.approx(-float(log_weight.mean()), rel=0.05)


def test_sites_have_their_shapes_and_supports():
    guide = AutoDiffusion(mixed, **SMALL)
    drawn = guide()
    assert {name: tuple(value.shape) for name, value in drawn.items()} == SHAPES
    many, others = (Predictive(mixed, guide=each, num_samples=7)() for each in (guide, AutoNormal(mixed)))
    assert {name: value.shape for name, value in many.items()} == {name: value.shape for name, value in others.items()}
    together = Predictive(mixed, guide=guide, num_samples=7, parallel=True, return_sites=["rate", "pair"])()
    assert together["pair"].numel() == 7 * 4 * 2
    for values in (drawn, many):
        assert (values["rate"] > 0).all()
        torch.testing.assert_close(values["weights"].sum(-1), torch.ones(values["weights"].shape[:-1]))
        assert ((values["pair"] > 0) & (values["pair"] < 1)).all()


def test_untrained_quantiles_are_those_of_the_gaussian_it_begins_as():
    guide = AutoDiffusion(mixed, init_scale=0.3, draws=20_000, **SMALL)
    guide.setup()
    state = torch.get_rng_state()
    found = guide.quantiles([0.1, 0.5, 0.9])
    median = guide.median()
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: tuple(value.shape) for name, value in found.items()} == {n: (3, *s) for n, s in SHAPES.items()}
    assert all(torch.equal(found[name][1], median[name]) for name in SHAPES)
    logarithm = found["rate"].log()
    torch.testing.assert_close(logarithm - logarithm[1], 0.3 * torch.tensor([-1.2816, 0.0, 1.2816]), atol=0.02, rtol=0)


def test_quantiles_rise_where_a_bijection_falls():
    def below():
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(0.0, 1.0), _to_negative()))

    guide = AutoDiffusion(below, init_scale=0.5, **SMALL)
    found = guide.quantiles([0.05, 0.5, 0.95])["z"]
    assert (found < 0).all()
    assert (found.diff() > 0).all()


def _to_negative():
    return [transforms.ExpTransform(), transforms.AffineTransform(0.0, -1.0)]


def test_parameters_are_there_before_the_first_step_and_all_of_them_learn():
    guide = AutoDiffusion(conjugate, **SMALL)
    guide.setup()
    parameters = dict(guide.named_parameters())
    assert any("denoiser" in name for name in parameters)
    with torch.no_grad():
        guide.posterior.base.denoiser.exit.weight.normal_(0, 0.1)
        for layer in guide.posterior.layers:
            layer.hyper[-1].weight.normal_(0, 0.1)
    Trace_ELBO(4).loss_and_grads(conjugate, guide)
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert len([name for name in pyro.get_param_store() if "denoiser" in name]) > 0


@pytest.mark.parametrize("encoder", [False, True])
def test_the_path_gradient_is_the_bounds_on_average_and_of_less_variance(encoder):
    seen = nn.Sequential(nn.Linear(2, 3)) if encoder else None
    if seen is not None:
        seen.out_features = 3
    arguments = [X] if encoder else []
    guide = AutoDiffusion(conjugate, encoder=seen, init_scale=0.5, **SMALL)
    train(guide, 100, *arguments, lr=2e-2)
    loss = Trace_ELBO(200, vectorize_particles=True, max_plate_nesting=0)
    found = []
    for guide.path_gradient in (True, False):
        gradients = []
        for _ in range(100):
            guide.zero_grad()
            loss.loss_and_grads(conjugate, guide, *arguments)
            gradients.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
        found.append(torch.stack(gradients))
    path, plain = found
    error = ((path.var(0) + plain.var(0)) / len(path)).sqrt().clamp_min(1e-9)
    assert ((path.mean(0) - plain.mean(0)).abs() / error).max() < 5.5
    chain = torch.cat([torch.full((p.numel(),), ".base." in name) for name, p in guide.named_parameters()])
    assert path[:, chain].var(0).sum() < 0.5 * plain[:, chain].var(0).sum()
    assert path.var(0).sum() < plain.var(0).sum()


def test_weights_move_to_a_fresh_guide_without_pickle(tmp_path):
    guide = AutoDiffusion(conjugate, **SMALL)
    train(guide, 3)
    save_file(guide.state_dict(), tmp_path / "guide.safetensors")
    pyro.clear_param_store()
    other = AutoDiffusion(conjugate, **SMALL)
    other.setup()
    other.load_state_dict(load_file(tmp_path / "guide.safetensors"))
    for key, value in guide.quantiles([0.2, 0.7]).items():
        assert torch.equal(other.quantiles([0.2, 0.7])[key], value)


def test_a_subsampled_plate_is_scaled_to_all_of_its_data():
    data = torch.linspace(-1, 1, 20)

    def model(size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample_size=size) as rows:
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[rows])

    guide = AutoDiffusion(model, init_scale=0.01, **SMALL)
    guide.setup(5)
    part = sum(Trace_ELBO().loss(model, guide, 5) for _ in range(400)) / 400
    assert part == pytest.approx(Trace_ELBO(50).loss(model, guide, 20), rel=0.02)


@pytest.mark.slow
def test_it_learns_a_correlated_posterior():
    guide = AutoDiffusion(conjugate, init_scale=0.5, **SMALL)
    train(guide, 250, lr=3e-2, particles=32)
    draws = Predictive(conjugate, guide=guide, num_samples=4000, parallel=True, return_sites=["first", "second"])()
    z = torch.stack([draws["first"].reshape(-1), draws["second"].reshape(-1)], -1)
    expected = exact(X)
    torch.testing.assert_close(z.mean(0), expected.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(z.T), expected.covariance_matrix, atol=0.04, rtol=0)
    bound = -Trace_ELBO(4000, vectorize_particles=True, max_plate_nesting=0).loss(conjugate, guide)
    gap = float(evidence()) - bound
    assert -0.01 < gap < 0.06, "the best diagonal Gaussian loses 0.34 nats"


@pytest.mark.slow
def test_an_amortised_guide_answers_for_observations_it_has_not_seen(tmp_path):
    def encoder():
        layers = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 16))
        layers.out_features = 16
        return layers

    guide = AutoDiffusion(conjugate, encoder=encoder(), init_scale=1.0, **SMALL)
    optimizer = pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.993})
    svi = SVI(conjugate, guide, optimizer, Trace_ELBO(8, vectorize_particles=True, max_plate_nesting=0))
    truth = MultivariateNormal(torch.zeros(2), MIXING @ MIXING.T + SCALE**2 * torch.eye(2))
    for _ in range(600):
        svi.step(truth.sample())
    save_file(guide.state_dict(), tmp_path / "guide.safetensors")
    other = AutoDiffusion(conjugate, encoder=encoder(), init_scale=1.0, **SMALL)
    other.setup(torch.zeros(2))
    other.load_state_dict(load_file(tmp_path / "guide.safetensors"))
    for x in (torch.tensor([1.0, 2.0]), torch.tensor([-2.0, 0.0])):
        median = other.median(x)
        found = torch.stack([median["first"], median["second"][0]])
        torch.testing.assert_close(found, exact(x).mean, atol=0.25, rtol=0)


def test_what_cannot_be_used_is_refused():
    with pytest.raises(InputError, match="has no out_features"):
        AutoDiffusion(conjugate, encoder=nn.Identity())
    with pytest.raises(InputError, match="isn't positive"):
        AutoDiffusion(conjugate, init_scale=0.0)
    with pytest.raises(InputError, match="posterior='ddvi' can't be called; give a class"):
        AutoDiffusion(conjugate, "ddvi")
    for maker, named in ((None, "TransformedPosterior"), (ddvi.DiffusionPosterior, "DiffusionPosterior")):
        with pytest.raises(InputError, match=f"unknown setting of {named} 'step'.* did you mean 'steps'"):
            AutoDiffusion(conjugate, maker, step=3)
    AutoDiffusion(conjugate, type("Own", (), {"__init__": lambda self, encoder, size, **anything: None}), step=3)
    with pytest.raises(InputError, match="has no density"):
        AutoDiffusion(conjugate, ddvi.ImplicitPosterior).setup()
