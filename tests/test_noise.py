"""The noising process against Bayes' rule, its marginals, and the definitions of its schedules."""

import copy
import math

import pytest
import torch
from torch.distributions import Normal

from ddvi.catalogue import NOISE_SCHEDULES
from ddvi.errors import InputError
from ddvi.noise import SCHEDULES, NoisingProcess, point

pytestmark = pytest.mark.usefixtures("float64")

chains = pytest.mark.parametrize(
    ("schedule", "steps"), [(schedule, steps) for schedule in SCHEDULES for steps in (1, 2, 5, 40)]
)


@pytest.fixture(autouse=True)
def _without_gradient():
    with torch.no_grad():
        yield


def log_normal(z, mean, variance):
    return Normal(mean, torch.as_tensor(variance).sqrt()).log_prob(z).sum(-1)


def step_forward(noise, t):
    """Factor and variance of r(z_t | z_{t-1}), from α alone."""
    ratio = noise.constants().alpha[t] / noise.constants().alpha[t - 1]
    return ratio, 1 - ratio**2


def test_every_schedule_has_a_line_in_the_catalogue():
    assert set(SCHEDULES) == set(NOISE_SCHEDULES)


@chains
def test_signal_and_noise_share_unit_variance(schedule, steps):
    noise = NoisingProcess(steps, schedule)
    torch.testing.assert_close(
        noise.constants().alpha ** 2 + noise.constants().sigma ** 2, torch.ones(steps + 1), atol=1e-14, rtol=0
    )
    assert noise.constants().alpha[0] == 1
    assert (noise.constants().alpha.diff() < 0).all(), "every step must lose signal"


@chains
def test_step_back_is_the_posterior_of_the_chain_by_bayes_rule(schedule, steps):
    noise = NoisingProcess(steps, schedule)
    path = noise.path(torch.randn(50, 3))
    z = path[0]
    for t in range(2, steps + 1):
        level = torch.tensor(t)
        ratio, variance = step_forward(noise, t)
        joint = log_normal(path[t], ratio * path[t - 1], variance) + log_normal(
            path[t - 1], noise.constants().alpha[t - 1] * z, noise.constants().sigma[t - 1] ** 2
        )
        back = log_normal(path[t - 1], *noise.step_back(point(z), path[t], noise.at(level)))
        marginal = log_normal(path[t], *noise.marginal(point(z), noise.at(level)))
        torch.testing.assert_close(back + marginal, joint, atol=1e-9, rtol=0, msg=f"Bayes' rule fails at t = {t}")


@chains
def test_step_back_from_the_first_level_is_the_latent_itself(schedule, steps):
    noise = NoisingProcess(steps, schedule)
    z, z_t = torch.randn(2, 4, 3)
    mean, variance = noise.step_back(point(z), z_t, noise.at(torch.tensor(1)))
    torch.testing.assert_close(mean, z, atol=1e-14, rtol=0)
    assert float(variance.abs().max()) == 0


@chains
def test_composed_steps_have_the_marginals(schedule, steps):
    noise = NoisingProcess(steps, schedule)
    factor, variance = torch.tensor(1.0), torch.tensor(0.0)
    for t in range(1, steps + 1):
        ratio, added = step_forward(noise, t)
        factor, variance = ratio * factor, ratio**2 * variance + added
        torch.testing.assert_close(factor, noise.constants().alpha[t], atol=1e-14, rtol=0)
        torch.testing.assert_close(variance, noise.constants().sigma[t] ** 2, atol=1e-14, rtol=0)
    for t in range(steps, 1, -1):  # and back again, from z_0 = 1: z_t has mean `factor` and variance `variance`
        mean, added = noise.step_back(point(torch.ones(1)), factor.view(1), noise.at(torch.tensor(t)))
        factor, variance = mean[0], noise.constants().weight_current[t] ** 2 * variance + added[0]
        torch.testing.assert_close(factor, noise.constants().alpha[t - 1], atol=1e-13, rtol=0)
        torch.testing.assert_close(variance, noise.constants().sigma[t - 1] ** 2, atol=1e-13, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_drawn_paths_have_the_chains_mean_and_covariance(schedule):
    steps, count, start = 5, 200_000, 0.7
    noise = NoisingProcess(steps, schedule)
    path = noise.path(torch.full((count, 1), start)).squeeze(-1)
    assert (path[0] == start).all()
    alpha, sigma = noise.constants().alpha, noise.constants().sigma
    for t in range(1, steps + 1):
        mean_error = (path[t].mean() - alpha[t] * start) / (sigma[t] / math.sqrt(count))
        assert abs(mean_error) < 4.5, f"mean of z_{t} is {mean_error:.1f} standard errors off"
        for s in range(1, t + 1):
            covariance = (alpha[t] / alpha[s]) * sigma[s] ** 2
            error = math.sqrt((float(sigma[s] * sigma[t]) ** 2 + float(covariance) ** 2) / count)
            found = ((path[s] - alpha[s] * start) * (path[t] - alpha[t] * start)).mean()
            assert abs(found - covariance) < 4.5 * error, f"covariance of z_{s} and z_{t}"


def test_schedules_keep_to_their_definitions():
    t = torch.arange(1, 13)
    alpha = {name: NoisingProcess(12, name).constants().alpha[1:] for name in SCHEDULES}
    snr = (alpha["log_snr"] ** 2 / (1 - alpha["log_snr"] ** 2)).log()
    torch.testing.assert_close(snr, 8 - 12 * (t - 1) / 11, atol=1e-10, rtol=0)
    torch.testing.assert_close(alpha["cosine"].acos(), 0.5 * math.pi * t / 13, atol=1e-12, rtol=0)
    beta = 1 - (alpha["linear_beta"] / torch.cat([torch.ones(1), alpha["linear_beta"][:-1]])) ** 2
    torch.testing.assert_close(beta, 1e-4 + (0.02 - 1e-4) * (t - 1) / 11, atol=1e-14, rtol=0)


def test_a_learned_process_stays_sound_next_to_no_noise():
    torch.set_default_dtype(torch.float32)
    noise = NoisingProcess(6, "learned")
    with torch.no_grad():
        noise.log_snr[0].fill_(30.0)
    single, double = noise.constants(), copy.deepcopy(noise).double().constants()
    for name in single._fields:
        found, exact = getattr(single, name), getattr(double, name)
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-12, msg=name)
    assert (single.sigma[1:] > 0).all()


def test_a_cast_to_double_gets_digits():
    torch.set_default_dtype(torch.float32)
    noise = NoisingProcess(40).double()
    torch.testing.assert_close(
        noise.constants().alpha ** 2 + noise.constants().sigma ** 2, torch.ones(41).double(), atol=1e-14, rtol=0
    )


def test_levels_broadcast_over_draws():
    noise = NoisingProcess(5)
    z, z_t = torch.randn(2, 7, 4, 3)
    t = torch.randint(2, 6, (7, 4))
    mean, variance = noise.step_back(point(z), z_t, noise.at(t))
    marginal, _ = noise.marginal(point(z), noise.at(t))
    for index in torch.cartesian_prod(torch.arange(7), torch.arange(4)).tolist():
        alone = noise.step_back(point(z[*index]), z_t[*index], noise.at(t[*index]))
        torch.testing.assert_close((mean[*index], variance[*index].expand(3)), tuple(alone))
        torch.testing.assert_close(marginal[*index], noise.constants().alpha[t[*index]] * z[*index])


def test_impossible_chains_are_refused():
    with pytest.raises(InputError, match="at least 1 step, not 0"):
        NoisingProcess(0)
    with pytest.raises(InputError, match=r"unknown noise schedule 'cosin'.*did you mean 'cosine'"):
        NoisingProcess(3, "cosin")
