"""Wake-sleep: learning the posterior from fantasies of the model as well as from data.

The sleep term draws z ~ p(z), x ~ p_θ(x|z) and raises log q(z|x), or for posteriors with auxiliary variables the bound
E_r[ log q(z,a|x) − log r(a|z) ] on it, so that q covers all of the posterior where the ELBO settles for a part. In a
model with labels it draws l ~ p(l) first and raises log q(l|x) as well.

Sources: Hinton et al., The Wake-Sleep Algorithm, 1995; Bornschein & Bengio, Reweighted Wake-Sleep, 2015; Le et al.,
Revisiting Reweighted Wake-Sleep, 2019; Piriyakulkij et al., AAAI 2025, for the alternation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from ddvi.model import Fantasies, LatentVariableModel, View
from ddvi.objectives.base import Batch, DataObjective, Objective, Update, data_update
from ddvi.objectives.elbo import ELBO, bound_terms, cross_entropy, damped
from ddvi.randomness import choose


def sleep_loss(model: LatentVariableModel, fantasies: Fantasies, levels: int | None) -> Tensor:
    """−E_r[ log q(z,a|x) − log r(a|z) ] on fantasies (N,); `levels` as in `Conditional.log_bound`.

    In a model with labels, −log q(l|x) more, and z, a given the label.
    """
    view = model.view(fantasies.x, fantasies.label)
    return _with_label(view, -model.posterior.condition(view.features).log_bound(fantasies.z, levels))


@final
@dataclass(frozen=True)
class Sleep(Objective):
    """The sleep term alone, for models that can be simulated: the posterior learns from pairs (z, x) of the model.

        E_p(z,x) E_r(a|z)[ log q(z, a | x) − log r(a | z) ] ≤ E_p(z,x)[ log q(z | x) ]

    No density of prior or likelihood is asked for. Pairs are those of the batch where it has them, else fresh ones.

    Args:
        levels: terms of the chain drawn per pair; all if None.
        simulate: count to so many (z, x), of shapes (count, D) and (count, *event); None draws from the model itself.

    Source: Papamakarios and Murray, Fast ε-free Inference of Simulation Models, 2016; with a chain, method and bound of
    Piriyakulkij et al., AAAI 2025.

    Example:
        >>> Sleep() == Sleep(levels=None)
        True
    """

    levels: int | None = None
    simulate: Callable[[int], tuple[Tensor, Tensor]] | None = None

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        if batch.z is not None:
            pairs = Fantasies(batch.x, batch.z, None)
        elif self.simulate is None:
            pairs = model.fantasise(len(batch.x))
        else:
            with torch.no_grad():
                z, x = self.simulate(len(batch.x))
            pairs = Fantasies(x.to(batch.x), z.to(batch.x), None)
        loss = sleep_loss(model, pairs, self.levels)
        yield Update(("posterior", "classifier"), loss, {"sleep": loss})


@final
@dataclass(frozen=True)
class WakeSleep(DataObjective):
    """The paper's alternation: one step on data by the bound, then `sleep_steps` steps on fantasies.

        wake:   ELBO(x)
        sleep:  sleep_weight · E_p(z) E_p(x|z) E_r(a|z)[ log q(z, a | x) − log r(a | z) ]

    Losses are (B,): several fantasies for an example are averaged.

    Args:
        wake: the bound and its weights.
        sleep_steps: steps on a batch of fantasies each.
        sleep_weight: weight of the sleep term.
        levels: terms of the chain drawn per fantasy; all if None.
        fantasies: how many for each example of data.

    Raises:
        InputError: in training, the posterior has no density.

    Sources: Piriyakulkij et al., AAAI 2025; Hinton et al., The Wake-Sleep Algorithm, 1995.

    Example:
        >>> updates = list(WakeSleep(sleep_steps=2).updates(model, Batch(x)))
        >>> [sorted(update.terms) for update in updates]
        [['divergence', 'reconstruction'], ['sleep'], ['sleep']]
    """

    wake: ELBO = field(default_factory=ELBO)
    sleep_steps: int = 3
    sleep_weight: float = 1.0
    levels: int | None = 1
    fantasies: int = 1

    def loss(
        self, model: LatentVariableModel, x: Tensor, label: Tensor | None = None, progress: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.wake.loss(model, x, label, progress)

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        yield data_update(self, model, batch)
        for _ in range(self.sleep_steps):
            loss = sleep_loss(model, model.fantasise(self.fantasies * len(batch.x)), self.levels)
            loss = loss.view(-1, len(batch.x)).mean(0)
            yield Update(("posterior", "classifier"), self.sleep_weight * loss, {"sleep": loss})


@final
@dataclass(frozen=True)
class ReweightedWakeSleep(DataObjective):
    """Reweighted wake-sleep: no gradient through the draws.

        (z_k, a_k) ~ q(z, a | x),    z* = z_k with probability w_k / Σ w,    w = p_θ(x, z) r(a|z) / q(z, a|x)
        decoder:    log p_θ(x | z*)
        posterior:  E_r[ log q(z*, a|x) − log r(a|z*) ] + sleep_weight · the same at fantasies z ~ p(z), x ~ p_θ(x|z)

    For large K, z* is a draw from p_θ(z|x). Losses are (B,). Where labels are summed over, a draw for each competes
    first, l* ~ r(l|x) ∝ q(l|x)^(1 − label_rate) p̂(l|x)^label_rate, with p̂ the labels' shares of the
    weights, then K draws given l* for z*. The classifier learns all of r, not only the label that was drawn.

    Args:
        samples: K.
        sleep_weight: weight of the sleep term.
        levels: terms of the chain drawn per example; all if None.
        label_rate: how far q(l|x) goes towards p̂(l|x) at once; where it comes to rest doesn't depend on it.
        fantasies: how many for each example of data.

    Raises:
        InputError: in training, the posterior has no density.

    Sources: Bornschein and Bengio, 2015; Le et al., Revisiting Reweighted Wake-Sleep, 2019.

    Example:
        >>> loss, terms = ReweightedWakeSleep(samples=4).loss(model, x)
        >>> loss.shape, "sleep" in terms
        (torch.Size([3]), True)
    """

    samples: int = 8
    sleep_weight: float = 0.3
    levels: int | None = None
    label_rate: float = 1.0
    fantasies: int = 1

    def loss(
        self, model: LatentVariableModel, x: Tensor, label: Tensor | None = None, progress: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        count = len(x)
        dreaming = self.sleep_weight > 0 and label is None
        fantasies = model.fantasise(self.fantasies * count) if dreaming else None
        # Data and fantasies go through the encoder, and later through the posterior, together.
        features = model.posterior.encode(x if fantasies is None else torch.cat([x, fantasies.x]))
        view = model.view_of(features[:count], label)
        classification = -view.log_label if view.log_label is not None else None
        if view.summed:
            target = self._weigh_labels(model, x, view)
            classification = cross_entropy(view, target.exp())
            view = _told(view, _drawn(target))
        with torch.no_grad():
            draw = model.posterior.condition(view.features.detach()).draw((self.samples,))
            weights = model.weigh(x, draw, view.label)
            z = _take(draw.z, _drawn(weights.log_weight()))
            terms = bound_terms(view, weights)
        if classification is not None:
            terms["classification"] = classification
        known, pairs = view.features, z
        dream = None if fantasies is None else (model.view_of(features[count:], fantasies.label), fantasies.z)
        if dream:
            known, pairs = torch.cat([known, dream[0].features]), torch.cat([pairs, dream[1]])
        learnt = -model.posterior.condition(known).log_bound(pairs, self.levels)
        terms |= {"resampled_reconstruction": -model.likelihood.log_prob(x, z), "wake": learnt[:count]}
        loss = terms["resampled_reconstruction"] - model.prior.log_prob(z, view.label) + terms["wake"]
        if classification is not None:
            loss = loss + classification
        if dream:
            terms["sleep"] = _with_label(dream[0], learnt[count:]).view(-1, count).mean(0)
            loss = loss + self.sleep_weight * terms["sleep"]
        return loss, terms

    @torch.no_grad()
    def _weigh_labels(self, model: LatentVariableModel, x: Tensor, view: View) -> Tensor:
        """log r(l|x), (C, B), with p̂ from one draw given each label."""
        draw = model.posterior.condition(view.features).draw((1,))
        return damped(view, model.weigh(x, draw, view.label).log_weight()[0], self.label_rate)

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        yield data_update(self, model, batch)


def _with_label(view: View, loss: Tensor) -> Tensor:
    """The loss, and −log q(l|x) where labels are known."""
    return loss if view.log_label is None else loss - view.log_label


def _drawn(logits: Tensor) -> Tensor:
    """One of N candidates for each column of (N, B): (B,)."""
    return choose(logits.T)


def _take(values: Tensor, chosen: Tensor) -> Tensor:
    """Of values (N, B, F) the chosen one (B,) of each column: (B, F)."""
    return values.gather(0, chosen[None, :, None].expand(1, -1, values.shape[-1]))[0]


def _told(view: View, label: Tensor) -> View:
    """A view that sums over labels, told one for each example (B,)."""
    assert view.log_label is not None
    return View(_take(view.features, label), label, view.log_label.gather(0, label[None])[0])
