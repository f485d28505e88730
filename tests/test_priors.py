"""Priors: densities against quadratures that share no code with them, samples against densities."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from ddvi.catalogue import PRIORS
from ddvi.errors import InputError
from ddvi.priors import DistributionPrior, Prior, as_prior, make_prior, structured
from ddvi.priors.base import moments
from ddvi.randomness import generator

WIDTH = {"pinwheel": 0.03, "swiss_roll": 0.05, "less_noisy_square": 0.06}
# half of the square that holds the mass, and a step at which the trapezium rule has converged
GRID = {
    "pinwheel": (2.3, 0.02),
    "swiss_roll": (3.5, 0.035),
    "less_noisy_square": (1.6, 0.04),
    "gaussian": (8.0, 0.4),
    "gaussian_mixture": (5.0, 0.06),
}
every_prior = pytest.mark.parametrize("name", list(PRIORS))
every_curve = pytest.mark.parametrize("name", list(WIDTH))


# ------------------------------------------------------------------------------------------- the definitions, once more


def curve(name: str, t: np.ndarray, label: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (as complex numbers) and log density of t, on the range given by `limits`."""
    if name == "pinwheel":
        return t * np.exp(1j * (2 * np.pi * label / 10 + 0.25 * np.exp(t))), norm.logpdf(t, 1, 0.15)
    if name == "swiss_roll":
        return 3 * np.sqrt(t) * np.exp(4.5j * np.pi * np.sqrt(t)), np.full_like(t, math.log(10))
    corner_x, corner_y = [-1, 1, 1, -1, -1], [1, 1, -1, -1, 1]
    x, y = (np.interp(t, np.linspace(0, 1, 5), corner) for corner in (corner_x, corner_y))
    return x + 1j * y, np.full_like(t, math.log(10))


def limits(name: str, label: int) -> tuple[float, float]:
    return (1 - 8 * 0.15, 1 + 8 * 0.15) if name == "pinwheel" else (label / 10, (label + 1) / 10)


def reference(name: str, z: complex, label: int) -> float:
    """log p(z|l) by adaptive quadrature around the peaks of the integrand."""

    def log_integrand(t: np.ndarray) -> np.ndarray:
        point, log_density = curve(name, t, label)
        return log_density - abs(z - point) ** 2 / (2 * WIDTH[name] ** 2) - math.log(2 * math.pi * WIDTH[name] ** 2)

    t = np.linspace(*limits(name, label), 20_001)
    values = log_integrand(t)
    near = values > values.max() - 50
    start, stop = max(np.flatnonzero(near)[0] - 1, 0), min(np.flatnonzero(near)[-1] + 1, 20_000)
    breaks = {t[values.argmax()], *np.arange(0, 1, 0.25)} if name == "less_noisy_square" else {t[values.argmax()]}
    inside = sorted(b for b in breaks if t[start] < b < t[stop])
    total, _ = quad(
        lambda u: float(np.exp(log_integrand(np.array(u)) - values.max())),
        t[start],
        t[stop],
        points=inside or None,
        limit=2000,
        epsabs=0,
        epsrel=1e-10,
    )
    return math.log(total) + values.max()


def probes(name: str, label: int) -> np.ndarray:
    """Points at the ends, the border and the middle of a part, and off it by up to 4 widths in every direction."""
    low, high = (0.5, 1.6) if name == "pinwheel" else limits(name, label)
    at, _ = curve(name, np.array([low, high, 0.3 * low + 0.7 * high]), label)
    off = WIDTH[name] * np.array([0, 1, 2.5, 4])[:, None] * np.exp(2j * np.pi * np.array([0.05, 0.3, 0.55, 0.8]))
    return (at[:, None] + off.ravel()).ravel()


def as_tensor(z: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack([np.real(z), np.imag(z)], -1))


def grid(name: str, dimensions: int = 2) -> tuple[Tensor, float]:
    """Points and volume of a cell."""
    half, step = GRID[name]
    axis = torch.arange(-half, half, step, dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * dimensions), step**dimensions


# ------------------------------------------------------------------------------------------------------------ densities


@every_curve
@pytest.mark.parametrize("label", [0, 2, 4, 9])
def test_labelled_density_is_the_quadrature(name: str, label: int) -> None:
    z = probes(name, label)
    expected = torch.tensor([reference(name, complex(point), label) for point in z], dtype=torch.float64)
    torch.testing.assert_close(
        make_prior(name).log_prob(as_tensor(z), torch.tensor(label)), expected, atol=1e-6, rtol=0
    )


@every_curve
def test_density_is_the_quadrature_over_all_parts(name: str) -> None:
    z = probes(name, 2)[::5]
    expected = [logsumexp([reference(name, complex(point), part) for part in range(10)]) - math.log(10) for point in z]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(make_prior(name).log_prob(as_tensor(z)), expected, atol=1e-6, rtol=0)


def test_gaussians_are_scipys() -> None:
    z = torch.randn(50, 3, dtype=torch.float64, generator=generator(0))
    torch.testing.assert_close(
        make_prior("gaussian", 3).log_prob(z), torch.from_numpy(multivariate_normal(np.zeros(3)).logpdf(z.numpy()))
    )
    e = np.array([math.cos(0.6 * math.pi), math.sin(0.6 * math.pi), 0])
    covariance = 0.1**2 * np.eye(3) + (0.5**2 - 0.1**2) * np.outer(e, e) + 0.2**2 * np.eye(3)
    torch.testing.assert_close(
        make_prior("gaussian_mixture", 3, width=0.2).log_prob(z, torch.tensor(3)),
        torch.from_numpy(multivariate_normal.logpdf(z.numpy(), 1.4 * e, covariance)),  # pyright: ignore[reportArgumentType]
    )


@every_prior
@pytest.mark.parametrize("label", [None, 3])
def test_density_integrates_to_one_and_has_the_entropy_of_its_samples(name: str, label: int | None) -> None:
    prior, part = make_prior(name), None if label is None else torch.tensor(label)
    z, cell = grid(name)
    log_density = prior.log_prob(z, part)
    assert float(log_density.exp().sum()) * cell == pytest.approx(1, abs=1e-4)
    entropy = -float((log_density.exp() * log_density).sum()) * cell
    surprise = -prior.log_prob(prior.sample((100_000,), part, generator(1, name)), part).double()
    assert abs(float(surprise.mean()) - entropy) < 4 * float(surprise.std()) / math.sqrt(len(surprise))


@every_prior
@pytest.mark.parametrize("parts", [1, 3, 7, 10])
def test_parts_make_up_the_whole(name: str, parts: int) -> None:
    prior = make_prior(name, parts=parts).double()
    z = torch.cat(
        [prior.sample((200,), generator=generator(2)), 3 * torch.randn(50, 2, generator=generator(3)).double()]
    )
    by_part = prior.log_prob(z, torch.arange(parts)[:, None]).logsumexp(0) - math.log(parts)
    torch.testing.assert_close(by_part, prior.log_prob(z), atol=1e-6, rtol=0)


@every_prior
def test_labelled_samples_land_in_their_part(name: str) -> None:
    prior = make_prior(name)
    label = torch.arange(10).expand(300, 10)
    z = prior.sample((300, 10), torch.arange(10), generator(4))
    guess = prior.log_prob(z.unsqueeze(0), torch.arange(10)[:, None, None]).argmax(0)
    right = float((guess == label).double().mean())
    assert right == pytest.approx(0.1, abs=0.03) if name == "gaussian" else right > 0.9


# ------------------------------------------------------------------------------------------------------ more dimensions


@pytest.mark.parametrize("label", [None, 3])
@pytest.mark.parametrize("name", ["pinwheel", "swiss_roll", "less_noisy_square"])
def test_further_coordinates_are_narrow_gaussians(name: str, label: int | None) -> None:
    if name == "less_noisy_square" and label is None:
        pytest.skip("a cube's edges, tested below")
    part = None if label is None else torch.tensor(label)
    flat, deep = make_prior(name), make_prior(name, 5).double()
    z = deep.sample((4000,), part, generator(5))
    rest = norm.logpdf(z[:, 2:].numpy(), scale=WIDTH[name]).sum(-1)
    torch.testing.assert_close(deep.log_prob(z, part), flat.log_prob(z[:, :2], part) + torch.from_numpy(rest))
    assert float(z[:, 2:].std()) == pytest.approx(WIDTH[name], rel=0.04)


def test_square_is_the_edges_of_a_cube() -> None:
    prior, width = make_prior("less_noisy_square", 3).double(), 0.06
    z = prior.sample((300,), generator=generator(6))
    expected = torch.zeros(300, dtype=torch.float64)
    for axis, signs in product(range(3), product((-1, 1), repeat=2)):
        sides = z[:, [i for i in range(3) if i != axis]].numpy()
        along = z[:, axis].numpy()
        density = (norm.cdf((along + 1) / width) - norm.cdf((along - 1) / width)) / 2
        expected += torch.from_numpy(density * norm.pdf(sides, signs, width).prod(-1)) / 12
    torch.testing.assert_close(prior.log_prob(z), expected.log(), atol=1e-8, rtol=0)

    points, cell = grid("less_noisy_square", 3)
    log_density = prior.log_prob(points)
    assert float(log_density.exp().sum()) * cell == pytest.approx(1, abs=1e-4)
    entropy = -float((log_density.exp() * log_density).sum()) * cell
    surprise = -prior.log_prob(prior.sample((100_000,), generator=generator(7)))
    assert abs(float(surprise.mean()) - entropy) < 4 * float(surprise.std()) / math.sqrt(len(surprise))


# ---------------------------------------------------------------------------------------------- precision and gradients


@every_prior
@pytest.mark.parametrize("label", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 5])
def test_gradient_points_inwards_far_away(name: str, label: int | None, dtype: torch.dtype, size: int) -> None:
    prior, part = make_prior(name, size).to(dtype), None if label is None else torch.tensor(label)
    angle = torch.linspace(0, 2 * math.pi, 41, dtype=dtype)
    directions = nn.functional.pad(torch.stack([angle.cos(), angle.sin()], -1), (0, size - 2), value=0.3)
    directions = torch.cat([directions, torch.eye(size, dtype=dtype), -torch.eye(size, dtype=dtype)])
    radius = torch.tensor([4.5, 8.0, 20.0], dtype=dtype)[:, None, None]
    z = (radius * nn.functional.normalize(directions, dim=-1)).reshape(-1, size).requires_grad_()
    value = prior.log_prob(z, part)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.dtype == dtype
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    draws = prior.sample((2000,), part, generator(8))
    draws = draws[prior.log_prob(draws, part).argsort()[1000:]]  # the core, as a Gaussian has draws out there too
    inwards = draws[torch.cdist(z.detach(), draws).argmin(-1)] - z.detach()
    assert ((gradient * inwards).sum(-1) > 0).all()


def test_square_is_finite_just_outside_in_float32() -> None:
    z = torch.cartesian_prod(torch.linspace(-3, 3, 61), torch.linspace(-3, 3, 61)).requires_grad_()
    prior = make_prior("less_noisy_square")
    for label in (None, torch.tensor(3)):
        value = prior.log_prob(z, label)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        torch.testing.assert_close(value.double(), prior.log_prob(z.double(), label), atol=1e-3, rtol=1e-5)


@every_prior
@pytest.mark.parametrize("label", [None, 4])
def test_float32_agrees_with_float64(name: str, label: int | None) -> None:
    prior, part = make_prior(name), None if label is None else torch.tensor(label)
    z = prior.sample((2000,), part, generator(9))
    torch.testing.assert_close(prior.log_prob(z, part).double(), prior.log_prob(z.double(), part), atol=1e-4, rtol=0)
    assert prior.log_prob(z.bfloat16()).dtype == torch.float32
    assert prior.double().sample((3,)).dtype == torch.float64


@every_prior
@pytest.mark.parametrize("label", [None, 4])
def test_gradient_is_the_difference_quotient(name: str, label: int | None) -> None:
    prior, part = make_prior(name, 3).double(), None if label is None else torch.tensor(label)
    z = torch.cat([prior.sample((4,), part, generator(10)), torch.tensor([[0.1, 0.2, 0.1], [2.5, -2, 0.3]])])
    torch.autograd.gradcheck(lambda z: prior.log_prob(z, part), z.double().requires_grad_(), rtol=1e-4)


@every_prior
def test_first_call_in_inference_mode_leaves_training_possible(name: str) -> None:
    prior = make_prior(name)
    with torch.inference_mode():
        prior.log_prob(torch.zeros(1, 2))
    z = torch.ones(1, 2, requires_grad=True)
    prior.log_prob(z, torch.tensor([0])).sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


# ------------------------------------------------------------------------------------------- shapes, labels, randomness


@every_prior
def test_blocks_and_broadcasting_change_nothing(name: str) -> None:
    prior = make_prior(name, 3).double()
    z = prior.sample((4, 100), generator=generator(11))
    label = torch.tensor([[0], [3], [3], [9]])
    one_by_one = torch.stack([torch.cat([prior.log_prob(x, i) for x in z[k]]) for k, i in enumerate(label)])
    torch.testing.assert_close(prior.log_prob(z, label), one_by_one)
    torch.testing.assert_close(prior.log_prob(z[0], label)[1:3], prior.log_prob(z[0], label[1]).expand(2, 100))
    torch.testing.assert_close(prior.log_prob(z), torch.stack([prior.log_prob(row) for row in z]))
    assert prior.log_prob(z[:0]).shape == (0, 100)
    assert prior.sample().shape == (3,)
    assert prior.sample((4, 2), label.int()).shape == (4, 2, 3)
    assert prior.event_shape == (3,)
    assert prior.parts == 10
    assert prior.state_dict() == {}


@pytest.mark.parametrize("make", [*(partial(make_prior, name) for name in PRIORS), lambda: as_prior(TwoSided())])
def test_a_generator_decides_the_draw_and_leaves_the_global_state(make) -> None:
    prior: Prior = make()
    before = torch.get_rng_state()
    first, second, other = (prior.sample((5,), torch.tensor(1), generator(seed)) for seed in (12, 12, 13))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    first = prior.sample((5,))
    torch.manual_seed(0)
    assert torch.equal(prior.sample((5,)), first)


# ------------------------------------------------------------------------------------------------------------- refusals


@every_prior
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_size": 0}, "latent_size=0"),
        ({"latent_size": -1}, "latent_size=-1"),
        ({"latent_size": 2.0}, "latent_size=2.0"),
        ({"parts": 0}, "parts=0"),
        ({"width": 0.0}, "width=0.0"),
        ({"width": -1.0}, "width=-1.0"),
        ({"width": math.nan}, "width=nan"),
        ({"width": math.inf}, "width=inf"),
    ],
)
def test_impossible_arguments_are_refused(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_prior(name, **arguments)


@every_prior
def test_impossible_calls_are_refused(name: str) -> None:
    prior = make_prior(name)
    z = prior.sample((5,))
    for bad in (torch.tensor(10), torch.tensor([-1]), torch.tensor(1.0), torch.tensor(True), torch.zeros(3).long(), 3):
        with pytest.raises(InputError, match="label"):
            prior.log_prob(z, bad)  # pyright: ignore[reportArgumentType]
        with pytest.raises(InputError, match="label"):
            prior.sample((5,), bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="broadcast"):
        prior.sample((), torch.tensor([1, 2]))
    for bad in (torch.zeros(5, 3), torch.zeros(()), torch.zeros(5, 2).long()):
        with pytest.raises(InputError, match="floating-point vectors of 2"):
            prior.log_prob(bad)


def test_names_and_planes() -> None:
    with pytest.raises(InputError, match="did you mean 'pinwheel'"):
        make_prior("pin_wheel")
    for name in set(PRIORS) - {"gaussian"}:
        with pytest.raises(InputError, match="2 or more"):
            make_prior(name, 1)
    assert make_prior("gaussian", 1).log_prob(torch.zeros(1)).item() == pytest.approx(norm.logpdf(0))


# --------------------------------------------------------------------------------------------------- a user's own prior


class TwoSided:
    """A user's plain object with two label parts, N(±2, I)."""

    parts = 2

    def sample(self, sample_shape, label=None) -> Tensor:
        label = torch.randint(2, sample_shape) if label is None else label
        return torch.randn(*sample_shape, 2) + (4 * label - 2).unsqueeze(-1)

    def log_prob(self, z, label=None) -> Tensor:
        both = Independent(Normal(torch.tensor([[-2.0], [2.0]]).expand(2, 2), 1.0), 1).log_prob(z.unsqueeze(-2))
        return both.logsumexp(-1) - math.log(2) if label is None else both.gather(-1, label.unsqueeze(-1)).squeeze(-1)


class Broken:
    """A user's object that gets one thing wrong."""

    def __init__(self, draws: Tensor, density: Tensor):
        self.draws, self.density = draws, density

    def sample(self, sample_shape) -> Tensor:
        return self.draws

    def log_prob(self, z) -> Tensor:
        return self.density


class Shifted(nn.Module):
    """A learnable prior."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.ones(2))

    def sample(self, sample_shape) -> Tensor:
        return self.mean.detach() + torch.randn(*sample_shape, 2, dtype=self.mean.dtype)

    def log_prob(self, z) -> Tensor:
        return Independent(Normal(self.mean, 1.0), 1).log_prob(z)


def test_what_is_said_of_a_learnable_prior_isnt_learnt_from() -> None:
    class Attached(Shifted):
        def sample(self, sample_shape) -> Tensor:
            return self.mean + torch.randn(*sample_shape, 2)

    assert not [part for part in moments(as_prior(Attached())) if part.requires_grad]


def test_a_torch_distribution_becomes_a_prior() -> None:
    covariance = torch.tensor([[1.0, 0.6], [0.6, 2.0]])
    distribution = MultivariateNormal(torch.ones(2), covariance)
    before = torch.get_rng_state()
    prior = as_prior(distribution)
    assert torch.equal(torch.get_rng_state(), before)
    assert (prior.event_shape, prior.parts) == ((2,), None)
    z = prior.sample((3, 20_000), generator=generator(14))
    torch.testing.assert_close(prior.log_prob(z), distribution.log_prob(z))
    torch.testing.assert_close(z.reshape(-1, 2).T.cov(), covariance, atol=0.06, rtol=0)
    assert as_prior(prior) is prior
    assert as_prior(Independent(Normal(torch.zeros(3), 1.0), 1)).event_shape == (3,)
    with pytest.raises(InputError, match="no label parts"):
        prior.log_prob(z, torch.tensor(0))


def test_a_plain_object_keeps_its_parts() -> None:
    prior = as_prior(TwoSided())
    assert prior.parts == 2
    z = prior.sample((500,), torch.tensor(1), generator(15))
    assert float(z.mean()) == pytest.approx(2, abs=0.15)
    by_part = prior.log_prob(z, torch.tensor([[0], [1]]))
    assert by_part.shape == (2, 500)
    torch.testing.assert_close(by_part.logsumexp(0) - math.log(2), prior.log_prob(z))


def test_a_module_is_trained_and_moved_with_the_prior() -> None:
    prior = as_prior(Shifted()).double()
    assert prior.sample((4,)).dtype == torch.float64
    prior.log_prob(torch.zeros(3, 2, dtype=torch.float64)).sum().backward()
    (mean,) = prior.parameters()
    torch.testing.assert_close(mean.grad, torch.full((2,), -3.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Normal(torch.zeros(2), 1.0), "torch.distributions.Independent"),
        (Normal(0.0, 1.0), "shapes"),
        (Broken(torch.zeros(2), torch.zeros(2)), r"\(2,\)"),
        (Broken(torch.zeros(2, 3), torch.zeros(2, 3)), r"\(2, 3\)"),
        (Broken(torch.zeros(3, 3), torch.zeros(3)), r"\(3, 3\)"),
        (Broken(torch.full((2, 3), math.nan), torch.zeros(2)), "not finite"),
        (Broken(torch.zeros(2, 3), torch.full((2,), -math.inf)), "not finite"),
        ("pinwheel", "no sample and log_prob"),
    ],
)
def test_what_is_no_prior_is_refused(source: Distribution | Broken | str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DistributionPrior(source)


@pytest.mark.parametrize("label", [None, 3])
def test_a_squares_slope_is_right_however_far_a_draw_went(label):
    """Far out it is that of the nearest point of the square; a wild draw must not spoil the gradient of its batch."""
    prior = make_prior("less_noisy_square", 2, 10)
    near = torch.tensor([[0.3, 1.1], [1.5, -2.0], [-4.0, 0.2], [60.0, -7.0]])
    far = torch.tensor([[600.0, 0.5], [-1e6, 3e6], [1e15, -1e15], [1e17, 1e17]])
    labels = None if label is None else torch.tensor(label)
    z = torch.cat([near, far]).requires_grad_()
    value = prior.log_prob(z, labels)
    assert value.isfinite().all()
    (slope,) = torch.autograd.grad(value.sum(), z)
    exact = near.double().requires_grad_()
    (truth,) = torch.autograd.grad(prior.log_prob(exact, labels).sum(), exact)
    torch.testing.assert_close(slope[:4], truth.float(), rtol=1e-3, atol=1e-2)
    assert slope.isfinite().all()
    if label is None:
        expected = -(z[4:6] - z[4:6].sign() * torch.minimum(z[4:6].abs(), torch.ones(()))) / 0.06**2
        torch.testing.assert_close(slope[4:6], expected.detach(), rtol=1e-3, atol=1.0)


def test_a_narrow_curve_is_scored_without_a_table() -> None:
    narrow, wide = make_prior("swiss_roll", width=0.003), make_prior("swiss_roll", width=0.05)
    z = narrow.sample((200,), generator=generator(0))
    log_prob = narrow.log_prob(z)
    assert structured._neighbourhoods(type(narrow), narrow.count, narrow.width, torch.float32) is None
    assert wide.log_prob(z).isfinite().all()
    assert structured._neighbourhoods(type(wide), wide.count, wide.width, torch.float32) is not None
    by_part = torch.stack([narrow.log_prob(z, torch.full((200,), part)) for part in range(10)])
    torch.testing.assert_close(log_prob, by_part.logsumexp(0) - math.log(10), atol=2e-3, rtol=1e-4)


def test_the_table_of_a_law_is_made_once(monkeypatch):
    with torch.inference_mode():  # whatever mode the first call is in
        make_prior("pinwheel", 2, 4, 0.07).log_prob(torch.zeros(1, 2))
    made = []
    monkeypatch.setattr(structured.Neighbourhoods, "affordable", lambda nodes: made.append(nodes) or False)
    z = torch.tensor([[0.9, 0.2]], requires_grad=True)
    make_prior("pinwheel", 3, 4, 0.07).log_prob(torch.cat([z, z[:, :1]], 1)).sum().backward()
    assert z.grad.isfinite().all()
    assert not made
    make_prior("pinwheel", 2, 4, 0.08).log_prob(z)
    assert len(made) == 1
    structured._neighbourhoods.cache_clear()
