"""What every method keeps to, whatever the data: held over the whole family, as settings compose it."""

import pytest
import torch

from ddvi import checkpoint
from ddvi.catalogue import OBJECTIVES
from ddvi.catalogue import PRIORS as PRIOR_NAMES
from ddvi.composition import Observations, build_model, make_objective, make_phases
from ddvi.methods import METHODS
from ddvi.objectives.base import Batch, Labelled
from ddvi.posteriors.laplace import LaplacePosterior
from ddvi.posteriors.scaled import ScaledPosterior
from ddvi.randomness import random_state, seeded
from ddvi.schedule import Phase, Schedule
from ddvi.settings import resolve
from ddvi.training import Trainer

TINY = {
    "hidden_size": 8, "denoiser_size": 8, "denoiser_layers": 2, "steps": 3, "flow_layers": 2, "context_size": 6,
    "prior_denoiser": False, "samples": 3, "sleep_steps": 1,
}  # fmt: skip
OBSERVATIONS = {
    "binary table": Observations((6,), "bernoulli", "as_is", parts=3),
    "grey image": Observations((1, 4, 4), "bernoulli", "binarise", parts=3, maximum=16.0),
    "colour image": Observations((3, 8, 8), "gaussian", "dequantise", parts=3, maximum=255.0),
    "real table": Observations((5,), "gaussian", "standardise", parts=3),
    "counts": Observations((4,), "poisson", "as_is", parts=3),
    "overdispersed counts": Observations((4,), "negative_binomial", "as_is", parts=3),
    "categories": Observations((4,), "categorical", "as_is", parts=3, categories=5),
}
PRIORS = {1: "gaussian", 2: "pinwheel", 3: "swiss_roll"}
BATCH = 9

methods = pytest.mark.parametrize("method", METHODS)
kinds = pytest.mark.parametrize("kind", OBSERVATIONS)
latent_sizes = pytest.mark.parametrize("latent_size", PRIORS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(autouse=True)
def _own_randomness():
    before = torch.get_default_dtype()
    with seeded(0, "contracts"):
        yield
    torch.set_default_dtype(before)


def raw_data(kind, count=BATCH):
    """Data as stored."""
    shape = (count, *OBSERVATIONS[kind].event_shape)
    match kind:
        case "binary table":
            return torch.randint(0, 2, shape)
        case "grey image":
            return torch.randint(0, 17, shape, dtype=torch.uint8)
        case "colour image":
            return torch.randint(0, 256, shape, dtype=torch.uint8)
        case "real table":
            return 100 + 20 * torch.randn(shape)
        case "counts" | "overdispersed counts":
            return torch.randint(0, 30, shape)
        case _:
            return torch.randint(0, 5, shape)


def compose(method, kind="binary table", latent_size=2, **overrides):
    settings = resolve("digits", method, PRIORS[latent_size], TINY | {"latent_size": latent_size} | overrides)
    return build_model(settings, OBSERVATIONS[kind], raw_data(kind, 50)), make_objective(settings)


@methods
@kinds
@latent_sizes
@dtypes
def test_draws_and_weights_have_their_shapes_and_are_finite(method, kind, latent_size, dtype):
    torch.set_default_dtype(dtype)
    model, _ = compose(method, kind, latent_size)
    x = model.preprocessing(raw_data(kind))
    assert x.dtype == dtype
    conditional = model.posterior(x)
    draw = conditional.draw((4,))
    weights = model.weigh(x, draw)
    assert draw.z.shape == (4, BATCH, latent_size)
    assert draw.path.shape == (1 + conditional.auxiliaries, 4, BATCH, latent_size)
    assert draw.z.dtype == draw.log_ratio.dtype == weights.log_likelihood.dtype == dtype
    assert draw.z.requires_grad, "draws are reparameterised"
    assert weights.log_likelihood.shape == weights.log_prior.shape == draw.log_ratio.shape == (4, BATCH)
    assert weights.log_likelihood.isfinite().all()
    assert weights.log_prior.isfinite().all()
    fantasy, z, _ = model.fantasise(5)
    assert z.shape == (5, latent_size)
    assert fantasy.shape == (5, *x.shape[1:])
    if model.posterior.has_density:
        rescored = conditional.log_ratio(draw.path)
        assert (rescored - draw.log_ratio).abs().max() < (1e-8 if dtype == torch.float64 else 1e-2)
        assert draw.log_ratio.isfinite().all()
        assert draw.log_ratio.requires_grad
        for score in (
            conditional.log_bound(draw.z),
            conditional.log_bound(draw.z, 1),
            *conditional.log_prob(draw.z, 5),
        ):
            assert score.shape == (4, BATCH)
            assert score.isfinite().all()
        assert model.importance_weighted_bound(x, 4).isfinite().all()


@methods
@pytest.mark.parametrize("prior", PRIOR_NAMES)
@pytest.mark.parametrize("latent_size", [2, 5])
def test_a_posterior_works_in_units_of_an_uneven_prior(method, prior, latent_size):
    guided = {"guidance": 1} if method == "ddvi" else {}
    settings = resolve("digits", method, prior, TINY | {"latent_size": latent_size} | guided)
    model = build_model(settings, OBSERVATIONS["binary table"])
    uneven = latent_size > 2 and prior in ("pinwheel", "swiss_roll", "gaussian_mixture")  # narrow beyond the plane
    assert isinstance(model.posterior, ScaledPosterior) == uneven
    if uneven:
        spread = model.prior.sample((100_000,)).std(0)
        torch.testing.assert_close(model.posterior.scale, spread, rtol=0.05, atol=0)
        assert "scale" in model.posterior.state_dict(), "another machine's draws may differ in the last digit"
        if guided:
            torch.testing.assert_close(model.posterior.base.guidance.units, model.posterior.scale, rtol=0, atol=0)


def step(model, optimizers, objective, batch):
    """One training step; every gradient by the parameter's name, the last update's where there are several."""
    found = {}
    for update in objective.updates(model, batch):
        groups = [name for name in update.children if name in optimizers]
        model.zero_grad()
        update.loss.mean().backward()
        for name, parameter in model.named_parameters():
            if name.split(".")[0] in groups and parameter.grad is not None:
                found[name] = found.get(name, 0) + parameter.grad.abs()
        for name in groups:
            optimizers[name].step()
    return found


def assert_every_parameter_learns(model, objective, x, labelled=None):
    optimizers = {name: torch.optim.Adam(group, lr=1e-2) for name, group in model.groups().items()}
    for _ in range(3):  # layers that begin at zero hold back those before them at the first step
        found = step(model, optimizers, objective, Batch(x, labelled=labelled))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == found.keys(), f"no gradient for {sorted(names - found.keys())}"
    assert not [name for name, gradient in found.items() if not gradient.isfinite().all()], "gradient not finite"
    resting = [name for name, gradient in found.items() if not gradient.any()]
    assert not resting, f"zero gradient for {resting}"


@methods
@kinds
@latent_sizes
def test_every_parameter_learns(method, kind, latent_size):
    model, objective = compose(method, kind, latent_size)
    assert_every_parameter_learns(model, objective, model.preprocessing(raw_data(kind, 64)))


@pytest.mark.parametrize(
    ("method", "objective"), [(m, o) for m in METHODS for o in OBJECTIVES if o in METHODS[m].objectives]
)
@pytest.mark.parametrize("path_gradient", [False, True])
def test_every_parameter_learns_by_every_objective(method, objective, path_gradient):
    model, value = compose(method, objective=objective, path_gradient=path_gradient)
    assert_every_parameter_learns(model, value, model.preprocessing(raw_data("binary table", 64)))


@methods
@kinds
@dtypes
@torch.no_grad()
def test_saved_and_loaded_a_model_scores_the_same(method, kind, dtype, tmp_path):
    torch.set_default_dtype(dtype)
    model, _ = compose(method, kind)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    raw = raw_data(kind)
    x = raw.to(dtype) if kind == "grey image" else model.preprocessing(raw)
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, model.state_dict(), {"method": method})
    tensors, facts = checkpoint.load(path)
    fresh, _ = compose(method, kind)
    checkpoint.load_weights(fresh, tensors, path)
    assert facts == {"method": method}
    draw = model.posterior(x).draw((3,))
    torch.testing.assert_close(
        fresh.likelihood.log_prob(x, draw.z), model.likelihood.log_prob(x, draw.z), atol=0, rtol=0
    )
    if model.posterior.has_density:
        expected = model.posterior(x).log_ratio(draw.path)
        torch.testing.assert_close(fresh.posterior(x).log_ratio(draw.path), expected, atol=0, rtol=0)
    else:
        torch.testing.assert_close(fresh.posterior(x).draw((3,)).z, draw.z, atol=0, rtol=0)
    if kind in ("real table", "counts"):
        torch.testing.assert_close(fresh.preprocessing(raw), model.preprocessing(raw), atol=0, rtol=0)


@methods
def test_training_improves_the_fit_and_leaves_the_callers_random_state(method):
    model, objective = compose(method)
    x = (torch.arange(120)[:, None] % 3 == torch.arange(6) % 3).long()
    before = random_state()["cpu"]
    history = Trainer(model, Schedule((Phase(6, objective),), batch_size=20, lr=1e-2), x, x[:30]).fit()
    assert torch.equal(random_state()["cpu"], before)
    assert history[-1]["validation_bound"] > history[0]["validation_bound"]


def test_the_priors_own_denoiser_reaches_the_network():
    model, objective = compose("ddvi", prior_denoiser=True, steps=2)
    assert model.posterior.prior_denoiser is not None
    assert_every_parameter_learns(model, objective, model.preprocessing(raw_data("binary table", 64)))
    assert not [name for name in model.state_dict() if "prior_denoiser" in name], "tables are made anew, not stored"


@pytest.mark.parametrize(
    ("kind", "objective", "latent_size"),
    [(kind, objective, 2) for kind in OBSERVATIONS for objective in METHODS["ddvi"].objectives]
    + [("binary table", objective, size) for objective in ("reweighted_wake_sleep", "elbo") for size in (1, 3)],
)
def test_the_likelihood_guides_the_last_step_whatever_the_data(kind, objective, latent_size):
    model, objective = compose("ddvi", kind, latent_size, objective=objective, guidance=1)
    x = model.preprocessing(raw_data(kind))
    assert_every_parameter_learns(model, objective, x)
    draw = model.posterior(x).draw((4,))
    torch.testing.assert_close(draw.log_ratio, model.posterior(x).log_ratio(draw.path), atol=1e-3, rtol=1e-4)
    assert model.groups()["posterior"] == list(model.posterior.parameters())
    assert not [name for name, _ in model.posterior.named_parameters() if "likelihood" in name], (
        "it isn't ours to train"
    )


@pytest.mark.parametrize(
    ("method", "kind", "objective", "latent_size", "labels"),
    [("ddvi", kind, "auto", 3, False) for kind in OBSERVATIONS]
    + [(method, "binary table", "auto", 3, False) for method in METHODS if method not in ("aae", "ddvi")]
    + [("ddvi", "binary table", objective, 2, False) for objective in METHODS["ddvi"].objectives]
    + [(method, "counts", "auto", 2, True) for method in ("ddvi", "vae")],
)
def test_every_parameter_learns_in_laplaces_coordinates(method, kind, objective, latent_size, labels):
    given = {"objective": objective, "laplace": 1, "path_gradient": objective == "importance_weighted"}
    settings = resolve("digits_semi" if labels else "digits", method + "_semi" * labels, PRIORS[latent_size],
                       TINY | {"latent_size": latent_size} | given)  # fmt: skip
    model, raw = build_model(settings, OBSERVATIONS[kind], raw_data(kind, 50)), raw_data(kind)
    assert isinstance(model.posterior, LaplacePosterior)
    x = model.preprocessing(raw)
    objective = make_phases(settings)[-1].objective
    known = Labelled(x, torch.arange(len(x)) % OBSERVATIONS[kind].parts) if labels else None
    assert_every_parameter_learns(model, objective, x, known)
    assert not [name for name, _ in model.posterior.named_parameters() if "likelihood" in name], (
        "it isn't ours to train"
    )
    assert {"center", "spread"} <= set(model.posterior.state_dict()), "another machine's draws may differ"
