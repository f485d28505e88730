"""Learning with few labels: the bounds, the losses by hand, which labels can be seen, the names, the measures."""

import dataclasses
import math
import re
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from conftest import set_linear
from ddvi import checkpoint, data, evaluation, figures, labels, measures, runs
from ddvi.composition import Observations, build_model, make_phases, observe
from ddvi.data import Dataset
from ddvi.errors import InputError
from ddvi.labels import choose_labelled
from ddvi.likelihoods import BernoulliLikelihood, GaussianLikelihood
from ddvi.methods import METHODS
from ddvi.model import LatentVariableModel
from ddvi.objectives.adversarial import Adversarial
from ddvi.objectives.base import Batch, Labelled, Objective
from ddvi.objectives.elbo import ELBO, ImportanceWeighted, cross_entropy, damped
from ddvi.objectives.prior_draws import PriorDraws
from ddvi.objectives.semi_supervised import SemiSupervised, _steepness, _unit
from ddvi.objectives.wake_sleep import ReweightedWakeSleep, WakeSleep
from ddvi.objectives.warm_up import WarmUp
from ddvi.posteriors.base import VARIANCE_FLOOR
from ddvi.posteriors.diffusion import DiffusionPosterior
from ddvi.posteriors.flow import FlowPosterior
from ddvi.posteriors.gaussian import GaussianPosterior
from ddvi.posteriors.hierarchical import HierarchicalPosterior
from ddvi.posteriors.implicit import ImplicitPosterior
from ddvi.priors import as_prior, make_prior
from ddvi.randomness import choose, seeded
from ddvi.schedule import Phase, Schedule
from ddvi.settings import deviations, resolve
from ddvi.training import Interrupted, Trainer

# Bounds, on a model whose log p(x, l) is known


class Parts:
    """p(z | l) = N(m_l, I), three parts."""

    parts = 3

    def __init__(self):
        self.centres = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -2.0]])

    def sample(self, sample_shape=(), label=None):
        label = torch.randint(self.parts, tuple(sample_shape)) if label is None else label
        return self.centres[label] + torch.randn(*sample_shape, 2)

    def log_prob(self, z, label=None):
        every = Normal(self.centres, 1.0).log_prob(z.unsqueeze(-2)).sum(-1)
        if label is None:
            return every.logsumexp(-1) - math.log(self.parts)
        return every.gather(-1, label.expand(z.shape[:-1])[..., None])[..., 0]


class Known:
    """`Parts` as a prior, x = A z + b + σ ε: everything is Gaussian given the label, and log p(l | x) linear in x."""

    def __init__(self, linear):
        self.linear, self.parts = linear, Parts()
        self.means = self.parts.centres @ linear.decoder.T
        self.noise = linear.evidence().covariance_matrix

    def joint(self, x):
        """log p(x, l), (3, B)."""
        return torch.stack(
            [MultivariateNormal(self.linear.offset + mean, self.noise).log_prob(x) for mean in self.means]
        ) - math.log(3)

    def evidence(self, x):
        return self.joint(x).logsumexp(0)

    def posterior(self, x):
        """p(z | x, l), batch shape (3, B)."""
        shift = self.parts.centres @ self.linear.covariance
        mean = (x - self.linear.offset) @ self.linear.gain.T + shift[:, None]
        return MultivariateNormal(mean, self.linear.covariance)

    def simulate(self, count):
        label = torch.arange(count) % 3
        z = self.parts.sample((count,), label)
        noise = self.linear.scale * torch.randn(count, len(self.linear.offset))
        return z @ self.linear.decoder.T + self.linear.offset + noise, label

    def model(self, name, wrong=0.0):
        """q(l|x) = p(l|x) and q(z|x,l) = p(z|x,l), with parameters off by `wrong` times a standard Gaussian."""
        linear, encoder = self.linear, self.linear.encoder()
        posterior = (
            GaussianPosterior(encoder, 2, 3)
            if name == "gaussian"
            else DiffusionPosterior(encoder, 2, 3, steps=3, denoiser_size=8, covariance="diagonal")
        )
        head = posterior.head if name == "gaussian" else posterior.anchor
        variance = linear.covariance.diagonal() - VARIANCE_FLOOR
        set_linear(
            head,
            torch.cat([linear.gain, torch.zeros_like(linear.gain)]),
            torch.cat([-linear.gain @ linear.offset, variance.log()]),
        )
        classifier = nn.Linear(len(linear.offset), 3)
        weight = self.means @ self.noise.inverse()
        set_linear(classifier, weight, -(weight @ linear.offset) - 0.5 * (weight * self.means).sum(-1))
        with torch.no_grad():
            posterior.label.weight.copy_(self.parts.centres @ linear.covariance @ linear.gain.pinverse().T)
            for parameter in [*posterior.parameters(), *classifier.parameters()]:
                parameter.add_(wrong * torch.randn_like(parameter))
        decoder = nn.Linear(2, len(linear.offset))
        set_linear(decoder, linear.decoder, linear.offset)
        likelihood = GaussianLikelihood(decoder, torch.Size([len(linear.offset)]), torch.full((1,), linear.scale))
        return LatentVariableModel(as_prior(self.parts), likelihood, posterior, classifier=classifier)


@pytest.fixture
def known(orthogonal):
    return Known(orthogonal)


exact_posteriors = pytest.mark.parametrize("name", ["gaussian", "diffusion"])


@exact_posteriors
@torch.no_grad()
def test_bounds_are_tight_at_the_true_posterior(known, name):
    """Labelled and unlabelled, for each single draw."""
    model, (x, label) = known.model(name), known.simulate(12)
    joint = known.joint(x)
    torch.testing.assert_close(model.classify(x), (joint - joint.logsumexp(0)).T, atol=1e-9, rtol=0)
    for objective in (ELBO(), ImportanceWeighted(4)):
        close = {"atol": 1e-6, "rtol": 0}
        loss, _ = objective.loss(model, x, label)
        torch.testing.assert_close(-loss, joint.gather(0, label[None])[0], **close)
        loss, terms = objective.loss(model, x)
        if "classification" in terms:  # q(l|x) learns from the shares of the labels, beside the bound
            loss = loss - terms["classification"]
            shares = joint.softmax(0)
            torch.testing.assert_close(terms["classification"], -(shares * shares.log()).sum(0), **close)
        torch.testing.assert_close(-loss, known.evidence(x), **close)
    torch.testing.assert_close(model.log_weights(x, 2), known.evidence(x).expand(2, -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(model.importance_weighted_bound(x, 2), known.evidence(x), atol=1e-6, rtol=0)


@exact_posteriors
@torch.no_grad()
def test_bounds_stay_below_the_evidence(known, name):
    model, (x, label) = known.model(name, wrong=0.15), known.simulate(6)
    for truth, given in ((known.joint(x).gather(0, label[None])[0], label), (known.evidence(x), None)):
        losses = ELBO(4000).loss(model, x, given)[0]
        assert (-losses < truth).all()
        assert (truth + losses).max() > 0.05, "parameters are off, and the bound says so"


@exact_posteriors
@torch.no_grad()
def test_the_importance_weighted_bound_grows_to_the_evidence(known, name):
    model, (x, _) = known.model(name, wrong=0.06), known.simulate(6)
    truth, many = known.evidence(x).mean(), x.repeat(500, 1)
    bounds = [float(model.importance_weighted_bound(many, samples).mean()) for samples in (1, 4, 16)]
    assert bounds == sorted(bounds)
    assert float(model.log_weights(many, 1).mean()) < bounds[0], "the sum over labels loses nothing to q(l|x)"
    assert bounds[-1] < truth
    assert float(model.importance_weighted_bound(x, 20_000).mean()) == pytest.approx(float(truth), abs=0.02)


@exact_posteriors
@torch.no_grad()
def test_the_posteriors_density_is_the_mixture_over_labels(known, name):
    model, (x, _) = known.model(name), known.simulate(5)
    z = torch.randn(7, 5, 2)
    log_label = known.joint(x).log_softmax(0)
    mixture = (known.posterior(x).log_prob(z.unsqueeze(-3)) + log_label).logsumexp(-2)
    torch.testing.assert_close(model.log_posterior(x, z, 2), mixture, atol=1e-5, rtol=0)
    draws = model.latent(x.repeat(4000, 1)).view(4000, 5, 2)
    mean = (known.posterior(x).mean * log_label.exp()[..., None]).sum(0)
    assert ((draws.mean(0) - mean).abs() < 4.5 * draws.std(0) / math.sqrt(4000)).all()


@torch.no_grad()
def test_without_a_classifier_labels_follow_from_the_prior(known):
    """The adversarial autoencoder: p(l) p(z|l) / Σ_k p(k) p(z|k) at the encoded z."""
    posterior = ImplicitPosterior(known.linear.encoder(), 2)
    model = LatentVariableModel(as_prior(known.parts), known.model("gaussian").likelihood, posterior)
    x, _ = known.simulate(9)
    z = posterior(x).draw().z
    distances = torch.cdist(z, known.parts.centres).square()
    torch.testing.assert_close(model.classify(x), (-0.5 * distances).log_softmax(-1), atol=1e-10, rtol=0)


@torch.no_grad()
def test_fantasies_bring_their_label(known):
    model = known.model("gaussian")
    with seeded(1):
        _, z, label = model.fantasise(6000)
    for part, centre in enumerate(known.parts.centres):
        assert abs(float((label == part).double().mean()) - 1 / 3) < 0.03
        assert (z[label == part].mean(0) - centre).abs().max() < 0.1


# Losses, by hand

POSTERIORS = {
    "gaussian": GaussianPosterior,
    "flow": lambda *a: FlowPosterior(*a, flow_layers=2, context_size=4),
    "hierarchical": lambda *a: HierarchicalPosterior(*a, flow_layers=2, context_size=4),
    "diffusion": lambda *a: DiffusionPosterior(*a, steps=3, denoiser_size=8, denoiser_layers=2),
}
posteriors = pytest.mark.parametrize("name", POSTERIORS)
WEIGHT = 7.0


def make_model(name):
    """Five binary entries, two latents, a mixture of three as prior, random parameters."""
    encoder = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
    encoder.out_features = 6
    posterior = POSTERIORS[name](encoder, 2, 3)
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    likelihood = BernoulliLikelihood(nn.Linear(2, 5), torch.Size([5]))
    return LatentVariableModel(
        make_prior("gaussian_mixture", 2, 3), likelihood, posterior, classifier=nn.Linear(posterior.features, 3)
    )


def make_batch(progress=1.0):
    x = (torch.rand(14, 5) < 0.5).double()
    return Batch(x[:7], progress, Labelled(x[7:], torch.arange(7) % 3))


def losses(objective, model, batch, seed=3):
    """Every update of one step, with none carried out."""
    torch.manual_seed(seed)
    updates = list(SemiSupervised(objective, WEIGHT).updates(model, batch))
    torch.manual_seed(seed)
    return updates


def log_label(model, x):
    """log q(l | x), (B, 3)."""
    return model.classifier(model.posterior.encoder(x)).log_softmax(-1)


def draw_all_labels(model, x, samples):
    features = model.posterior.encoder(x) + model.posterior.label.weight[:, None]
    return model.posterior.condition(features).draw((samples,))


def log_weight(model, x, path, label, kl_weight=1.0):
    """log p(x|z) + kl_weight ( log 1/3 + log p(z|l) − log q(z,a|x,l) + log r(a|z) ) of one label, scored afresh."""
    z = path[0]
    log_ratio = model.posterior(x, label).log_ratio(path)
    prior = model.prior.log_prob(z, label.expand(z.shape[:-1])) - math.log(3)
    return model.likelihood(z).log_prob(x) + kl_weight * (prior - log_ratio)


def each_label(model, x, samples, kl_weight=1.0):
    """Log weights (samples, B) of each of three labels."""
    path = draw_all_labels(model, x, samples).path
    return [log_weight(model, x, path[..., i, :, :], torch.tensor([i]), kl_weight) for i in range(3)]


def told_label(model, labelled, samples, kl_weight=1.0):
    path = model.posterior(labelled.x, labelled.label).draw((samples,)).path
    return log_weight(model, labelled.x, path, labelled.label, kl_weight)


def classification(model, labelled):
    return -log_label(model, labelled.x).gather(1, labelled.label[:, None])[:, 0]


def elbo_by_hand(model, batch, samples, kl_weight):
    log_q = log_label(model, batch.x)
    unlabelled = sum(
        log_q[:, i].exp() * (weights.mean(0) - kl_weight * log_q[:, i])
        for i, weights in enumerate(each_label(model, batch.x, samples, kl_weight))
    )
    labelled = told_label(model, batch.labelled, samples, kl_weight).mean(0)
    return -unlabelled - labelled + WEIGHT * classification(model, batch.labelled)


def fantasies_by_hand(model, count, steps):
    """Those of all sleep steps come from one pass."""
    with torch.no_grad():
        label = torch.randint(3, (steps * count,))
        z = model.prior.sample((steps * count,), label)
        x = model.likelihood(z).sample()
    return zip(x.split(count), z.split(count), label.split(count), strict=True)


def sleep_by_hand(model, x, z, label, levels):
    own = log_label(model, x).gather(1, label[:, None])[:, 0]
    return -own - model.posterior(x, label).log_bound(z, levels)


def assert_loss(update, by_hand):
    torch.testing.assert_close(update.loss, by_hand, atol=1e-10, rtol=1e-10)
    assert all(value.shape == update.loss.shape for value in update.terms.values())


def touches(loss, module):
    gradients = torch.autograd.grad(loss.mean(), list(module.parameters()), retain_graph=True, allow_unused=True)
    return any(gradient is not None and bool((gradient != 0).any()) for gradient in gradients)


@pytest.mark.usefixtures("float64")
@posteriors
def test_elbo_with_labels_is_its_definition(name):
    model, batch = make_model(name), make_batch(progress=0.3)
    (update,) = losses(ELBO(samples=2, kl_weight=0.7, kl_rise=0.6), model, batch)
    assert_loss(update, elbo_by_hand(model, batch, 2, 0.35))
    terms = update.terms
    assert_loss(
        update,
        terms["reconstruction"]
        + terms["labelled_reconstruction"]
        + 0.35 * (terms["divergence"] + terms["labelled_divergence"])
        + WEIGHT * terms["labelled_classification"],
    )


@pytest.mark.usefixtures("float64")
@posteriors
def test_importance_weighted_with_labels_is_its_definition(name):
    model, batch = make_model(name), make_batch()
    (update,) = losses(ImportanceWeighted(4), model, batch)
    joint = torch.stack([weights.exp().mean(0) for weights in each_label(model, batch.x, 4)])
    shares = (joint / joint.sum(0)).detach()
    fit = -(shares.T * log_label(model, batch.x)).sum(1)
    labelled = told_label(model, batch.labelled, 4).exp().mean(0).log()
    assert_loss(update, -joint.sum(0).log() + fit - labelled + WEIGHT * classification(model, batch.labelled))


@pytest.mark.usefixtures("float64")
@posteriors
@pytest.mark.parametrize("levels", [None, 1])
def test_wake_sleep_with_labels_is_its_definition(name, levels):
    model, batch = make_model(name), make_batch()
    objective = WakeSleep(ELBO(2), sleep_steps=2, sleep_weight=0.5, levels=levels)
    wake, *sleep = losses(objective, model, batch)
    assert_loss(wake, elbo_by_hand(model, batch, 2, 1.0))
    assert len(sleep) == 2, "once for the step, not once for each kind of data"
    for update, fantasies in zip(sleep, fantasies_by_hand(model, 7, 2), strict=True):
        assert_loss(update, 0.5 * sleep_by_hand(model, *fantasies, levels))
        assert touches(update.loss, model.classifier)
        assert touches(update.loss, model.posterior.label)
        assert not touches(update.loss, model.likelihood)


def reweighted_by_hand(model, x, label, samples):
    """z* of K candidates given a label (B,), what it teaches, and the bound on log q(z*|x, l)."""
    path = model.posterior(x, label).draw((samples,)).path
    chosen = choose(log_weight(model, x, path, label).detach())
    z = torch.stack([path[0][k, n] for n, k in enumerate(chosen)]).detach()
    return z, -model.likelihood(z).log_prob(x) - model.prior.log_prob(z, label)


@pytest.mark.usefixtures("float64")
@posteriors
@pytest.mark.parametrize("label_rate", [1.0, 0.3, 0.0])
def test_reweighted_wake_sleep_with_labels_is_its_definition(name, label_rate):
    """A label by q^(1 − rate) share^rate of one draw each, then z* of six draws given it."""
    model, batch = make_model(name), make_batch()
    (update,) = losses(ReweightedWakeSleep(samples=6, sleep_weight=0.3, label_rate=label_rate), model, batch)
    dream_x, dream_z, dream_label = model.fantasise(7)
    share = torch.stack(each_label(model, batch.x, 1))[:, 0].detach().softmax(0)
    log_q = log_label(model, batch.x).T
    target = log_q.detach().exp() ** (1 - label_rate) * share**label_rate
    target = target / target.sum(0)
    label = choose(target.log())
    z, unlabelled = reweighted_by_hand(model, batch.x, label, 6)
    wake = -model.posterior(batch.x, label).log_bound(z[None])[0]
    sleep = -model.posterior(dream_x, dream_label).log_bound(dream_z)
    unlabelled = unlabelled + wake - (target * log_q).sum(0)
    sleep = sleep - log_label(model, dream_x).gather(1, dream_label[:, None])[:, 0]
    x, label = batch.labelled.x, batch.labelled.label
    z, labelled = reweighted_by_hand(model, x, label, 6)
    labelled = labelled - model.posterior(x, label).log_bound(z[None])[0]
    by_hand = unlabelled + 0.3 * sleep + labelled + (WEIGHT + 1) * classification(model, batch.labelled)
    assert_loss(update, by_hand)
    assert [term for term in update.terms if "sleep" in term] == ["sleep"], "fantasies once"


@pytest.mark.usefixtures("float64")
def test_the_priors_draws_are_shared_out_among_the_labels():
    model, batch = make_model("gaussian"), make_batch()
    draws = PriorDraws.of(model, batch.x, 3 * 20_000 - 1)
    assert draws.label.bincount().tolist() == [20_000] * 3
    joint, label = draws.log_joint(), batch.labelled.label
    torch.testing.assert_close(joint.logsumexp(0), draws.log_weight().logsumexp(0))
    torch.testing.assert_close(draws.log_weight(label).logsumexp(0), joint.gather(0, label[None])[0])
    broad = torch.stack([model.prior.sample((20_000,), torch.full((20_000,), label)) for label in range(3)])
    by_hand = [model.likelihood.pairwise_log_prob(batch.x, z).logsumexp(1) - math.log(60_000) for z in broad]
    torch.testing.assert_close(joint, torch.stack(by_hand), atol=0.03, rtol=0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("label_rate", [1.0, 0.3])
def test_labels_are_weighed_by_the_priors_draws_too(label_rate):
    model, batch = make_model("gaussian"), make_batch()
    objective = ReweightedWakeSleep(samples=2, label_rate=label_rate, prior_samples=6)
    view = model.view(batch.x)
    draws = PriorDraws.of(model, batch.x, 6)
    torch.manual_seed(3)
    found = objective._weigh_labels(model, batch.x, view, draws)
    torch.manual_seed(3)
    own = torch.stack(each_label(model, batch.x, 1))[:, 0].detach().exp()
    share = (own + draws.log_joint().exp()) / (own + draws.log_joint().exp()).sum(0)
    target = log_label(model, batch.x).T.detach().exp() ** (1 - label_rate) * share**label_rate
    torch.testing.assert_close(found, (target / target.sum(0)).log())


@pytest.mark.usefixtures("float64")
def test_a_small_label_rate_takes_that_much_of_the_bounds_gradient():
    """ELBO: exactly, with the bound itself unchanged. Learning the damped target: to first order."""
    model, batch = make_model("gaussian"), make_batch()
    shares = torch.stack(each_label(model, batch.x, 1))[:, 0].detach()

    def gradient(loss):
        return torch.autograd.grad(loss.mean(), model.classifier.weight, retain_graph=True)[0]

    torch.manual_seed(5)
    whole = ELBO().loss(model, batch.x)[0]
    torch.manual_seed(5)
    damped_loss = ELBO(label_rate=0.01).loss(model, batch.x)[0]
    torch.testing.assert_close(damped_loss, whole)
    torch.testing.assert_close(gradient(damped_loss), 0.01 * gradient(whole))
    view = model.view(batch.x)
    bound = -view.average(shares - view.log_label)
    target = damped(view, shares, 1e-6).exp()
    torch.testing.assert_close(gradient(cross_entropy(view, target)) / 1e-6, gradient(bound), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("float64")
def test_without_a_label_the_classifier_agrees_with_itself_where_it_would_change_most():
    """Of two classes and a linear encoder the direction is known: along the difference of their logits' weights."""
    model, batch = make_model("gaussian"), make_batch()
    model.posterior.encoder = nn.Sequential(nn.Linear(5, 6))
    with torch.no_grad():  # the third label is impossible
        model.classifier.weight[2], model.classifier.bias[2] = 0, -1e4
    weight = model.classifier.weight @ model.posterior.encoder[0].weight
    along = nn.functional.normalize(weight[0] - weight[1], dim=0)
    objective = SemiSupervised(ELBO(2), WEIGHT, agreement_weight=3.0, agreement_radius=0.7)
    torch.manual_seed(3)
    (update,) = objective.updates(model, batch)
    before = log_label(model, batch.x)
    either = torch.stack([log_label(model, batch.x + sign * 0.7 * along) for sign in (-1, 1)])
    by_hand = -(before.exp().detach() * either).sum(-1)
    # Up to the third order of the probe's length both signs are as good, and either may be found.
    found = update.terms["agreement"]
    assert torch.minimum((found - by_hand[0]).abs(), (found - by_hand[1]).abs()).max() < 1e-5
    torch.manual_seed(3)
    bounds = elbo_by_hand(model, batch, 2, 1.0)
    assert_loss(update, bounds + 3.0 * found)


@pytest.mark.usefixtures("float64")
def test_without_a_label_the_classifier_is_sure_of_each_and_even_over_all():
    model, batch = make_model("gaussian"), make_batch()
    objective = SemiSupervised(ELBO(2), WEIGHT, information_weight=3.0)
    torch.manual_seed(3)
    (update,) = objective.updates(model, batch)
    label = log_label(model, batch.x).exp()
    entropy, average = -(label * label.log()).sum(-1).mean(), label.mean(0)
    by_hand = entropy + 4 * (average * (len(average) * average).log()).sum()
    torch.testing.assert_close(update.terms["information"].mean(), by_hand)
    torch.manual_seed(3)
    bounds = elbo_by_hand(model, batch, 2, 1.0)
    parameters = list(model.classifier.parameters())
    losses = (update.loss.mean(), bounds.mean() + 3.0 * by_hand)
    found, expected = (torch.autograd.grad(loss, parameters) for loss in losses)
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("float64")
def test_the_direction_of_the_disturbance_is_that_of_the_cross_entropy():
    before, logits = torch.randn(20, 5).log_softmax(1), torch.randn(20, 5, requires_grad=True)
    after = logits.log_softmax(1)
    found = torch.autograd.grad(_steepness(before, after).sum(), logits, retain_graph=True)[0]
    exact = torch.autograd.grad(-(before.exp() * after).sum(), logits)[0]
    torch.testing.assert_close(_unit(found), _unit(exact))


def test_the_direction_is_found_where_the_classifier_is_as_good_as_certain():
    logits = torch.tensor([[0.0, -200.0, -203.0]])
    moved = (logits + torch.tensor([[0.0, 0.1, -0.1]])).requires_grad_()
    (found,) = torch.autograd.grad(_steepness(logits.log_softmax(1), moved.log_softmax(1)).sum(), moved)
    other = math.exp(-3) * math.expm1(-0.1) / math.expm1(0.1)
    torch.testing.assert_close(found, torch.tensor([[-1 - other, 1.0, other]]))
    assert not torch.autograd.grad(_steepness(moved.detach(), moved).sum(), moved)[0].any(), "nothing has changed"


def test_however_sure_the_classifier_is_the_disturbance_has_its_length():
    gradient = torch.tensor([3.0, -4.0]) * torch.tensor([[1e30], [1.0], [1e-30], [0.0]])
    expected = torch.tensor([0.6, -0.8]) * torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    torch.testing.assert_close(_unit(gradient), expected)


@pytest.mark.usefixtures("float64")
def test_an_adversarial_encoder_learns_labels_too():
    """Its q(l|x) is p(l) p(z|l) / Σ_k p(k) p(z|k) at the encoded z, in the update of the encoder."""
    posterior, judge = ImplicitPosterior(nn.Linear(5, 6), 2), nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))
    likelihood = BernoulliLikelihood(nn.Linear(2, 5), torch.Size([5]))
    model = LatentVariableModel(make_prior("gaussian_mixture", 2, 3), likelihood, posterior, discriminator=judge)
    batch = make_batch()
    torch.manual_seed(3)
    plain = list(Adversarial(weight=3.0).updates(model, batch))
    torch.manual_seed(3)
    both = list(SemiSupervised(Adversarial(weight=3.0), WEIGHT).updates(model, batch))
    torch.testing.assert_close(both[0].loss, plain[0].loss)
    z = posterior(batch.labelled.x).draw().z
    log_part = model.prior.log_prob(z[:, None], torch.arange(3)).log_softmax(-1)
    own = -log_part.gather(1, batch.labelled.label[:, None])[:, 0]
    assert_loss(both[1], plain[1].loss + WEIGHT * own)


@pytest.mark.usefixtures("float64")
def test_at_a_temperature_labels_learn_as_a_power_of_themselves():
    model, batch = make_model("gaussian"), make_batch()
    objective = SemiSupervised(ELBO(2), WEIGHT, information_weight=3.0, temperature=5.0)
    (update,) = objective.updates(model, batch)
    flat = log_label(model, batch.x).exp() ** 0.2
    flat = flat / flat.sum(1, keepdim=True)
    average = flat.mean(0)
    by_hand = -(flat * flat.log()).sum(1).mean() + 4 * (average * (3 * average).log()).sum()
    torch.testing.assert_close(update.terms["information"].mean(), by_hand)
    torch.testing.assert_close(update.terms["labelled_classification"], classification(model, batch.labelled))


@pytest.mark.usefixtures("float64")
def test_warm_up_with_labels_is_the_bound_of_the_simpler_chain():
    model, batch = make_model("diffusion"), make_batch()
    wake, sleep = losses(WarmUp(kl_weight=0.5), model, batch)
    log_q, posterior = log_label(model, batch.x), model.posterior
    draw = posterior.without_context(posterior.encoder(batch.x) + posterior.label.weight[:, None]).draw((1,))

    def bound(x, z, log_ratio, label):
        prior = model.prior.log_prob(z, label) - math.log(3)
        return model.likelihood(z).log_prob(x) + 0.5 * (prior - log_ratio)

    unlabelled = 0.0
    for i in range(3):
        of_label = bound(batch.x, draw.z[0, i], draw.log_ratio[0, i], torch.full((7,), i))
        unlabelled = unlabelled + log_q[:, i].exp() * (of_label - 0.5 * log_q[:, i])
    x, label = batch.labelled.x, batch.labelled.label
    draw = posterior.without_context(posterior.encode(x, label)).draw((1,))
    labelled = bound(x, draw.z[0], draw.log_ratio[0], label)
    assert_loss(wake, -unlabelled - labelled + WEIGHT * classification(model, batch.labelled))
    assert "classifier" in wake.children
    assert sleep.children == ("posterior",)


def test_batches_of_the_papers_preset_fit_few_examples():
    """Its semi-supervised default of 1,024 is a default too: it gives way to the data, a user's own doesn't."""
    given = {"preset": "paper"}
    settings = resolve("mnist_semi", "ddvi_semi", "pinwheel", given)
    assert runs.fit_to_size(settings, 500).batch_size == 450
    settings = resolve("mnist_semi", "ddvi_semi", "pinwheel", given | {"batch_size": "600"})
    assert runs.fit_to_size(settings, 500).batch_size == 600


def test_every_phase_learns_from_labels():
    settings = resolve("mnist_semi", "diff_vae_warmup_semi", "pinwheel", {"preset": "paper"})
    phases = make_phases(settings)
    assert [phase.epochs for phase in phases] == [50, 50]
    assert all(isinstance(phase.objective, SemiSupervised) for phase in phases)


@pytest.mark.usefixtures("float64")
def test_without_labels_or_a_classifier_training_is_refused():
    model, batch = make_model("gaussian"), make_batch()
    with pytest.raises(InputError, match="needs labelled examples"):
        losses(ELBO(), model, dataclasses.replace(batch, labelled=None))
    model.classifier = None
    with pytest.raises(InputError, match="a model with a classifier"):
        losses(ELBO(), model, batch)


@pytest.mark.usefixtures("float64")
def test_adversarial_training_shows_labels_where_it_has_them():
    """Draws of the prior show theirs half of the time, labelled data always, other data never."""
    shown = []

    class Judge(nn.Module):
        def forward(self, seen):
            shown.append(seen)
            return seen.sum(-1)

    encoder = nn.Linear(5, 6)
    likelihood = BernoulliLikelihood(nn.Linear(2, 5), torch.Size([5]))
    prior, posterior = make_prior("gaussian_mixture", 2, 3), ImplicitPosterior(encoder, 2)
    model = LatentVariableModel(prior, likelihood, posterior, discriminator=Judge())
    label = torch.arange(600) % 3
    batch = Batch(torch.rand(600, 5).round(), 1.0, Labelled(torch.rand(600, 5).round(), label))
    discrimination, generation = list(Adversarial(weight=3.0).updates(model, batch))
    drawn, encoded, again = shown
    z = posterior(torch.cat([batch.x, batch.labelled.x])).draw().z
    indicator = nn.functional.one_hot(torch.cat([torch.full((600,), 3), label]), 4).double()
    torch.testing.assert_close(encoded, torch.cat([z, indicator], 1))
    torch.testing.assert_close(again, encoded)
    hidden = drawn[:, -1] == 1
    assert 240 < int(hidden.sum()) < 360
    assert (drawn[:, 2:].sum(1) == 1).all()
    of_label = model.prior.log_prob(drawn[:, None, :2], torch.arange(3))
    assert (of_label.argmax(1) == drawn[:, 2:5].argmax(1))[~hidden].double().mean() > 0.95
    real = nn.functional.softplus(-drawn.sum(1))
    false = nn.functional.softplus(encoded.sum(1)).view(2, 600).mean(0)
    torch.testing.assert_close(discrimination.loss, real + false)
    fooling = nn.functional.softplus(-encoded.sum(1)).view(2, 600).mean(0)
    both = torch.cat([batch.x, batch.labelled.x])
    reconstruction = -likelihood(z).log_prob(both).view(2, 600).mean(0)
    torch.testing.assert_close(generation.loss, reconstruction + 3 * fooling)


# Which labels are seen


def test_the_choice_of_labels_is_stratified_and_drawn_by_the_seed():
    given = torch.arange(200) % 4
    given[torch.arange(0, 200, 7)] = -1
    chosen = choose_labelled(given, 42, 4, seed=0)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    counts = given[chosen].bincount(minlength=4)
    assert counts.tolist() == [11, 11, 10, 10]
    assert torch.equal(chosen, choose_labelled(given, 42, 4, seed=0))
    assert not torch.equal(chosen, choose_labelled(given, 42, 4, seed=1))


def test_a_rare_class_gives_what_it_has():
    given = torch.cat([torch.zeros(50, dtype=torch.long), torch.ones(3, dtype=torch.long)])
    assert given[choose_labelled(given, 20, 2, seed=0)].bincount().tolist() == [17, 3]


def test_zero_takes_every_known_label():
    given = torch.tensor([0, -1, 1, 1, -1, 2])
    assert choose_labelled(given, 0, 3, seed=0).tolist() == [0, 2, 3, 5]
    assert choose_labelled(given, 4, 3, seed=0).tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize(
    ("given", "count", "message"),
    [
        (torch.full((9,), -1), 5, "the training data has none; leave out '_semi'"),
        (torch.arange(9) % 3, 10, "use at most 9"),
        (torch.arange(9) % 3, 2, "use at least 3"),
    ],
)
def test_impossible_counts_of_labels_are_refused(given, count, message):
    with pytest.raises(InputError, match=re.escape(message)):
        choose_labelled(given, count, 3, seed=0)


TINY = {
    "hidden_size": 8, "denoiser_size": 8, "denoiser_layers": 2, "steps": 2, "prior_denoiser": "false", "samples": 4,
    "sleep_steps": 1, "flow_layers": 2, "context_size": 6, "threads": 1, "evaluation": "quick",
}  # fmt: skip


def small(out, method="ddvi", **overrides):
    """A run of a few seconds, of 300 digits."""
    values = TINY | {"epochs": 2, "limit": 300, "n_labels": 30, "batch_size": 50, "report": False, "out": out}
    return resolve("digits_semi", f"{method}_semi", "pinwheel", values | overrides)


@pytest.fixture
def no_measures(monkeypatch):
    """Leave out what follows training."""
    monkeypatch.setattr(runs, "_evaluate", lambda *_: {})


def weights(folder):
    return checkpoint.load(folder / "model.safetensors")[0]


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.usefixtures("no_measures")
@pytest.mark.parametrize("method", ["ddvi", "vae", "aae"])
@pytest.mark.parametrize("others", ["wrong", "unknown"])
def test_no_other_label_can_reach_the_training(method, others, tmp_path, monkeypatch):
    settings = small(tmp_path / "first", method)
    runs.train(settings)
    whole = data.load("digits", None, settings.seed, settings.limit)
    rows, _ = data.split_validation(whole, runs.fit_to_size(settings, len(whole.train_x)).validation, settings.seed)
    chosen = choose_labelled(whole.train_y[rows], settings.n_labels, 10, settings.seed)
    seen = rows[chosen]
    changed = (whole.train_y + 1 + torch.arange(len(whole.train_y)) % 9) % 10
    changed = changed if others == "wrong" else torch.full_like(changed, -1)
    changed[seen] = whole.train_y[seen]
    assert int((changed != whole.train_y).sum()) == len(changed) - 30
    monkeypatch.setattr(data, "load", lambda *_: dataclasses.replace(whole, train_y=changed))
    if others == "wrong":  # which rows are shown depends on the classes, so that choice is kept
        monkeypatch.setattr(labels, "choose_labelled", lambda *_: chosen)
    runs.train(small(tmp_path / "second", method))
    assert_same(weights(tmp_path / "first"), weights(tmp_path / "second"))
    # The labels that are shown do reach it: the test can tell.
    changed[seen] = (changed[seen] + 1) % 10
    monkeypatch.setattr(labels, "choose_labelled", lambda *_: chosen)
    runs.train(small(tmp_path / "third", method))
    first, third = weights(tmp_path / "first"), weights(tmp_path / "third")
    assert any(not torch.equal(first[name], third[name]) for name in first)


# Training


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_is_trained(method):
    observations = Observations((6,), "bernoulli", "as_is", parts=3)
    settings = resolve("digits_semi", f"{method}_semi", "pinwheel", TINY)
    with seeded(0, method):
        model = build_model(settings, observations)
        x, label = torch.randint(0, 2, (60, 6)), torch.arange(20) % 3
        (phase,) = make_phases(dataclasses.replace(settings, epochs=2))
        trainer = Trainer(model, Schedule((phase,), 30), x, labelled=Labelled(x[:20], label))
        trainer.fit()
        total = {}
        x = x.to(torch.get_default_dtype())
        for update in phase.objective.updates(model, Batch(x, 1.0, Labelled(x[:20].repeat(3, 1), label.repeat(3)))):
            groups = {child: list(getattr(model, child).named_parameters()) for child in update.children
                      if getattr(model, child, None) is not None}  # fmt: skip
            named = {f"{child}.{name}": value for child, pairs in groups.items() for name, value in pairs}
            found = torch.autograd.grad(update.loss.mean(), list(named.values()), allow_unused=True)
            for name, gradient in zip(named, found, strict=True):
                if gradient is not None:
                    assert gradient.isfinite().all(), name
                    total[name] = total.get(name, 0.0) + float(gradient.abs().sum())
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, value in total.items() if value > 0} == names
    if METHODS[method].posterior_class().has_density:
        assert {"classifier.weight", "posterior.label.weight"} <= names


def test_each_step_draws_as_many_labelled_examples_afresh():
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Watches(Objective):
        def updates(self, model, batch):
            seen.append((len(batch.x), batch.labelled.x.flatten().tolist(), batch.labelled.label.tolist()))
            return iter(())

    with seeded(0):
        model = make_model("gaussian")
    labelled = Labelled(torch.arange(6.0)[:, None], torch.arange(6) % 3)
    for seed in (0, 0, 1):
        Trainer(model, Schedule((Phase(2, Watches()),), 30, seed=seed), torch.zeros(50, 1), labelled=labelled).fit()
    first, again, other = seen[:4], seen[4:8], seen[8:]
    assert first == again
    assert len({tuple(x) for _, x, _ in first + other}) == 8, "another batch each step, epoch and seed"
    for count, x, label in seen:
        assert len(x) == len(label) == count
        assert label == [value % 3 for value in x]


class Stops:
    """A listener that presses Ctrl-C in the middle of the second epoch."""

    def step(self, epoch, step, steps):
        if (epoch, step) == (1, 2):
            signal.raise_signal(signal.SIGINT)

    def epoch(self, row): ...

    def message(self, text): ...


@pytest.mark.usefixtures("no_measures")
@pytest.mark.parametrize("method", ["ddvi", "vae", "aae"])
def test_a_resumed_run_ends_the_same(method, tmp_path):
    runs.train(small(tmp_path / "whole", method))
    with pytest.raises(Interrupted):
        runs.train(small(tmp_path / "parts", method), Stops())
    runs.train(small(tmp_path / "parts", method, resume="true"))
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


# Names


@pytest.mark.parametrize("alias", ["ddvi_semi", "diff_vae_warmup_semi"])
@pytest.mark.parametrize(("dataset", "name", "count"), [("mnist", "mnist", 1000), ("cifar10", "cifar", 10_000)])
def test_names_with_semi_are_accepted(alias, dataset, name, count):
    settings = resolve(f"{dataset}_semi", alias, "swiss_roll")
    assert (settings.dataset, settings.method, settings.semi_supervised) == (name, "ddvi", True)
    assert settings.n_labels == count
    assert str(settings.folder) == f"runs/{name}_semi/ddvi_semi/swiss_roll/seed0"


def test_what_was_searched_under_a_prior_holds_there_alone():
    roll, other, paper = (
        resolve("mnist_semi", "aae_semi", prior, {"preset": preset})
        for prior, preset in [("swiss_roll", "default"), ("pinwheel", "default"), ("swiss_roll", "paper")]
    )
    assert roll.label_temperature > other.label_temperature > paper.label_temperature == 1
    assert roll.lr == other.lr
    assert not deviations(roll)
    assert resolve("mnist_semi", "aae_semi", "swiss_roll", {"label_temperature": "3"}).label_temperature == 3


def test_the_folder_says_semi():
    settings = resolve("mnist_semi", "vae_semi", "pinwheel", {"seed": "3", "n_labels": "50"})
    assert str(settings.folder) == "runs/mnist_semi/vae_semi/pinwheel/seed3"
    assert settings.n_labels == 50
    assert not resolve("mnist", "vae", "pinwheel").semi_supervised


@pytest.mark.parametrize(
    ("dataset", "method", "overrides", "message"),
    [
        ("mnist_semi", "vae", {}, "write 'mnist vae' or 'mnist_semi vae_semi'"),
        ("mnist", "vae_semi", {}, "write 'mnist vae' or 'mnist_semi vae_semi'"),
        ("mnist_semi", "vea_semi", {}, "'vae_semi'"),
        ("mnist_semi", "diff_vae_warm_semi", {}, "'diff_vae_warmup_semi'"),
        ("minst_semi", "vae_semi", {}, "'mnist_semi'"),
        ("mnist_smei", "vae_semi", {}, "'mnist_semi'"),
        ("mnist_semi", "vae_smei", {}, "'vae_semi'"),
        ("mnist_semi", "vae_semi", {"n_label": "5"}, "'n_labels'"),
        ("mnist_semi", "vae_semi", {"n_labels": "-5"}, "at least 0"),
        ("mnist_semi", "vae_semi", {"semi_supervised": "true"}, "by its place"),
    ],
)
def test_wrong_names_are_refused_in_one_sentence(dataset, method, overrides, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        resolve(dataset, method, "pinwheel", overrides)
    assert "\n" not in str(caught.value)


def own_file(path, y):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(len(y), 4)) + 3 * (np.arange(len(y)) % 3)[:, None]
    np.savez(path, x=x, **({} if (y < -1).any() else {"y": y}))
    return str(path)


@pytest.mark.usefixtures("no_measures")
def test_an_own_file_with_unknown_labels_is_learnt_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    y = np.arange(120) % 3
    y[np.arange(120) % 4 > 0] = -1
    file = own_file(tmp_path / "cells.npz", y)
    settings = resolve(file, "ddvi_semi", "pinwheel", TINY | {"epochs": 1, "batch_size": 20})
    runs.train(settings)
    assert str(settings.folder) == "runs/cells_semi/ddvi_semi/pinwheel/seed0"
    assert weights(settings.folder)["classifier.weight"].shape[0] == 3


@pytest.mark.usefixtures("no_measures")
def test_an_own_file_without_labels_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = own_file(tmp_path / "cells.npz", np.full(60, -2))
    with pytest.raises(InputError, match="needs labels, and the training data has none; leave out '_semi'"):
        runs.train(resolve(file, "vae_semi", "pinwheel", TINY | {"epochs": 1, "batch_size": 20}))


# Measures


def test_calibration_error_is_the_sum_over_bins():
    with seeded(0):
        confidence, right = torch.rand(500), torch.rand(500) < 0.6
    confidence[:2] = torch.tensor([0.0, 1.0])
    expected = 0.0
    for low in range(15):
        inside = [
            i for i, c in enumerate(confidence.tolist()) if low / 15 <= c < (low + 1) / 15 or (c == 1 and low == 14)
        ]
        if inside:
            accuracy = sum(right[i].item() for i in inside) / len(inside)
            expected += len(inside) / 500 * abs(accuracy - confidence[inside].mean().item())
    assert measures.calibration_error(confidence, right) == pytest.approx(expected, abs=1e-6)
    assert measures.calibration_error(torch.ones(8), torch.ones(8, dtype=torch.bool)) == 0
    assert measures.calibration_error(torch.ones(8), torch.zeros(8, dtype=torch.bool)) == 1


def test_classification_measures_are_those_of_the_known_model(known):
    model, (x, label) = known.model("gaussian"), known.simulate(40)
    given = label.clone()
    given[::5] = -1
    dataset = Dataset("known", x, x, given, given, ("a", "b", "c"), None, {})
    with torch.no_grad():
        found = evaluation.classification(model, dataset, x, evaluation.QUICK)
    kept = given >= 0
    joint, truth = known.joint(x)[:, kept], label[kept]
    guess = joint.argmax(0)
    assert found["accuracy"] == pytest.approx(float((guess == truth).double().mean()))
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (truth.numpy(), guess.numpy()), 1)
    assert found["confusion_matrix"] == confusion.tolist(), "a row for each true label"
    confidence = joint.softmax(0).max(0).values
    assert found["calibration_error"] == pytest.approx(measures.calibration_error(confidence, guess == truth))
    exact = joint.gather(0, truth[None])[0].mean()
    assert found["joint_log_likelihood"] == pytest.approx(float(exact), abs=1e-3)


@pytest.mark.parametrize("method", ["ddvi", "aae"])
def test_a_run_is_judged_as_a_classifier_too(method, tmp_path, brief):
    metrics = runs.train(small(tmp_path / "run", method, limit=100, batch_size=30))
    assert 0 <= metrics["accuracy"] <= 1
    assert 0 <= metrics["calibration_error"] <= 1
    confusion = np.array(metrics["confusion_matrix"])
    assert confusion.sum() == metrics["test_examples"]
    assert confusion.trace() / confusion.sum() == pytest.approx(metrics["accuracy"])
    assert metrics["joint_log_likelihood"] <= metrics["log_likelihood"]
    if method == "ddvi":
        assert metrics["elbo"] < metrics["log_likelihood"]
        assert metrics["iw_bound"] > metrics["elbo"]


def test_without_labels_to_be_judged_by_there_is_no_judgement(tmp_path, monkeypatch, brief):
    load = data.load

    def unknown(*given):
        whole = load(*given)
        return dataclasses.replace(whole, test_y=torch.full_like(whole.test_y, -1))

    monkeypatch.setattr(data, "load", unknown)
    metrics = runs.train(small(tmp_path / "run", "vae", limit=100, batch_size=30, epochs=1))
    assert "log_likelihood" in metrics
    assert not {"accuracy", "confusion_matrix", "joint_log_likelihood", "knn_accuracy"} & metrics.keys()


# Pictures


def colours(axes):
    return {tuple(colour) for colour in axes.collections[0].get_facecolors()}


def test_latents_are_shown_by_true_and_by_predicted_label():
    with seeded(0):
        z = torch.randn(60, 2)
    label = torch.arange(60) % 3
    figure = figures.latent_space(z, label, z, ("cat", "dog", "fox"), "title", torch.zeros_like(label), label)
    true, predicted, prior = figure.axes
    assert (len(colours(true)), len(colours(predicted)), len(colours(prior))) == (3, 1, 3)
    assert "predicted" in predicted.get_title()
    assert true.get_xlim() == predicted.get_xlim() == prior.get_xlim()


def test_samples_have_a_row_for_each_label():
    images = (torch.arange(3).repeat_interleave(10) / 2)[:, None, None, None].expand(30, 1, 4, 4)
    figure = figures.sample_grid(images, images, "title", ("cat", "dog", "fox"))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["cat", "dog", "fox"]
    shown = np.asarray(axes.images[0].get_array())
    assert shown.shape == (14, 49), "three rows of ten, a white pixel between"
    for i, text in enumerate(axes.texts):
        row = shown[round(text.get_position()[1]), ::5]
        assert (row == i / 2).all(), "a name stands at its row"


@pytest.mark.parametrize("kind", ["images", "table"])
def test_the_pictures_of_a_run_with_labels(kind, tmp_path):
    with seeded(0):
        x = torch.randint(0, 256, (30, 1, 6, 6), dtype=torch.uint8) if kind == "images" else torch.randn(30, 5)
    label = torch.arange(30) % 3
    dataset = Dataset(kind, x, x, label, label, ("a", "b", "c"), 255.0 if kind == "images" else None, {})
    settings = resolve("digits_semi", "vae_semi", "pinwheel", TINY)
    with seeded(0):
        model = build_model(settings, observe(dataset, settings), x).eval()
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([-99.0, 99.0, -99.0]))
    given = []
    draw = model.posterior.with_label
    model.posterior.with_label = lambda features, label: given.append(label) or draw(features, label)
    figures.draw_all(tmp_path, model, dataset, [], settings)
    assert all((drawn == 1).all() for drawn in given), "latents and reconstructions are of the label's posterior"
    assert sorted({len(drawn) for drawn in given}) == [16, 30]
    names = {"latents.png", "samples.png", "reconstructions.png", "curves.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
