"""Wake-sleep: learning from data and from fantasies of the model, in turn or, reweighted, together.

Sources: Hinton et al., The Wake-Sleep Algorithm, 1995; Bornschein & Bengio, Reweighted Wake-Sleep, 2015; Le et al.,
Revisiting Reweighted Wake-Sleep, 2019; Piriyakulkij et al., AAAI 2025, for the alternation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import final

import torch
from torch import Tensor

from ddvi.errors import InputError
from ddvi.model import LatentVariableModel, View
from ddvi.objectives.base import Batch, DataObjective, Update, check_least
from ddvi.objectives.elbo import ELBO, bound_terms, cross_entropy, damped
from ddvi.objectives.log_variance import robust_log_variance
from ddvi.objectives.prior_draws import PriorDraws
from ddvi.objectives.sleep import Dreaming, sleep_loss
from ddvi.randomness import choose, resample, taken


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
        InputError: a count is out of range, or the bound has a sleep term of its own; in training, the posterior has no
            density.

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

    def __post_init__(self) -> None:
        check_least(self, sleep_steps=0, levels=1, fantasies=1)
        if self.wake.sleep_weight:
            raise InputError(
                f"sleep_weight={self.wake.sleep_weight} of the bound would come beside that of WakeSleep; leave it out"
            )

    @property
    def through_draws(self) -> bool:
        return self.wake.through_draws

    def loss(
        self, model: LatentVariableModel, x: Tensor, label: Tensor | None = None, progress: float | Tensor = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.wake.loss(model, x, label, progress)

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        yield from super().updates(model, batch)
        if not (self.sleep_steps and self.sleep_weight):
            return
        # The decoder rests meanwhile, so that one pass of it makes the fantasies of all steps.
        size = self.fantasies * len(batch.x)
        for fantasies in model.fantasise(self.sleep_steps * size).split(size):
            loss = sleep_loss(model, fantasies, self.levels).view(-1, len(batch.x)).mean(0)
            yield Update(("posterior", "classifier"), self.sleep_weight * loss, {"sleep": loss})


@final
@dataclass(frozen=True)
class ReweightedWakeSleep(Dreaming):
    """Reweighted wake-sleep: no gradient through the draws.

        (z_k, a_k) ~ q(z, a | x),    w_k = p_θ(x, z_k) r(a_k|z_k) / q(z_k, a_k|x),    k = 1 … K
        z_s ~ p(z),                  w_s = p_θ(x | z_s),                              s = 1 … S
        z* = z_k or z_s with probability in proportion to w_k / K or w_s / S, M times
        decoder:    log p_θ(x | z*), the mean over the first `decoded` of them; 0: log ½( Σ_k w_k / K + Σ_s w_s / S )
        posterior:  E_r[ log q(z*, a|x) − log r(a|z*) ], the mean over all of them
                    + sleep_weight · the same at fantasies z ~ p(z), x ~ p_θ(x|z)
                    − progress · variance_weight · Σ_k h( log w_k − mean_k log w_k ) / (K − 1)

    Σ_k w_k / K and Σ_s w_s / S both estimate p_θ(x): the draws of q find what q knows, those of the prior, which the
    batch shares, what it has missed, where D is small. For large K or S, z* is a draw from p_θ(z|x). Losses are (B,).

    Learning from z* makes q cover the exact posterior, and forgives draws where that has nothing. The log-variance loss
    makes those rarer: while h is ½d² and r has no parameters, its gradient is that of the reverse divergence,
    KL( q(z,a|x) ‖ p(z|x) r(a|z) ). From 10 nats on h is linear, Huber's, as log weights have heavy tails.

    Where labels are summed over, they compete first, with one draw of q and S / C of the prior for each:
    l* ~ r(l|x) ∝ q(l|x)^(1 − label_rate) p̂(l|x)^label_rate, with p̂ the labels' shares of the weights; then the draws
    given l* for z*. The classifier learns all of r, not only the label that was drawn.

    Args:
        samples: K.
        label_rate: how far q(l|x) goes towards p̂(l|x) at once; where it comes to rest doesn't depend on it.
        prior_samples: S; with several labels the next multiple of their number.
        resampled: M.
        decoded: how many of these the decoder learns from, at most M; with 0 from all draws by their weights, which is
            what it learns from resampled ones on average, without their variance; where S is 0 the ½ falls away.
        variance_weight: weight of the log-variance loss at the end of training; without effect where K is 1.
        sleep_weight: weight of the sleep term.
        levels: terms of the chain drawn per example; all if None.
        fantasies: how many for each example of data.

    Raises:
        InputError: a count is out of range; in training, the posterior or, with `prior_samples`, the likelihood has no
            density.

    Sources: Bornschein and Bengio, 2015; Le et al., Revisiting Reweighted Wake-Sleep, 2019; Veach and Guibas, Optimally
    Combining Sampling Techniques, 1995, for weights from several proposals; Richter et al., VarGrad, 2020, for the
    log-variance loss; Huber, 1964.

    Example:
        >>> loss, terms = ReweightedWakeSleep(samples=4).loss(model, x)
        >>> loss.shape, "sleep" in terms
        (torch.Size([3]), True)
    """

    samples: int = 8
    _: KW_ONLY
    label_rate: float = 1.0
    prior_samples: int = 0
    resampled: int = 1
    decoded: int = 1
    variance_weight: float = 0.0
    sleep_weight: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, samples=1, prior_samples=0, resampled=1, decoded=0)

    def wake_loss(
        self, model: LatentVariableModel, x: Tensor, view: View, progress: float | Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weighted = torch.is_grad_enabled() and not self.decoded
        with torch.set_grad_enabled(weighted):
            broad = PriorDraws.of(model, x, self.prior_samples) if self.prior_samples else None
        classification = -view.log_label if view.log_label is not None else None
        if view.summed:
            target = self._weigh_labels(model, x, view, broad)
            classification = cross_entropy(view, target.exp())
            view = _told(view, choose(target))
        with torch.no_grad():
            draw = model.posterior.condition(view.features.detach()).draw((self.samples,))
        with torch.set_grad_enabled(weighted):
            weights = model.weigh(x, draw, view.label)
            log_weight = weights.log_weight()
            candidates, log_share = self._candidates(draw.z, log_weight, broad, view.label)
            terms = bound_terms(view, weights)
        z = taken(candidates, resample(log_share.detach(), self.resampled))
        if classification is not None:
            terms["classification"] = classification
        conditional = model.posterior.condition(view.features)
        terms["wake"] = loss = -conditional.log_bound(z, self.levels).mean(0)
        if self.decoded:
            decoded = z[: self.decoded]
            terms["resampled_reconstruction"] = -model.likelihood.log_prob(x, decoded).mean(0)
            loss = loss + terms["resampled_reconstruction"] - model.prior.log_prob(decoded, view.label).mean(0)
        else:
            terms["marginal"] = -log_share.logsumexp(0)
            loss = loss + terms["marginal"]
        if classification is not None:
            loss = loss + classification
        if self.variance_weight > 0 and self.samples > 1:
            terms["log_variance"] = robust_log_variance(conditional, draw, log_weight.detach())
            loss = loss + self.variance_weight * progress * terms["log_variance"]
        return loss, terms

    @torch.no_grad()
    def _weigh_labels(self, model: LatentVariableModel, x: Tensor, view: View, broad: PriorDraws | None) -> Tensor:
        """log r(l|x), (C, B), with p̂ from one draw of q given each label, and those of the prior."""
        draw = model.posterior.condition(view.features).draw((1,))
        log_joint = model.weigh(x, draw, view.label).log_weight()[0]
        if broad is not None:
            log_joint = torch.logaddexp(log_joint, broad.log_joint())
        return damped(view, log_joint, self.label_rate)

    def _candidates(
        self, z: Tensor, log_weight: Tensor, broad: PriorDraws | None, label: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Draws of q, z (K, B, D) of log weight (K, B), and of the prior; log shares of p̂_θ(x), (K + S, B)."""
        log_share = log_weight - math.log(self.samples)
        if broad is None:
            return z, log_share
        z = torch.cat([z, broad.z[:, None].expand(-1, *z.shape[1:])])
        return z, torch.cat([log_share, broad.log_weight(label)]) - math.log(2)


def _told(view: View, label: Tensor) -> View:
    """A view that sums over labels, told one for each example (B,)."""
    assert view.log_label is not None
    return View(taken(view.features, label[None])[0], label, view.log_label.gather(0, label[None])[0])
