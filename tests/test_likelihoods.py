"""Likelihoods against torch's own distributions, and what preprocessing makes of data."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Laplace, NegativeBinomial, Normal, Poisson

from conftest import set_linear
from ddvi import likelihoods, preprocessing
from ddvi.errors import InputError
from ddvi.likelihoods import GaussianLikelihood
from ddvi.networks import DenseDecoder

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = [(4,), (2, 3), (1, 4, 4)]
FAMILIES = ("bernoulli", "gaussian", "poisson", "negative_binomial", "categorical", "user")
families = pytest.mark.parametrize("family", FAMILIES)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def build(family, shape):
    """A likelihood, and its distribution written out by hand."""
    event_shape = torch.Size(shape)
    outputs = (*shape, 5) if family == "categorical" else shape
    decoder = DenseDecoder(2, torch.Size(outputs), 8)
    entries = len(shape)
    scale = torch.linspace(0.3, 1.7, shape[0]).view(-1, *[1] * (entries - 1))
    match family:
        case "bernoulli":
            likelihood = likelihoods.BernoulliLikelihood(decoder, event_shape)
            by_hand = lambda z: Bernoulli(torch.sigmoid(decoder(z)))  # noqa: E731
        case "gaussian":
            likelihood = likelihoods.GaussianLikelihood(decoder, event_shape, scale)
            by_hand = lambda z: Normal(decoder(z), scale)  # noqa: E731
        case "poisson":
            likelihood = likelihoods.PoissonLikelihood(decoder, event_shape)
            by_hand = lambda z: Poisson(decoder(z).exp())  # noqa: E731
        case "negative_binomial":
            likelihood = likelihoods.NegativeBinomialLikelihood(decoder, event_shape)
            dispersion = torch.linspace(0.5, 4, math.prod(shape)).view(shape)
            with torch.no_grad():
                likelihood.log_dispersion.copy_(dispersion.log())
            by_hand = lambda z: NegativeBinomial(dispersion, logits=decoder(z) - dispersion.log())  # noqa: E731
        case "categorical":
            likelihood = likelihoods.CategoricalLikelihood(decoder, event_shape, 5)
            by_hand = lambda z: Categorical(logits=decoder(z))  # noqa: E731
        case "user":
            by_hand = lambda z: Laplace(decoder(z), scale)  # noqa: E731
            likelihood = likelihoods.DistributionLikelihood(lambda z: Independent(by_hand(z), entries), event_shape)
    return likelihood, lambda z: Independent(by_hand(z), entries)


@torch.no_grad()
@pytest.mark.parametrize("dispersion", [1e2, 1e4, 1e6])
def test_many_counts_that_are_nearly_poissons_keep_their_nats(dispersion):
    likelihood = likelihoods.NegativeBinomialLikelihood(nn.Linear(2, 2000), torch.Size([2000]), dispersion)
    likelihood.log_dispersion.add_(torch.linspace(-0.5, 0.5, 2000))
    x = torch.poisson(torch.full((5, 2000), 10.0))
    _, single = likelihood.statistics(x)
    _, double = copy.deepcopy(likelihood).double().statistics(x.double())
    torch.testing.assert_close(single.double(), double, rtol=0, atol=0.02)


@families
@shapes
@torch.no_grad()
def test_log_prob_is_that_of_torch(family, shape):
    likelihood, by_hand = build(family, shape)
    z = 2 * torch.randn(7, 3, 6, 2)
    x = by_hand(z[0, 0]).sample()
    assert x.shape == (6, *shape)
    torch.testing.assert_close(likelihood.log_prob(x, z), by_hand(z).log_prob(x), atol=1e-10, rtol=0)
    torch.testing.assert_close(likelihood(z).log_prob(x), by_hand(z).log_prob(x), atol=1e-10, rtol=0)


@families
@shapes
@torch.no_grad()
def test_pairwise_log_prob_is_log_prob_of_every_pair(family, shape):
    likelihood, by_hand = build(family, shape)
    z = 2 * torch.randn(9, 2)
    x = by_hand(torch.randn(6, 2)).sample()
    pairs = torch.stack([by_hand(point).log_prob(x) for point in z], 1)
    torch.testing.assert_close(likelihood.pairwise_log_prob(x, z), pairs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "user"])
def test_moments_give_the_score_and_fishers_information(family):
    """∂/∂z log p(x|z) = Jᵀ (T − E[T]) of each x, and Jᵀ Var(T) J is the score's covariance over x."""
    likelihood, by_hand = build(family, (4,))
    z = torch.randn(2, requires_grad=True)
    x = by_hand(z.detach()).sample((50_000,))
    with torch.no_grad():
        statistics = likelihood.statistics(x)[0]
        mean, variance = likelihood.moments(likelihood.natural(z))
    jacobian = torch.autograd.functional.jacobian(lambda z: likelihood.natural(z), z)
    score = (statistics - mean) @ jacobian
    (expected,) = torch.autograd.grad(likelihood.log_prob(x[:1], z[None]).sum(), z)
    torch.testing.assert_close(score[0], expected, atol=1e-10, rtol=1e-10)
    information = jacobian.T @ (variance[:, None] * jacobian)
    products = score[:, :, None] * score[:, None]
    error = products.std(0) / math.sqrt(len(x))
    assert ((products.mean(0) - information).abs() < 4.5 * error).all()


@families
@shapes
@torch.no_grad()
def test_the_distribution_draws_what_log_prob_scores(family, shape):
    likelihood, _ = build(family, shape)
    distribution = likelihood(torch.randn(3, 5, 2))
    assert distribution.batch_shape == (3, 5)
    assert distribution.event_shape == shape
    z = torch.randn(2)
    draws = likelihood(z.expand(20_000, 2)).sample()
    assert draws.shape == (20_000, *shape)
    if family != "categorical":
        error = (draws - likelihood(z).mean).mean(0) / (likelihood(z).variance / 20_000).sqrt()
        assert error.abs().max() < 4.5


def test_a_wild_rate_stays_finite():
    decoder = nn.Linear(2, 3)
    likelihood = likelihoods.PoissonLikelihood(decoder, torch.Size([3]))
    value = likelihood.log_prob(torch.ones(1, 3), torch.full((1, 2), 1e6))
    assert value.isfinite().all()


def test_extreme_logits_stay_finite():
    decoder = nn.Linear(1, 3, bias=False)
    nn.init.constant_(decoder.weight, 1.0)
    likelihood = likelihoods.BernoulliLikelihood(decoder, torch.Size([3]))
    value = likelihood.log_prob(torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[800.0]]))
    torch.testing.assert_close(value, torch.tensor([-800.0]))


def test_a_distribution_of_wrong_shapes_is_refused_with_what_to_do():
    decoder = nn.Linear(2, 3)
    likelihood = likelihoods.DistributionLikelihood(lambda z: Normal(decoder(z), 1.0), torch.Size([3]))
    with pytest.raises(InputError, match=r"event shape \(3,\) are needed; wrap it in torch.distributions.Independent"):
        likelihood.log_prob(torch.randn(4, 3), torch.randn(4, 2))


# Preprocessing


def test_binarised_pixels_are_one_as_often_as_they_are_grey():
    prepare = preprocessing.Binarise(16)
    raw = torch.arange(17).expand(20_000, 17)
    x = prepare(raw)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    grey = torch.arange(17) / 16
    error = (x.mean(0) - grey).abs() / ((grey * (1 - grey) / 20_000).sqrt() + 1e-12)
    assert error.max() < 4.5
    assert (prepare(raw) != x).any(), "binarised afresh at each pass"
    torch.testing.assert_close(prepare.picture(raw[0]), grey)


def test_dequantised_pixels_fill_their_cell():
    prepare = preprocessing.Dequantise(255)
    raw = torch.tensor([0, 100, 255], dtype=torch.uint8).expand(20_000, 3)
    x = prepare(raw)
    assert x.min() >= 0
    assert x.max() <= 1
    assert ((x * 256).floor() == raw).all(), "the noise leaves the value of the pixel as it was"
    within = x * 256 - raw
    assert (within.mean(0) - 0.5).abs().max() < 4.5 / math.sqrt(12 * 20_000)
    assert (within.var(0) - 1 / 12).abs().max() < 1e-2 / 12 * 3
    torch.testing.assert_close(prepare.picture(raw[0]), (raw[0] + 0.5) / 256)


def test_standardised_features_have_unit_moments_and_keep_their_constants():
    raw = torch.randn(500, 3) * torch.tensor([1e-3, 1.0, 1e4]) + torch.tensor([5.0, 0.0, -1e5])
    prepare = preprocessing.Standardise(torch.Size([3]))
    prepare.fit(raw)
    x = prepare(raw)
    torch.testing.assert_close(x.mean(0), torch.zeros(3), atol=1e-9, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(3), atol=1e-9, rtol=0)
    assert set(prepare.state_dict()) == {"mean", "scale"}


def test_a_constant_pixel_is_shifted_and_not_divided_by_zero():
    raw = torch.full((10, 2), 3.0)
    prepare = preprocessing.Standardise(torch.Size([2]))
    prepare.fit(raw)
    assert (prepare(raw) == 0).all()


def test_counts_become_floating_point_numbers_as_they_are():
    raw = torch.arange(6).view(2, 3)
    x = preprocessing.AsIs()(raw)
    assert x.dtype == torch.float64
    assert (x == raw).all()


def test_pairs_of_an_own_likelihood_are_scored_in_pieces(monkeypatch):
    monkeypatch.setattr("ddvi.likelihoods.own._PAIRED_ENTRIES", 25)
    asked = []

    def build(z):
        asked.append(len(z))
        return Independent(Normal(z, 1.0), 1)

    x, z = torch.randn(3, 2), torch.randn(10, 2)
    found = likelihoods.DistributionLikelihood(build, torch.Size([2])).pairwise_log_prob(x, z)
    torch.testing.assert_close(found, Independent(Normal(z, 1.0), 1).log_prob(x[:, None]))
    assert asked == [4, 4, 2]


@pytest.mark.parametrize(("x", "scale"), [(1.0, 1e-3), (273.15, 0.1), (1e4, 1.0)])
@torch.no_grad()
def test_a_gaussian_keeps_its_digits_where_x_is_many_scales(x, scale):
    decoder = nn.Linear(2, 3)
    set_linear(decoder, scale * torch.randn(3, 2), torch.full((3,), x))
    likelihood = GaussianLikelihood(decoder.float(), torch.Size([3]), torch.full((3,), scale, dtype=torch.float32))
    z = torch.randn(7, 2, dtype=torch.float32)
    rows = (x + scale * torch.randn(7, 3)).float()
    sigma = likelihood.log_scale.double().exp()
    exact = Normal(decoder(z).double()[None], sigma).log_prob(rows.double()[:, None]).sum(-1)
    torch.testing.assert_close(likelihood.log_prob(rows, z).double(), exact.diagonal(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(likelihood.pairwise_log_prob(rows, z).double(), exact, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_a_gaussian_takes_whole_numbers_and_latents_for_all_of_them():
    likelihood, _ = build("gaussian", (2, 3))
    x, z = torch.randint(5, (4, 2, 3)), torch.randn(6, 1, 2)
    expected = likelihood(z.expand(6, 4, 2)).log_prob(x.double())
    torch.testing.assert_close(likelihood.log_prob(x, z), expected)
    torch.testing.assert_close(likelihood.pairwise_log_prob(x, z[:, 0]), expected.T)
