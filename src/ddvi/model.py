"""The latent-variable model: everything with parameters, as named children, and the one bound of the whole family.

    p_θ(x, z) = p(z) p_θ(x | z),    q_φ(z, a | x),    r(a | z)

    log w = log p_θ(x | z) + log p(z) + log r(a | z) − log q_φ(z, a | x),    (z, a) ~ q

Its mean is the evidence lower bound; log-mean-exp over K draws is the importance-weighted bound (Burda et al. 2016).

With labels l, of which only some are known, p_θ(x, z, l) = p(l) p(z | l) p_θ(x | z), p(l) uniform, and
q_φ(z, a, l | x) = q_φ(l | x) q_φ(z, a | x, l): log w gains log p(l), and where l isn't known the sum over labels is
taken exactly, in one batched pass (Kingma et al. 2014).
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddvi.likelihoods import Likelihood
from ddvi.posteriors.base import Conditional, Draw, Posterior
from ddvi.preprocessing import AsIs, Preprocessing
from ddvi.priors import Prior
from ddvi.randomness import choose, draw, draw_whole, part, sample


class View(NamedTuple):
    """What the posterior makes of a batch of B observations, before it draws."""

    features: Tensor
    """(*labels, B, features); `labels` is () or, where the sum over labels is to be taken, (C,)."""
    label: Tensor | None
    """Labels that broadcast to (*labels, B), or None in a model without any."""
    log_label: Tensor | None
    """log q(l | x) of these labels, (*labels, B), or None in a model without any."""

    @property
    def summed(self) -> bool:
        """Whether the sum over labels is to be taken."""
        return self.features.dim() == 3

    def average(self, value: Tensor) -> Tensor:
        """Σ_l q(l|x) value_l of (*, C, B) where the sum is to be taken; else the value itself."""
        return value if self.log_label is None or not self.summed else (self.log_label.exp() * value).sum(-2)


class Fantasies(NamedTuple):
    """Draws of the model itself."""

    x: Tensor
    """(N, *event)."""
    z: Tensor
    """(N, D)."""
    label: Tensor | None
    """(N,), or None in a model without labels."""

    def split(self, size: int) -> list[Fantasies]:
        """Portions of so many."""
        portions = [slice(start, start + size) for start in range(0, len(self.x), size)]
        return [Fantasies(self.x[p], self.z[p], None if self.label is None else self.label[p]) for p in portions]


class Weights(NamedTuple):
    """The parts of log w, each (*sample_shape, *batch_shape), in nats.

    Example:
        >>> weights = model.weigh(x, model.posterior(x).draw((10,)))
        >>> weights.log_weight().shape
        torch.Size([10, 3])
    """

    log_likelihood: Tensor
    """log p_θ(x | z)."""
    log_prior: Tensor
    """log p(z), with labels log p(l) + log p(z | l)."""
    log_ratio: Tensor
    """log q_φ(z, a | x) − log r(a | z)."""

    def log_weight(self, kl_weight: float | Tensor = 1.0, prior_weight: float = 1.0) -> Tensor:
        """log p_θ(x | z) + kl_weight · (prior_weight · log p(z) − log_ratio); a bound's bracket at weights 1."""
        return self.log_likelihood + kl_weight * (prior_weight * self.log_prior - self.log_ratio)


class LatentVariableModel(nn.Module):
    """A prior, a likelihood and an approximate posterior.

        p_θ(x, z) = p(z) p_θ(x | z),    log w = log p_θ(x | z) + log p(z) + log r(a | z) − log q_φ(z, a | x)

    Args:
        prior: p(z).
        likelihood: p_θ(x | z).
        posterior: q_φ(z, a | x).
        preprocessing: from data as stored to x; by default x is the data.
        discriminator: from what `Adversarial` shows it to one logit, for adversarial training.
        classifier: from the posterior's features (B, features) to logits (B, C) of q(l | x), for labels.

    Sources: Kingma and Welling, 2014; Burda et al., 2016, for the bounds; Kingma et al., 2014, for labels.

    Example:
        >>> likelihood = ddvi.BernoulliLikelihood(nn.Linear(2, 6), torch.Size([6]))
        >>> posterior = ddvi.DiffusionPosterior(nn.Linear(6, 8), latent_size=2, steps=4)
        >>> model = LatentVariableModel(ddvi.Pinwheel(), likelihood, posterior)
        >>> x = torch.ones(3, 6)
        >>> model.log_weights(x, samples=10).shape, model.fantasise(5).x.shape
        (torch.Size([10, 3]), torch.Size([5, 6]))
    """

    def __init__(
        self,
        prior: Prior,
        likelihood: Likelihood,
        posterior: Posterior,
        preprocessing: Preprocessing | None = None,
        discriminator: nn.Module | None = None,
        classifier: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood
        self.posterior = posterior
        self.preprocessing: Preprocessing = preprocessing or AsIs()
        self.discriminator = discriminator
        self.classifier = classifier

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by the name of the child that holds them; children without any are left out."""
        groups = {name: [p for p in child.parameters() if p.requires_grad] for name, child in self.named_children()}
        return {name: parameters for name, parameters in groups.items() if parameters}

    def view(self, x: Tensor, label: Tensor | None = None) -> View:
        """Run the encoder once on x (B, *event), with known labels (B,) or, in a model with labels, for all of them."""
        return self.view_of(self.posterior.encode(x), label)

    def view_of(self, features: Tensor, label: Tensor | None = None) -> View:
        """The same from features (B, features) that the encoder has given already."""
        if self.classifier is None:
            return View(features, None, None)
        log_label = self._log_label(features).T
        if label is None:
            label = torch.arange(len(log_label), device=features.device)[:, None]
        else:
            log_label = log_label.gather(0, label[None])[0]
        return View(self.posterior.with_label(features, label), label, log_label)

    @property
    def summed(self) -> int:
        """How many labels bounds sum over; 1 without a classifier."""
        return self.prior.parts or 1 if self.classifier is not None else 1

    def classify(self, x: Tensor) -> Tensor:
        """log q(l | x) of x (B, *event): (B, C); without a classifier log p(l | z) at the encoded z."""
        if self.classifier is not None:
            return self._log_label(self.posterior.encode(x))
        z = self.posterior(x).sample()
        every = torch.arange(self.prior.parts or 1, device=x.device)[:, None]
        return self.prior.log_prob(z[None], every).log_softmax(0).T

    def weigh(self, x: Tensor, draw: Draw, label: Tensor | None = None) -> Weights:
        """The parts of log w for draws of the posterior given x (B, *event)."""
        log_prior = self.prior.log_prob(draw.z, label)
        if label is not None:
            log_prior = log_prior - math.log(self.prior.parts or 1)
        return Weights(self.likelihood.log_prob(x, draw.z), log_prior, draw.log_ratio)

    def log_weights(self, x: Tensor, samples: int) -> Tensor:
        """The single-sample bounds of `samples` draws for each of x (B, *event): (samples, B). Their mean is the ELBO.

        Where labels are summed over: Σ_l q(l|x) ( log w_l − log q(l|x) ).
        """
        view, log_weight = self._candidates(x, samples)
        return view.average(log_weight if view.log_label is None else log_weight - view.log_label)

    def importance_weighted_bound(self, x: Tensor, samples: int) -> Tensor:
        """log Σ_l 1/K Σ_k w_{l,k} ≤ log p_θ(x) in expectation, (B,), in nats; one term without labels."""
        view, log_weight = self._candidates(x, samples)
        bound = log_weight.logsumexp(0) - math.log(samples)
        return bound.logsumexp(0) if view.summed else bound

    def held_out_bound(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """What training can be judged by on held-out x (B, *event), from one draw: (B,), in nats, to be high.

        The evidence lower bound; log p(x | z) of a posterior without a density; and where the latents z (B, D) that x
        was simulated from are known, the posterior's bound on log q(z | x).
        """
        if z is not None:
            return self.posterior(x).log_bound(z)
        if self.posterior.has_density:
            return self.log_weights(x, 1)[0]
        return self.likelihood.log_prob(x, self.latent(x))

    def conditional(self, x: Tensor) -> Conditional:
        """q(z, a | x) of x (B, *event), with labels q(z, a | x, l) of one drawn from q(l | x)."""
        features = self.posterior.encode(x)
        if self.classifier is not None:
            features = self.posterior.with_label(features, choose(self._log_label(features).T))
        return self.posterior.condition(features)

    def latent(self, x: Tensor) -> Tensor:
        """One draw z ~ q(z | x) of x (B, *event), the label drawn first where there is one: (B, D)."""
        return self.conditional(x).sample()

    def log_posterior(self, x: Tensor, z: Tensor, samples: int) -> Tensor:
        """log q(z | x) of z (S, B, D): (S, B), by `samples` draws of auxiliary variables, see `Conditional.log_prob`.

        With labels, log Σ_l q(l|x) q(z | x, l).
        """
        view = self.view(x)
        conditional = self.posterior.condition(view.features)
        if view.log_label is None:
            return conditional.log_prob(z, samples)[0]
        every = z.unsqueeze(-3).expand(*z.shape[:-2], len(view.features), *z.shape[-2:])
        return (conditional.log_prob(every, samples)[0] + view.log_label).logsumexp(-2)

    @torch.no_grad()
    def fantasise(self, count: int) -> Fantasies:
        """z ~ p(z), x ~ p_θ(x | z) and, in a model with labels, l ~ p(l) first; without gradient."""
        label = None
        if self.classifier is not None and self.prior.parts:
            device = next(self.parameters()).device
            label = draw_whole(partial(torch.randint, self.prior.parts), count, device=device)
        z = draw(partial(self.prior.sample, label=label), (count,), 0)
        label = None if label is None else part(label)
        return Fantasies(sample(self.likelihood(z)).to(z.dtype), z, label)  # categories are drawn as integers

    def _log_label(self, features: Tensor) -> Tensor:
        """log q(l | x) from what the posterior's encoder gives, features first: (B, C)."""
        assert self.classifier is not None
        return self.classifier(features[:, : self.posterior.features]).log_softmax(-1)

    def _candidates(self, x: Tensor, samples: int) -> tuple[View, Tensor]:
        view = self.view(x)
        draw = self.posterior.condition(view.features).draw((samples,))
        return view, self.weigh(x, draw, view.label).log_weight()
