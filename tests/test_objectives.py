"""Objectives against their definitions, recomputed by hand under the same random state."""

import gc
import itertools
import math
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torch.nn.functional import logsigmoid

from ddvi.composition import Observations, build_model
from ddvi.errors import InputError
from ddvi.evidence import exact_log_likelihood
from ddvi.likelihoods import BernoulliLikelihood
from ddvi.model import LatentVariableModel
from ddvi.objectives.adversarial import Adversarial
from ddvi.objectives.base import Batch
from ddvi.objectives.elbo import ELBO, ImportanceWeighted, risen
from ddvi.objectives.marginal import MarginalLikelihood
from ddvi.objectives.prior_draws import PriorDraws
from ddvi.objectives.sleep import Sleep
from ddvi.objectives.wake_sleep import ReweightedWakeSleep, WakeSleep
from ddvi.objectives.warm_up import WarmUp
from ddvi.posteriors.diffusion import DiffusionPosterior
from ddvi.posteriors.flow import FlowPosterior
from ddvi.posteriors.gaussian import GaussianPosterior
from ddvi.posteriors.hierarchical import HierarchicalPosterior
from ddvi.posteriors.implicit import ImplicitPosterior
from ddvi.priors import make_prior
from ddvi.randomness import choose, resample, seeded, taken
from ddvi.settings import resolve

pytestmark = pytest.mark.usefixtures("float64")

POSTERIORS = {
    "gaussian": GaussianPosterior,
    "flow": lambda *a: FlowPosterior(*a, flow_layers=2, context_size=4),
    "hierarchical": lambda *a: HierarchicalPosterior(*a, flow_layers=2, context_size=4),
    "diffusion": lambda *a: DiffusionPosterior(*a, steps=3, denoiser_size=8, denoiser_layers=2),
}
posteriors = pytest.mark.parametrize("name", POSTERIORS)


def make_model(name):
    """Five binary entries, two latents, a mixture as prior, random parameters."""
    encoder = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
    encoder.out_features = 6
    posterior = ImplicitPosterior(encoder, 2) if name == "implicit" else POSTERIORS[name](encoder, 2)
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    discriminator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(-2))
    likelihood = BernoulliLikelihood(nn.Linear(2, 5), torch.Size([5]))
    return LatentVariableModel(make_prior("gaussian_mixture", 2, 3), likelihood, posterior, discriminator=discriminator)


def make_batch(progress=1.0):
    return Batch((torch.rand(7, 5) < 0.5).double(), progress)


def log_weight(model, x, draw, kl_weight=1.0, prior_weight=1.0):
    """log p(x|z) + kl_weight (prior_weight log p(z) + log r(a|z) − log q(z,a|x)), the likelihood by torch."""
    log_prior = prior_weight * model.prior.log_prob(draw.z)
    return model.likelihood(draw.z).log_prob(x) + kl_weight * (log_prior - draw.log_ratio)


def losses(objective, model, batch, seed=3):
    """Every update of one step, with none carried out."""
    torch.manual_seed(seed)
    updates = list(objective.updates(model, batch))
    torch.manual_seed(seed)
    for update in updates:
        assert all(value.shape[:1] == update.loss.shape == (len(batch.x),) for value in update.terms.values())
    return updates


def assert_loss(update, by_hand):
    torch.testing.assert_close(update.loss, by_hand, atol=1e-10, rtol=0)


def gradients(loss, module):
    return torch.autograd.grad(loss.mean(), list(module.parameters()), retain_graph=True, allow_unused=True)


def touches(loss, module):
    return any(gradient is not None and bool((gradient != 0).any()) for gradient in gradients(loss, module))


@posteriors
@pytest.mark.parametrize("path_gradient", [False, True])
def test_elbo_is_the_mean_weight(name, path_gradient):
    model, batch = make_model(name), make_batch(progress=0.3)
    (update,) = losses(ELBO(samples=4, kl_weight=0.7, kl_rise=0.6, path_gradient=path_gradient), model, batch)
    draw = model.posterior(batch.x).draw((4,))
    assert_loss(update, -log_weight(model, batch.x, draw, 0.35).mean(0))
    assert_loss(update, update.terms["reconstruction"] + 0.35 * update.terms["divergence"])
    assert update.children == ("likelihood", "posterior", "classifier", "prior")
    (update,) = losses(ELBO(4, 0.7, prior_weight=5.0, path_gradient=path_gradient), model, batch)
    draw = model.posterior(batch.x).draw((4,))
    assert_loss(update, -log_weight(model, batch.x, draw, 0.7, 5.0).mean(0))


@posteriors
def test_importance_weighted_is_the_log_mean_weight(name):
    model, batch = make_model(name), make_batch()
    (update,) = losses(ImportanceWeighted(samples=5), model, batch)
    weights = log_weight(model, batch.x, model.posterior(batch.x).draw((5,)))
    assert_loss(update, -weights.exp().mean(0).log())
    (update,) = losses(ImportanceWeighted(samples=5, kl_weight=0.7, prior_weight=2.0), model, batch)
    weights = log_weight(model, batch.x, model.posterior(batch.x).draw((5,)), 0.7, 2.0)
    assert_loss(update, -weights.logsumexp(0) + math.log(5))


@posteriors
@pytest.mark.parametrize("path_gradient", [False, True])
def test_the_importance_weighted_bound_takes_the_log_variance_loss_beside_it(name, path_gradient):
    model, batch = make_model(name), make_batch(progress=0.4)
    objective = ImportanceWeighted(samples=5, path_gradient=path_gradient, variance_weight=0.5)
    (update,) = losses(objective, model, batch)
    weights = log_weight(model, batch.x, model.posterior(batch.x).draw((5,)))
    size = (weights - weights.mean(0)).abs()
    variance = torch.where(size < 10, size**2 / 2, 10 * size - 50).sum(0) / 4
    assert_loss(update, math.log(5) - weights.logsumexp(0) + 0.4 * 0.5 * variance)
    torch.testing.assert_close(update.terms["log_variance"], variance)
    assert touches(update.terms["log_variance"], model.posterior)
    assert not touches(update.terms["log_variance"], model.likelihood), "draws and weights are held fixed"


@posteriors
@pytest.mark.parametrize("make", [ELBO, ImportanceWeighted])
@pytest.mark.parametrize("path_gradient", [False, True])
def test_a_bound_takes_the_sleep_term_beside_it_in_one_update(name, make, path_gradient):
    model, batch = make_model(name), make_batch()
    objective = make(samples=3, path_gradient=path_gradient, sleep_weight=0.7, fantasies=2)
    (update,) = losses(objective, model, batch)
    x, z, _ = model.fantasise(2 * 7)
    weights = log_weight(model, batch.x, model.posterior(batch.x).draw((3,)))
    wake = -weights.mean(0) if make is ELBO else math.log(3) - weights.logsumexp(0)
    sleep = -model.posterior(x).log_bound(z).view(2, 7).mean(0)
    assert_loss(update, wake + 0.7 * sleep)
    torch.testing.assert_close(update.terms["sleep"], sleep)
    assert not touches(update.terms["sleep"], model.likelihood), "fantasies carry no gradient to the decoder"
    assert touches(update.terms["sleep"], model.posterior)


def test_one_draw_makes_the_importance_weighted_bound_the_elbo():
    model, batch = make_model("diffusion"), make_batch()
    (one,), (elbo,) = losses(ImportanceWeighted(1), model, batch), losses(ELBO(), model, batch)
    assert_loss(one, elbo.loss)


def test_the_kl_weight_rises_linearly_and_stays():
    assert [risen(2.0, 0.5, progress) for progress in (0, 0.1, 0.25, 0.5, 0.8, 1)] == [0, 0.4, 1, 2, 2, 2]
    assert risen(2.0, 0.0, 0.0) == 2


@posteriors
@pytest.mark.parametrize("levels", [None, 1])
def test_wake_sleep_is_one_bound_on_data_and_sleep_steps_on_fantasies(name, levels):
    model, batch = make_model(name), make_batch()
    objective = WakeSleep(ELBO(2), sleep_steps=3, sleep_weight=0.5, levels=levels)
    wake, *sleep = losses(objective, model, batch)
    assert len(sleep) == 3
    assert_loss(wake, -log_weight(model, batch.x, model.posterior(batch.x).draw((2,))).mean(0))
    with torch.no_grad():
        every_z = model.prior.sample((3 * 7,))
        every_x = model.likelihood(every_z).sample()
    for update, z, x in zip(sleep, every_z.split(7), every_x.split(7), strict=True):
        bound = model.posterior(x).log_bound(z, levels)
        assert_loss(update, -0.5 * bound)
        torch.testing.assert_close(update.terms["sleep"], -bound)
        assert update.children == ("posterior", "classifier")
        assert touches(update.loss, model.posterior)
        assert not touches(update.loss, model.likelihood), "fantasies carry no gradient to the decoder"


def test_sleep_without_weight_is_none():
    """Adam would go on by its momentum."""
    assert len(losses(WakeSleep(sleep_steps=3, sleep_weight=0), make_model("gaussian"), make_batch())) == 1


def test_the_updates_of_a_step_see_those_before():
    model, batch = make_model("gaussian"), make_batch()
    updates = WakeSleep(sleep_steps=1).updates(model, batch)
    next(updates)
    with torch.no_grad():
        model.posterior.head.bias.add_(1.0)
    torch.manual_seed(5)
    sleep = next(updates)
    torch.manual_seed(5)
    x, z, _ = model.fantasise(7)
    assert_loss(sleep, -model.posterior(x).log_bound(z))


@posteriors
@pytest.mark.parametrize("sleep_weight", [0.0, 0.3])
def test_reweighted_wake_sleep_resamples_and_scores(name, sleep_weight):
    model, batch = make_model(name), make_batch()
    (update,) = losses(ReweightedWakeSleep(samples=6, sleep_weight=sleep_weight), model, batch)
    dreamt, known, _ = model.fantasise(7) if sleep_weight else (None, None, None)
    with torch.no_grad():
        draw = model.posterior(batch.x).draw((6,))
        chosen = choose(log_weight(model, batch.x, draw))
        z = torch.stack([draw.z[k, n] for n, k in enumerate(chosen)])
    bound = model.posterior(batch.x).log_bound(z[None])[0]
    loss = -model.likelihood(z).log_prob(batch.x) - model.prior.log_prob(z) - bound
    if sleep_weight:
        loss = loss - sleep_weight * model.posterior(dreamt).log_bound(known)
    assert_loss(update, loss)
    assert ("sleep" in update.terms) == (sleep_weight > 0)


@posteriors
@pytest.mark.parametrize("decoded", [0, 1, 2, 9])
def test_draws_of_the_prior_that_the_batch_shares_compete_with_those_of_the_posterior(name, decoded):
    model, batch = make_model(name), make_batch()
    (update,) = losses(ReweightedWakeSleep(samples=4, prior_samples=9, resampled=3, decoded=decoded), model, batch)
    with torch.no_grad():
        dreamt, known, _ = model.fantasise(7)
        shared = model.prior.sample((9,))
        draw = model.posterior(batch.x).draw((4,))
    own = log_weight(model, batch.x, draw).T - math.log(4)
    broad = torch.stack([model.likelihood(z).log_prob(batch.x) for z in shared], 1) - math.log(9)
    weight = torch.cat([own, broad], 1)
    with torch.no_grad():
        chosen = resample(weight.T, 3).T
        z = torch.stack([torch.cat([draw.z[:, n], shared])[chosen[n]] for n in range(7)], 1)
    assert 0 < (chosen < 4).sum() < chosen.numel(), "the test has lost its power"
    wake = -model.posterior(batch.x).log_bound(z).mean(0)
    sleep = -model.posterior(dreamt).log_bound(known)
    parts = [-model.likelihood(each).log_prob(batch.x) - model.prior.log_prob(each) for each in z[:decoded]]
    decoder = torch.stack(parts).mean(0) if decoded else math.log(2) - weight.logsumexp(1)
    assert_loss(update, decoder + wake + 0.3 * sleep)
    pairs = zip(*(gradients(loss, model.likelihood) for loss in (update.loss, decoder)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


@posteriors
@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_the_log_variance_loss_rises_beside_the_rest_and_far_draws_count_less(name, progress):
    model, batch = make_model(name), make_batch(progress)
    with torch.no_grad():
        model.likelihood.decoder.weight.mul_(6)  # for log weights that are more than 10 nats apart
    (plain,) = losses(ReweightedWakeSleep(samples=5), model, batch)
    (update,) = losses(ReweightedWakeSleep(samples=5, variance_weight=0.3), model, batch)
    model.fantasise(7)
    with torch.no_grad():
        draw = model.posterior(batch.x).draw((5,))
    deviation = log_weight(model, batch.x, draw._replace(log_ratio=model.posterior(batch.x).log_ratio(draw.path)))
    deviation = deviation - deviation.mean(0)
    far = deviation.abs() > 10
    assert 0 < far.sum() < far.numel(), "the test has lost its power"
    loss = torch.where(far, 10 * deviation.abs() - 50, deviation.square() / 2).sum(0) / 4
    assert_loss(update, plain.loss + 0.3 * progress * loss)
    by_hand = gradients(0.3 * progress * loss, model.posterior)
    added = gradients(update.loss - plain.loss, model.posterior)
    for parameter, *pair in zip(model.posterior.parameters(), added, by_hand, strict=True):
        one, other = (torch.zeros_like(parameter) if gradient is None else gradient for gradient in pair)
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    pairs = zip(*(gradients(each.loss, model.likelihood) for each in (update, plain)), strict=True)
    for one, other in pairs:  # the decoder doesn't learn to make draws alike
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("samples", "prior_samples"), [(300, 0), (1, 3000)])
def test_what_is_resampled_is_a_draw_of_the_exact_posterior(samples, prior_samples):
    """The mean of z* under a posterior that is much too broad, for one example many times."""
    model = make_model("gaussian")
    x = make_batch().x[:1].expand(2000, -1)
    with torch.no_grad():
        model.posterior.head.weight.zero_()
        model.posterior.head.bias.copy_(torch.tensor([0.0, 0.0, 0.7, 0.7]))
        draw = model.posterior(x).draw((samples,))
        weights = log_weight(model, x, draw)
        objective = ReweightedWakeSleep(samples, prior_samples=prior_samples)
        broad = PriorDraws.of(model, x, prior_samples) if prior_samples else None
        candidates, log_share = objective._candidates(draw.z, weights, broad, None)
        z = taken(candidates, resample(log_share, 1))[0]
        many = model.prior.sample((200_000,))
        exact = model.likelihood.pairwise_log_prob(x[:1], many)[0].softmax(0) @ many
    assert ((z.mean(0) - exact).abs() < 4 * z.std(0) / 2000**0.5 + 0.05).all()
    assert (exact - many.mean(0)).norm() > 0.3, "the test has lost its power"


@pytest.mark.parametrize("name", ["gaussian", "diffusion"])
def test_reweighted_wake_sleep_follows_the_gradient_of_the_evidence(correlated, name):
    """For many draws ∇_θ log p_θ(x|z*) has the mean ∇_θ log p_θ(x)."""
    encoder = correlated.encoder()
    posterior = (
        GaussianPosterior(encoder, 2)
        if name == "gaussian"
        else DiffusionPosterior(encoder, 2, steps=2, denoiser_size=8)
    )
    head = posterior.head if name == "gaussian" else posterior.anchor
    with torch.no_grad():
        head.weight.copy_(torch.cat([correlated.gain, torch.zeros(2, 3)]))
        head.bias.copy_(torch.cat([-correlated.gain @ correlated.offset, correlated.covariance.diagonal().log()]))
    model = correlated.model(posterior)
    with torch.no_grad():  # away from where the data come from
        model.likelihood.decoder.weight.mul_(0.9)
        model.likelihood.log_scale.add_(0.1)
    x = correlated.simulate(5)[1]
    decoder, log_scale = model.likelihood.decoder, model.likelihood.log_scale
    covariance = decoder.weight @ decoder.weight.T + (2 * log_scale).exp() * torch.eye(3)
    evidence = MultivariateNormal(decoder.bias, covariance).log_prob(x)
    exact = torch.cat([g.flatten() for g in gradients(-evidence, model.likelihood)])
    found = []
    for _ in range(40):
        (update,) = ReweightedWakeSleep(samples=300, sleep_weight=0).updates(model, Batch(x.repeat(40, 1)))
        found.append(torch.cat([g.flatten() for g in gradients(update.loss, model.likelihood)]))
    found = torch.stack(found)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - exact).abs() < 4.5 * error + 0.005 * exact.norm()).all()
    assert error.norm() < 0.05 * exact.norm(), "the test has lost its power"


@pytest.mark.parametrize("levels", [None, 1])
def test_warm_up_is_the_bound_without_context_and_denoising_of_the_prior(levels):
    model, batch = make_model("diffusion"), make_batch()
    wake, *sleep = losses(WarmUp(kl_weight=0.5, sleep_steps=2, levels=levels), model, batch)
    posterior = model.posterior
    conditional = posterior.without_context(posterior.encode(batch.x))
    assert_loss(wake, -log_weight(model, batch.x, conditional.draw((1,)), 0.5).mean(0))
    assert len(sleep) == 2
    for update in sleep:
        z = model.prior.sample((7,))
        assert_loss(update, -posterior.without_context(posterior.encode(batch.x)).log_bound(z, levels))
        assert touches(update.loss, posterior.denoiser)
        for resting in (posterior.encoder, posterior.anchor, model.likelihood):
            assert not touches(update.loss, resting), "draws of the prior say nothing of the encoding of data"


def test_warm_up_of_a_posterior_without_a_denoiser_is_refused():
    with pytest.raises(InputError, match=r"^warm-up trains .*, and GaussianPosterior has none; use warmup=0$"):
        losses(WarmUp(), make_model("gaussian"), make_batch())


def test_adversarial_losses_are_those_of_the_game():
    model, batch = make_model("implicit"), make_batch()
    discrimination, generation = losses(Adversarial(weight=3.0), model, batch)
    z = model.posterior(batch.x).draw().z
    real, encoded = model.discriminator(model.prior.sample((7,))), model.discriminator(z)
    assert_loss(discrimination, -logsigmoid(real) - (1 - torch.sigmoid(encoded)).log())
    assert_loss(generation, -model.likelihood(z).log_prob(batch.x) - 3 * logsigmoid(encoded))
    assert discrimination.children == ("discriminator",)
    assert generation.children == ("likelihood", "posterior")
    assert not touches(discrimination.loss, model.posterior), "the discriminator's step leaves the encoder alone"
    assert touches(generation.loss, model.posterior)


def test_adversarial_training_without_a_discriminator_is_refused():
    model = make_model("implicit")
    model.discriminator = None
    with pytest.raises(InputError, match="needs a model with a discriminator"):
        losses(Adversarial(), model, make_batch())


OBJECTIVES = (ELBO(), ImportanceWeighted(), WakeSleep(), ReweightedWakeSleep(), WarmUp(), Adversarial())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_objectives_are_frozen_values(objective):
    assert objective == type(objective)()
    assert hash(objective) == hash(type(objective)())
    with pytest.raises(AttributeError):
        objective.samples = 3


def test_different_objectives_differ():
    assert all(first != second for first, second in itertools.combinations(OBJECTIVES, 2))
    assert ELBO(2) != ELBO(3)


@posteriors
def test_the_marginal_objective_is_the_evidence_and_a_draw_of_the_exact_posterior(name):
    model, batch = make_model(name), make_batch()
    objective = MarginalLikelihood(samples=50_000)
    (update,) = losses(objective, model, batch)
    evidence = exact_log_likelihood(model.prior, model.likelihood, batch.x).log_likelihood
    torch.testing.assert_close(-update.terms["marginal"], evidence, atol=0.02, rtol=0)
    # The decoder's gradient is that of the evidence: each draw counts as much as it is probable given x.
    z = model.prior.sample((50_000,))
    log_likelihood = model.likelihood(z[:, None]).log_prob(batch.x)
    share = log_likelihood.detach().softmax(0)
    wanted = gradients(-(share * log_likelihood).sum(0).mean(), model.likelihood)
    for found, value in zip(gradients(update.loss.mean(), model.likelihood), wanted, strict=True):
        torch.testing.assert_close(found, value, atol=0.01, rtol=0.05)
    assert touches(update.loss.mean(), model.posterior)


def test_fantasies_per_example_are_averaged():
    model, batch = make_model("gaussian"), make_batch()
    (update,) = losses(ReweightedWakeSleep(samples=4, fantasies=3), model, batch)
    assert update.loss.shape == (7,)
    objectives = (partial(ReweightedWakeSleep, 1), partial(WakeSleep, sleep_steps=1))
    for objective in objectives:

        def sleep(fantasies, seed, objective=objective):
            update = losses(objective(fantasies=fantasies), model, batch, seed)[-1]
            return update.terms["sleep"].mean()

        one = torch.stack([sleep(1, seed) for seed in range(300)])
        many = torch.stack([sleep(100, seed) for seed in range(5)])
        assert (many.mean() - one.mean()).abs() < 5 * one.std() / 300**0.5
        assert many.std() < 0.5 * one.std()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_a_model_that_has_overflown_has_a_loss_that_says_so(objective):
    model = make_model("implicit" if isinstance(objective, Adversarial) else "diffusion")
    with torch.no_grad():
        next(model.likelihood.parameters()).fill_(math.nan)
        next(model.posterior.parameters()).fill_(math.nan)
    update = list(objective.updates(model, make_batch()))[-1]
    assert not update.loss.isfinite().any()


def test_a_weight_that_is_no_number_loses_to_any_that_is():
    log_weight = torch.tensor([[math.nan, -math.inf, 0.0], [math.nan, -1e4, math.nan], [math.nan] * 3])
    assert choose(log_weight.T)[:2].tolist() == [2, 1]


def test_the_graph_of_a_path_gradient_is_freed():
    """The hook on the path must not hold the graph that holds it: collecting cycles doesn't see into it."""

    class Token:
        pass

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, tokens):
            ctx.token = tokens.pop()
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient, None

    model, batch = make_model("diffusion"), make_batch()
    log_prob, tokens = model.likelihood.log_prob, [Token()]
    seen = weakref.ref(tokens[0])
    model.likelihood.log_prob = lambda x, z: Watched.apply(log_prob(x, z), tokens)
    update = next(ImportanceWeighted(samples=3, path_gradient=True).updates(model, batch))
    assert seen() is not None
    del update
    gc.collect()
    assert seen() is None


def test_warm_up_of_a_guided_posterior_sees_features_alone():
    settings = resolve("digits", "ddvi", "pinwheel", {"warmup": 1, "guidance": 1, "hidden_size": 8, "steps": 3})
    observations = Observations((4,), "bernoulli", "as_is", parts=3)
    with seeded(0):
        model = build_model(settings, observations)
        (loss, *_) = losses(WarmUp(), model, Batch(torch.ones(5, 4)))
    assert loss.loss.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ELBO(samples=0), "samples=0 is impossible in ELBO; give 1 or more"),
        (lambda: ELBO(samples=1.5), "samples=1.5 is impossible in ELBO; give a whole number, 1 or more"),
        (lambda: ELBO(kl_weight=math.nan), "kl_weight=nan is impossible in ELBO; give 0 or more"),
        (lambda: WakeSleep(sleep_weight=-1.0), "sleep_weight=-1.0 is impossible in WakeSleep"),
        (lambda: ELBO(sleep_weight=-1), "sleep_weight=-1 is impossible in ELBO; give 0 or more"),
        (lambda: ELBO(fantasies=None), "fantasies=None is impossible in ELBO; give a whole number, 1 or more"),
        (
            lambda: WakeSleep(ELBO(sleep_weight=0.3)),
            "sleep_weight=0.3 of the bound would come beside",
        ),
        (lambda: ImportanceWeighted(samples=0), "samples=0 is impossible in ImportanceWeighted"),
        (lambda: WakeSleep(sleep_steps=-1), "sleep_steps=-1"),
        (lambda: WakeSleep(levels=0), "levels=0"),
        (lambda: Sleep(levels=0), "levels=0 is impossible in Sleep"),
        (lambda: WarmUp(levels=0), "levels=0 is impossible in WarmUp"),
        (lambda: ReweightedWakeSleep(resampled=0), "resampled=0"),
        (lambda: ReweightedWakeSleep(decoded=-1), "decoded=-1"),
        (lambda: MarginalLikelihood(samples=0), "samples=0 is impossible in MarginalLikelihood"),
    ],
)
def test_counts_below_the_least_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
