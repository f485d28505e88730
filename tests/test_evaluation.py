"""Each measure against its definition, computed again by other means on cases small enough for that."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

from conftest import LinearGaussian, set_linear
from ddvi import evaluation, measures
from ddvi.catalogue import MEASURES
from ddvi.composition import build_model, observe
from ddvi.data import Dataset
from ddvi.evaluation import (
    QUICK,
    clustering,
    evaluate,
    importance_weighted_bound,
    prepared,
)
from ddvi.evidence import exact_log_likelihood
from ddvi.likelihoods import means
from ddvi.measures import latent_nll, maximum_mean_discrepancy
from ddvi.methods import METHODS
from ddvi.networks import Dropout
from ddvi.posteriors.base import VARIANCE_FLOOR
from ddvi.posteriors.diffusion import DiffusionPosterior
from ddvi.posteriors.gaussian import GaussianPosterior
from ddvi.preprocessing import Binarise, Dequantise, Standardise
from ddvi.priors import DistributionPrior, make_prior
from ddvi.randomness import generator, random_state, seeded
from ddvi.settings import resolve

TINY = {
    "hidden_size": 8, "denoiser_size": 8, "denoiser_layers": 2, "steps": 3, "flow_layers": 2, "context_size": 6,
    "prior_denoiser": False,
}  # fmt: skip
BOUNDS = {"elbo", "iw_bound", "inference_gap", "marginal_gap"}
SMALL = replace(
    QUICK, examples=60, iw_examples=40, iw_draws=50, stand_in_examples=30, stand_in_draws=60, gap_examples=20,
    gap_auxiliary_draws=20, prior_draws=100, nodes=1000,
)  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(evaluation, "QUICK", SMALL)


@pytest.mark.parametrize("kind", [Binarise(255.0), Dequantise(255.0)])
def test_the_test_set_is_one_in_every_precision(kind):
    raw = torch.randint(256, (50, 6, 6), dtype=torch.uint8)
    with seeded(3):
        single = prepared(kind, raw)
        state = torch.get_rng_state()
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            double = prepared(copy.deepcopy(kind).double(), raw)
        finally:
            torch.set_default_dtype(before)
        assert torch.equal(state, torch.get_rng_state())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, single.double(), rtol=0, atol=1e-6)


def dataset(kind="grey", labels=True, n_train=80, n_test=70):
    with seeded(0, "test data"):
        count = n_train + n_test
        y = torch.arange(count) % 3
        if kind == "table":
            x, maximum = y[:, None] + torch.randn(count, 4), None
        else:
            shape = (count, 3 if kind == "colour" else 1, 4, 4)
            x, maximum = (torch.rand(shape) * 150 + 50 * y.view(-1, 1, 1, 1)).to(torch.uint8), 255.0
        parts = (y[:n_train], y[n_train:]) if labels else (None, None)
        return Dataset(kind, x[:n_train], x[n_train:], *parts, ("a", "b", "c") if labels else (), maximum, {})


def compose(data, method="vae", prior="less_noisy_square", **overrides):
    settings = resolve("digits", method, prior, TINY | overrides)
    with seeded(0, "model"):
        model = build_model(settings, observe(data, settings), data.train_x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def linear_gaussian_dataset(world: LinearGaussian, n_test: int) -> Dataset:
    x = world.simulate(10 + n_test)[1]
    return Dataset("linear-Gaussian", x[:10], x[10:], None, None, (), None, {})


def gaussian_heads(posterior, head, world, variance):
    """q(z|x) = N( posterior mean, variance )."""
    weight = torch.cat([world.gain, torch.zeros_like(world.gain)])
    set_linear(head, weight, torch.cat([-world.gain @ world.offset, (variance - VARIANCE_FLOOR).log()]))
    return posterior


def best_gaussian(world):
    posterior = GaussianPosterior(world.encoder(), 2)
    return gaussian_heads(posterior, posterior.head, world, 1 / world.precision.diagonal())


def best_chain(world):
    posterior = DiffusionPosterior(world.encoder(), 2, steps=3, denoiser_size=8, denoiser_layers=1)
    return gaussian_heads(posterior, posterior.anchor, world, 1 / world.precision.diagonal())


# Bounds


@pytest.mark.parametrize("build", [best_gaussian, best_chain])
def test_bounds_and_gaps_of_a_linear_gaussian_model(correlated, build):
    """ELBO = log p(x) − KL for every x, so that all of these are known in closed form."""
    model, data = correlated.model(build(correlated)), linear_gaussian_dataset(correlated, 400)
    metrics = evaluate(model, data, quick=True)
    exact = correlated.evidence().log_prob(data.test_x)
    assert metrics["test_examples"] == 400
    assert metrics["log_likelihood"] == pytest.approx(exact.mean().item(), abs=1e-3)
    assert metrics["log_likelihood_standard_error"] == pytest.approx(exact.std().item() / 20, rel=1e-3)
    assert metrics["log_likelihood_change"] <= metrics["log_likelihood_largest_change"] <= 0.01
    assert metrics["log_likelihood_nodes"] > QUICK.nodes
    assert metrics["elbo_draws"] >= 10
    # Noise of the draws: the bracket's standard deviation is about 1, of 4,000 draws.
    assert metrics["elbo"] == pytest.approx(exact.mean().item() - correlated.diagonal_gap, abs=0.07)
    assert metrics["inference_gap"] == pytest.approx(metrics["log_likelihood"] - metrics["elbo"], abs=1e-9)
    if build is best_gaussian:
        assert metrics["marginal_gap"] == metrics["inference_gap"]
        assert "marginal_gap_draws" not in metrics
    else:
        error = metrics["marginal_gap_standard_error"]
        assert 0.01 < error < 0.1
        assert metrics["marginal_gap"] == pytest.approx(correlated.diagonal_gap, abs=4 * error)
        assert metrics["marginal_gap_examples"] == QUICK.gap_examples
    assert metrics["elbo"] < metrics["iw_bound"] + 0.1


def test_elbo_is_the_mean_of_single_sample_bounds(correlated):
    """A posterior that has to be wide: the standard error is over examples, of means of at least ten draws."""
    posterior = gaussian_heads(model_posterior := GaussianPosterior(correlated.encoder(), 2), model_posterior.head,
                               correlated, torch.full((2,), 0.5))  # fmt: skip
    model, data = correlated.model(posterior), linear_gaussian_dataset(correlated, 300)
    metrics = evaluate(model, data, quick=True, seed=1)
    variance, precision = torch.full((2,), 0.5), correlated.precision
    loss = 0.5 * (
        (precision.diagonal() * variance).sum() - 2 - precision.logdet() - variance.log().sum()
    )  # KL( N(m, diag v) ‖ N(m, Λ⁻¹) )
    exact = correlated.evidence().log_prob(data.test_x)
    with torch.no_grad(), seeded(5):
        log_weights = model.log_weights(data.test_x, 2000)
    assert log_weights.mean().item() == pytest.approx((exact.mean() - loss).item(), abs=0.05)
    spread = log_weights.var(0).mean() / 10  # of a mean of ten draws
    assert metrics["elbo"] == pytest.approx((exact.mean() - loss).item(), abs=4 * (spread / 300).sqrt().item())
    expected = ((exact.var() + spread) / 300).sqrt().item()
    assert metrics["elbo_standard_error"] == pytest.approx(expected, rel=0.15)


def test_importance_weighted_bound_is_of_a_fixed_permutation(correlated):
    posterior = best_gaussian(correlated)
    model, data = correlated.model(posterior), linear_gaussian_dataset(correlated, 500)
    order = correlated.evidence().log_prob(data.test_x).argsort()  # the first 200 are no sample of them all
    data = replace(data, test_x=data.test_x[order])
    first, second = (evaluate(model, data, quick=True, seed=seed) for seed in (0, 1))
    assert first["iw_bound_examples"] == QUICK.iw_examples == 200
    assert first["iw_bound_draws"] == QUICK.iw_draws
    exact = correlated.evidence().log_prob(data.test_x)
    with seeded(0):
        log_weights = torch.stack([model.log_weights(data.test_x, QUICK.iw_draws).detach() for _ in range(20)])
    expected = (log_weights.logsumexp(1) - math.log(QUICK.iw_draws)).mean(0)  # the bound's mean, by repetition
    assert 0.05 < (exact - expected).mean() < 0.3
    chosen = torch.randperm(500, generator=generator(0, "permutation"))[:200]
    # Two seeds agree far better than two subsets would, with standard errors over examples of 0.1.
    assert first["iw_bound"] != second["iw_bound"]
    for metrics in (first, second):
        assert metrics["iw_bound"] == pytest.approx(expected[chosen].mean().item(), abs=0.05)
    assert first["iw_bound_standard_error"] == pytest.approx(exact.std().item() / 200**0.5, rel=0.15)
    with seeded(2), torch.no_grad():
        pieces = importance_weighted_bound(model, data.test_x, 3000)
    assert pieces.shape == (500,)
    assert expected.mean() + 0.03 < pieces.mean() < exact.mean(), "higher with K, and below log p(x)"


def test_exact_evidence_of_the_model_is_what_evaluation_reports(small):
    data = dataset()
    model = compose(data, "aae")
    metrics = evaluate(model, data, quick=True)
    x = prepared(model.preprocessing, data.test_x[:60])
    assert set(x.unique().tolist()) == {0.0, 1.0}
    expected = exact_log_likelihood(model.prior, model.likelihood, x, nodes=20_000).log_likelihood
    assert metrics["log_likelihood"] == pytest.approx(expected.mean().item(), abs=0.01)
    assert not {key for key in metrics if key.startswith(tuple(BOUNDS))}, "no density, no bound"


def test_bits_per_dimension(small):
    """A density on [0, 1]^d to a probability of one of 256^d levels."""
    data = dataset("colour")
    metrics = evaluate(compose(data, network="dense"), data, quick=True)
    expected = -(metrics["log_likelihood"] - 48 * math.log(256)) / (48 * math.log(2))
    assert metrics["bits_per_dimension"] == pytest.approx(expected, rel=1e-9)
    with_scale_one = -Normal(0.0, 1.0).log_prob(torch.tensor(0.0)).item() / math.log(2) + 8
    assert 5 < metrics["bits_per_dimension"] < with_scale_one + 3


# Latent space


def test_latent_nll_by_brute_force():
    for size in (1, 2, 3):
        with seeded(size):
            z, draws = torch.randn(150, size).double(), torch.randn(80, size).double()
        squared = ((draws[:, None] - z) ** 2).sum(-1)
        density = torch.stack([
            torch.exp(-squared / (2 * h**2)).mean(1) / (2 * math.pi * h**2) ** (size / 2)
            for h in (0.05, 0.1, 0.3, 0.5, 0.8)
        ]).mean(0)  # fmt: skip
        found = latent_nll(z.float(), draws.float())
        assert found["latent_nll"] == pytest.approx(-density.log().mean().item(), abs=1e-6)
        error = density.log().std().item() / math.sqrt(80)
        assert found["latent_nll_standard_error"] == pytest.approx(error, rel=0.02)


def test_latent_nll_is_low_where_latents_fill_the_prior():
    prior = make_prior("swiss_roll")
    with seeded(0):
        draws, full = prior.sample((500,)), prior.sample((2000,))
    part = full[full[:, 0] > 0]
    assert latent_nll(full, draws)["latent_nll"] + 1 < latent_nll(part, draws)["latent_nll"]


def test_mmd_by_brute_force():
    with seeded(0):
        x, y = torch.rand(120, 7).double(), torch.rand(230, 7).double() * 0.8

    def kernel(a, b):
        squared = ((a[:, None] - b) ** 2).sum(-1)
        return sum(torch.exp(-squared / (2 * s)) for s in (2, 5, 10, 20, 40, 80)).mean().item()

    expected = math.sqrt(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert expected > 0.05
    assert maximum_mean_discrepancy(x, y) == pytest.approx(expected, rel=1e-9)
    assert maximum_mean_discrepancy(x.float(), y.float()) == pytest.approx(expected, rel=1e-3)
    assert maximum_mean_discrepancy(x, x) == pytest.approx(0, abs=1e-6)


def test_mmd_compares_means_with_grey_test_images(small):
    """Not with binarised ones: images that are the data's own means leave only what they vary by."""
    data = dataset()
    model = compose(data)
    metrics = evaluate(model, data, quick=True)
    assert metrics["mmd_examples"] == 60
    grey = (data.test_x[:60] / 255).flatten(1)
    with torch.no_grad(), seeded(0):
        images = model.likelihood.decoder(model.prior.sample((60,))).sigmoid().flatten(1)
    expected = maximum_mean_discrepancy(images, grey)
    binary = maximum_mean_discrepancy(images, (torch.rand_like(grey) < grey).float())
    assert abs(metrics["mmd"] - expected) < 0.05 < abs(binary - expected)


def test_neighbours_are_twenty_training_latents():
    """Latents that are the data themselves, so that the classification can be done again by hand."""
    with seeded(0):
        y = torch.arange(300) % 3
        x = torch.randn(300, 2) + 4 * torch.eye(3)[y][:, :2]
        y = torch.where(torch.rand(300) < 0.35, torch.randint(3, (300,)), y)
    data = Dataset("plane", x[:200], x[200:], y[:200], y[200:], ("a", "b", "c"), None, {})
    model = compose(data)
    identity = nn.Identity()
    identity.out_features = 2
    model.preprocessing, model.posterior = Standardise(torch.Size([2])), GaussianPosterior(identity, 2)
    set_linear(model.posterior.head, torch.eye(4, 2), torch.tensor([0.0, 0.0, -30.0, -30.0]))  # the variance's floor
    metrics = evaluate(model, data, quick=True)
    nearest = torch.cdist(x[200:], x[:200]).topk(20, largest=False).indices
    votes = nn.functional.one_hot(y[:200][nearest], 3).sum(1)
    right = (votes.argmax(1) == y[200:]).double().mean().item()
    assert 0.5 < right < 0.9
    assert metrics["knn_accuracy"] == pytest.approx(right, abs=0.021), "but for a tie or two"
    by_one = (y[:200][nearest[:, 0]] == y[200:]).double().mean().item()
    assert abs(by_one - right) > 0.05, "the case tells 20 neighbours from one"


def scores_by_hand(truth, clusters):
    table = np.zeros((truth.max() + 1, clusters.max() + 1))
    np.add.at(table, (truth, clusters), 1)
    p = table / table.sum()
    rows, columns = p.sum(1), p.sum(0)

    def entropy(q):
        return -sum(v * math.log(v) for v in q.flatten() if v > 0)

    information = entropy(rows) + entropy(columns) - entropy(p)
    return {
        "nmi": information / ((entropy(rows) + entropy(columns)) / 2),
        "purity": p.max(0).sum(),
        "completeness": information / entropy(columns),  # 1 − H(cluster|class)/H(cluster)
    }


@pytest.mark.parametrize("name", ["pinwheel", "less_noisy_square", "gaussian_mixture", "swiss_roll"])
def test_clusters_are_the_most_probable_parts(name):
    data = dataset()
    model = compose(data, prior=name)
    with seeded(0):
        parts = torch.arange(120) % 3
        z = model.prior.sample((120,), label=parts)
        z[::4] = model.prior.sample((30,))
        labels = parts.clamp_max(1)  # two classes in three parts: purity is of clusters, not of classes
    every = torch.stack([model.prior.log_prob(z, torch.full((120,), part)) for part in range(3)])
    expected = scores_by_hand(labels.numpy(), every.argmax(0).numpy())
    assert 0.2 < expected["nmi"] < 0.95
    assert expected["purity"] > 0.8
    assert clustering(model, z, labels, 3, seed=0) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("prior", ["gaussian", "a user's own"])
def test_clusters_are_k_means_where_parts_are_all_the_same(prior):
    data = dataset()
    model = compose(data, prior="gaussian")
    if prior != "gaussian":
        model.prior = DistributionPrior(torch.distributions.Independent(Normal(torch.zeros(2), torch.ones(2)), 1))
    with seeded(0):
        labels = torch.arange(150) % 3
        blob = labels.clone()
        blob[::5] = (blob[::5] + 1) % 3
        z = torch.tensor([[0.0, 3.0], [3.0, -2.0], [-3.0, -2.0]])[blob] + 0.2 * torch.randn(150, 2)
    assert clustering(model, z, labels, 3, seed=0) == pytest.approx(
        scores_by_hand(labels.numpy(), blob.numpy()), abs=1e-9
    )


def test_unknown_labels_are_left_out(small):
    data = dataset()
    hidden = replace(data, test_y=torch.where(torch.arange(70) < 35, data.test_y, -1))
    few = replace(data, test_x=data.test_x[:35], test_y=data.test_y[:35])
    model = compose(data, "aae")  # its latents depend on the image alone
    found, expected = (evaluate(model, each, quick=True) for each in (hidden, few))
    # The binarised images differ where other images are drawn with them; the share of examples can't.
    assert {"knn_accuracy", "nmi"} <= found.keys()
    assert (found["knn_accuracy"] * 35) % 1 == pytest.approx(0, abs=1e-6) or found["knn_accuracy"] in (0, 1)
    assert found.keys() == expected.keys()
    nothing = evaluate(model, replace(data, test_y=torch.full((70,), -1)), quick=True)
    assert not {"knn_accuracy", "nmi", "purity", "completeness"} & nothing.keys()


# Which measures there are


CLUSTERS = {"nmi", "purity", "completeness"}
EVERYTHING = {"log_likelihood", "latent_nll", "mmd", "knn_accuracy"} | BOUNDS | CLUSTERS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("labels", [True, False])
def test_every_measure_that_applies(small, method, labels):
    data = dataset(labels=labels)
    metrics = evaluate(compose(data, method), data, quick=True)
    expected = EVERYTHING - (set() if labels else {"knn_accuracy", *CLUSTERS}) - (BOUNDS if method == "aae" else set())
    assert expected <= MEASURES.keys()
    assert metrics.keys() & MEASURES.keys() == expected
    assert_plain(metrics)
    for name, kind in {"log_likelihood": "nodes", "elbo": "draws", "iw_bound": "draws"}.items():
        if name in metrics:
            assert f"{name}_{kind}" in metrics
            assert metrics[f"{name}_standard_error"] > 0


@pytest.mark.parametrize(("size", "prior"), [(1, "gaussian"), (3, "swiss_roll"), (5, "pinwheel")])
@pytest.mark.parametrize("method", ["vae", "ddvi", "aae"])
def test_beyond_the_plane_the_bound_stands_in(small, size, prior, method):
    data = dataset("table", n_test=30)
    metrics = evaluate(compose(data, method, prior, latent_size=size), data, quick=True)
    assert_plain(metrics)
    assert "log_likelihood" not in metrics
    assert "inference_gap" not in metrics
    assert "mmd" not in metrics, "for images alone"
    assert ("latent_nll" in metrics) == (size <= 3)
    assert "knn_accuracy" in metrics
    if method == "aae":
        assert "log_likelihood_iw" not in metrics
    else:
        assert metrics["log_likelihood_iw_draws"] == 60
        assert metrics["log_likelihood_iw_examples"] == 30
        assert metrics["log_likelihood_iw_standard_error"] > 0
        loss = metrics["log_likelihood_iw"] - metrics["elbo"]  # all 30 examples stand in
        assert metrics["inference_gap_iw"] == pytest.approx(loss, abs=1e-9)
        if method == "vae":
            assert metrics["marginal_gap_iw"] == metrics["inference_gap_iw"]
        assert ("marginal_gap_iw_draws" in metrics) == (method == "ddvi")


def test_full_and_quick_efforts():
    full = evaluation.FULL
    assert (full.examples, full.iw_draws, full.iw_examples) == (None, 1000, 1000)
    assert (full.stand_in_draws, full.stand_in_examples, full.prior_draws) == (5000, 500, 10_000)
    assert full.elbo_draws >= QUICK.elbo_draws >= 10
    assert measures.KERNEL_BANDWIDTHS == (0.05, 0.1, 0.3, 0.5, 0.8)
    assert measures.MMD_SCALES == (2, 5, 10, 20, 40, 80)


def test_quick_caps_the_examples(small):
    data = dataset()
    quick, full = evaluate(compose(data, "aae"), data, quick=True), None
    assert quick["test_examples"] == quick["mmd_examples"] == 60
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "FULL", replace(SMALL, examples=None))
        full = evaluate(compose(data, "aae"), data)
    assert full["test_examples"] == full["mmd_examples"] == 70


def assert_plain(metrics):
    assert json.loads(json.dumps(metrics)) == metrics
    assert not [name for name in metrics if name.startswith("_")]
    for name, value in metrics.items():
        assert type(value) in (int, float), name
        assert math.isfinite(value), name


# Randomness


@pytest.mark.parametrize("method", ["ddvi", "aae"])
def test_the_seed_decides_and_nothing_else(small, method):
    data = dataset()
    model = compose(data, method)
    torch.manual_seed(11)
    before = random_state()["cpu"]
    first = evaluate(model, data, quick=True, seed=3)
    assert torch.equal(random_state()["cpu"], before), "the caller's random state is untouched"
    torch.manual_seed(12)
    assert evaluate(model, data, quick=True, seed=3) == first
    other = evaluate(model, data, quick=True, seed=4)
    assert other["latent_nll"] != first["latent_nll"]
    assert other["log_likelihood"] == first["log_likelihood"], "the data are the same for every seed"
    if method == "ddvi":
        assert other["elbo"] != first["elbo"]


def test_test_data_is_drawn_once_for_every_seed():
    data = dataset()
    model = compose(data)
    with seeded(1):
        first = prepared(model.preprocessing, data.test_x)
    with seeded(2):
        second = prepared(model.preprocessing, data.test_x)
    assert torch.equal(first, second)
    assert not torch.equal(first, model.preprocessing(data.test_x))


def test_dropout_and_gradients_are_off(small):
    data = dataset()
    model = compose(data, dropout=0.5)
    model.train()
    first = evaluate(model, data, quick=True)
    assert not model.training
    assert not [module for module in model.modules() if module.training]
    for module in model.modules():
        if isinstance(module, Dropout):
            module.dropped = 0
    assert any(isinstance(module, Dropout) for module in model.modules())
    assert evaluate(model.train(), data, quick=True) == first
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("likelihood", ["poisson", "categorical"])
def test_counts_in_images_are_compared_in_the_unit_interval(small, likelihood):
    data = dataset()
    data = replace(data, train_x=data.train_x.long(), test_x=data.test_x.long())
    model = compose(data, likelihood=likelihood)
    metrics = evaluate(model, data, quick=True)
    with torch.no_grad(), seeded(0):
        images = means(model.likelihood, model.prior.sample((60,))).flatten(1) / 255
    expected = maximum_mean_discrepancy(images, (data.test_x[:60] / 255).flatten(1))
    assert metrics["mmd"] == pytest.approx(expected, abs=0.05)
    assert metrics["mmd"] > 0.1


def test_a_discrepancy_of_no_number_is_none():
    assert math.isnan(maximum_mean_discrepancy(torch.full((3, 2), math.nan), torch.zeros(3, 2)))


def test_the_latents_are_those_of_the_test_set_that_all_measures_see(small, monkeypatch):
    data = dataset()
    model, seen = compose(data), []
    encode = model.posterior.encode
    monkeypatch.setattr(model.posterior, "encode", lambda x, *label: seen.append(x) or encode(x, *label))
    evaluate(model, data, quick=True, seed=3)
    every = prepared(model.preprocessing, data.test_x[:60])
    whole = [x for x in seen if len(x) == 60]
    assert len(whole) > 1
    assert all(torch.equal(x, every) for x in whole)


def test_what_stands_in_is_of_the_fixed_permutation(small):
    """Examples that are sorted by how likely they are."""
    data = dataset("table", labels=False, n_test=70)
    order = data.test_x.square().sum(1).argsort()
    data = replace(data, test_x=10 * data.test_x[order])
    metrics = evaluate(compose(data, prior="gaussian", latent_size=3), data, quick=True)
    assert metrics["log_likelihood_iw_examples"] == 30
    assert metrics["log_likelihood_iw"] == pytest.approx(metrics["elbo"], rel=0.5), "and not the first half"


def test_a_bound_has_all_draws_for_each_label_in_pieces_that_fit(monkeypatch):
    """log Σ_l p(l) 1/K Σ_k w_lk, whose mean over k may be taken piece by piece."""
    asked = []

    class Labelled:
        summed = 10

        def importance_weighted_bound(self, x, draws):
            asked.append((len(x), draws))
            return x[:, 0] * len(asked)

    monkeypatch.setattr(evaluation, "_DRAWS_AT_ONCE", 40)
    found = evaluation.importance_weighted_bound(Labelled(), torch.tensor([[1.0], [2.0]]), 6)
    assert asked == [(1, 4), (1, 2)] * 2
    shares = torch.tensor([4 / 6, 2 / 6], dtype=torch.float64).log()
    expected = [(torch.tensor([1.0, 2.0]) + shares).logsumexp(0), (torch.tensor([6.0, 8.0]) + shares).logsumexp(0)]
    torch.testing.assert_close(found, torch.stack(expected))
