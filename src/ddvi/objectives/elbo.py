"""The evidence lower bound and the importance-weighted bound, differentiated through the draws.

Either may take the sleep term beside it (`Dreaming`).

    ELBO = E_q [ log p_θ(x|z) + kl_weight ( prior_weight log p(z) + log r(a|z) − log q_φ(z,a|x) ) ]
    IW_K = E_q [ log 1/K Σ_k exp( the same bracket ) ]

Where labels are summed over, with ELBO_l and IW_l the same given the label and with log p(l) in the bracket:

    ELBO = Σ_l q(l|x) ( ELBO_l − kl_weight log q(l|x) ),    IW_K = log Σ_l exp IW_l
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ddvi.model import LatentVariableModel, View, Weights
from ddvi.objectives.base import check_least
from ddvi.objectives.log_variance import robust_log_variance
from ddvi.objectives.sleep import Dreaming
from ddvi.posteriors.base import Draw, Posterior


def bound_terms(view: View, weights: Weights) -> dict[str, Tensor]:
    """Reconstruction and divergence (nats per example, both to be small), averaged over draws and labels: (B,) each.

    Of examples with a known label also classification, −log q(l|x).
    """
    divergence = weights.log_ratio - weights.log_prior
    if view.log_label is not None and view.summed:
        divergence = divergence + view.log_label
    terms = {"reconstruction": -weights.log_likelihood, "divergence": divergence}
    terms = {name: view.average(value.detach()).mean(0) for name, value in terms.items()}
    if view.log_label is not None and not view.summed:
        terms["classification"] = -view.log_label
    return terms


def negative_elbo(
    view: View, weights: Weights, kl_weight: float | Tensor, prior_weight: float = 1.0, label_rate: float = 1.0
) -> Tensor:
    """−ELBO (B,), summed over labels where the view says so; weights are (K, *labels, B).

    Of the gradient of q(l|x) `label_rate` is taken, which leaves the value as it is.
    """
    loss = -weights.log_weight(kl_weight, prior_weight).mean(0)
    if view.log_label is None or not view.summed:
        return loss
    log_label = torch.lerp(view.log_label.detach(), view.log_label, label_rate)
    return view._replace(log_label=log_label).average(loss + kl_weight * log_label)


def damped(view: View, log_share: Tensor, label_rate: float) -> Tensor:
    """log r(l|x) (C, B), r ∝ q(l|x)^(1 − label_rate) · share^label_rate, without gradient.

    A step of mirror descent on KL( q(l|x) ‖ share ): to first order in `label_rate`, learning r takes that much of the
    gradient of the evidence lower bound.
    """
    assert view.log_label is not None
    return torch.lerp(view.log_label.detach(), log_share.detach(), label_rate).log_softmax(0)


def cross_entropy(view: View, target: Tensor) -> Tensor:
    """−Σ_l target_l log q(l|x) (B,), of a view that sums over labels."""
    assert view.log_label is not None
    return -(target * view.log_label).sum(0)


def risen(kl_weight: float, kl_rise: float, progress: float | Tensor) -> float | Tensor:
    """The KL weight on its linear rise from 0 over the first `kl_rise` of training."""
    if kl_rise <= 0:
        return kl_weight
    share = progress / kl_rise
    return kl_weight * (share.clamp(max=1.0) if isinstance(share, Tensor) else min(1.0, share))


def _draw(
    posterior: Posterior,
    features: Tensor,
    samples: int,
    path_gradient: bool,
    weigh: Callable[[Tensor], Tensor] | None = None,
) -> Draw:
    if path_gradient:
        return posterior.path_draw(features, (samples,), weigh)
    return posterior.condition(features).draw((samples,))


@final
@dataclass(frozen=True)
class ELBO(Dreaming):
    """The evidence lower bound, by K reparameterised draws.

        E_q[ log p_θ(x|z) + kl_weight ( prior_weight log p(z) + log r(a|z) − log q_φ(z, a|x) ) ],
    at weights 1 ≤ log p_θ(x)

    Args:
        samples: K, draws per example, for each label where labels are summed over.
        kl_weight: weight of everything but the reconstruction; 1 is the bound.
        kl_rise: share of training over which that weight rises linearly from 0.
        prior_weight: weight of log p(z), and of log p(l), beside the rest of the divergence; 1 is the bound.
        path_gradient: score log q with parameters held fixed, so that its gradient comes through the draw alone; lower
            variance near the optimum.
        label_rate: how much of the gradient q(l|x) takes, see `negative_elbo`.
        sleep_weight: weight of the sleep term beside the bound, see `Dreaming`; 0 leaves it out.
        levels: terms of the chain drawn per fantasy; all if None.
        fantasies: how many for each example of data.

    Raises:
        InputError: a count is below 1 or a weight negative; in training, the posterior has no density.

    Sources: Kingma and Welling, 2014; Roeder et al., 2017, and Tucker et al., 2019, for the path gradient.

    Example:
        >>> loss, terms = ELBO(samples=5).loss(model, x)
        >>> loss.shape, sorted(terms)
        (torch.Size([3]), ['divergence', 'reconstruction'])
    """

    samples: int = 1
    kl_weight: float = 1.0
    kl_rise: float = 0.0
    prior_weight: float = 1.0
    path_gradient: bool = False
    label_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, samples=1)

    @property
    def through_draws(self) -> bool:
        return True

    def wake_loss(
        self, model: LatentVariableModel, x: Tensor, view: View, progress: float | Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        draw = _draw(model.posterior, view.features, self.samples, self.path_gradient)
        weights = model.weigh(x, draw, view.label)
        kl_weight = risen(self.kl_weight, self.kl_rise, progress)
        loss = negative_elbo(view, weights, kl_weight, self.prior_weight, self.label_rate)
        return loss, bound_terms(view, weights)


@final
@dataclass(frozen=True)
class ImportanceWeighted(Dreaming):
    """The importance-weighted bound, tighter for larger K.

        E_q[ log 1/K Σ_k w_k ] ≤ log p_θ(x),    log w = log p_θ(x|z) + log p(z) + log r(a|z) − log q_φ(z, a|x)

    Where labels are summed over, the bound doesn't involve q(l|x): the classifier learns from labels, and fits the
    shares of the labels in the sum.

    Args:
        samples: K, for each label where labels are summed over.
        kl_weight: as in `ELBO`.
        kl_rise: as in `ELBO`.
        prior_weight: as in `ELBO`.
        path_gradient: score log q with parameters held fixed and weigh the path by its share squared (the doubly
            reparameterised gradient), which is the same on average.
        label_rate: how far q(l|x) goes towards these shares at once, see `damped`.
        variance_weight: weight of the log-variance loss of `ReweightedWakeSleep` at the end of training, for a bound by
            single draws that isn't left behind; without effect where K is 1 or labels are summed over.
        sleep_weight: as in `ELBO`.
        levels: as in `ELBO`.
        fantasies: as in `ELBO`.

    Raises:
        InputError: a count is below 1 or a weight negative; in training, the posterior has no density.

    Sources: Burda et al., Importance Weighted Autoencoders, 2016; Tucker et al., 2019, for the path gradient; Richter
    et al., VarGrad, 2020, for the log-variance loss.

    Example:
        >>> loss, terms = ImportanceWeighted(samples=5).loss(model, x)
        >>> loss.shape
        torch.Size([3])
    """

    samples: int = 8
    kl_weight: float = 1.0
    kl_rise: float = 0.0
    prior_weight: float = 1.0
    path_gradient: bool = False
    label_rate: float = 1.0
    variance_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, samples=1)

    @property
    def through_draws(self) -> bool:
        return True

    def wake_loss(
        self, model: LatentVariableModel, x: Tensor, view: View, progress: float | Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        kl_weight = risen(self.kl_weight, self.kl_rise, progress)

        share = view.features.new_zeros(())

        def weigh(gradient: Tensor) -> Tensor:
            # The bound has weighed it by the draw's share, and log q's own gradient is the rest of a second time.
            return gradient * (1 - kl_weight * (1 - share))[..., None]

        draw = _draw(model.posterior, view.features, self.samples, self.path_gradient, weigh)
        weights = model.weigh(x, draw, view.label)
        log_weight = weights.log_weight(kl_weight, self.prior_weight)
        # Without its graph, which would hold the hook that holds it, and never be freed.
        share = log_weight.detach().flatten(0, -2).softmax(0).view_as(log_weight)
        bound = log_weight.logsumexp(0) - math.log(self.samples)
        terms = bound_terms(view, weights)
        if view.log_label is None or not view.summed:
            if not self.variance_weight or self.samples == 1:
                return -bound, terms
            conditional = model.posterior.condition(view.features)
            terms["log_variance"] = robust_log_variance(conditional, draw, weights.log_weight())
            return self.variance_weight * progress * terms["log_variance"] - bound, terms
        terms["classification"] = cross_entropy(view, damped(view, bound, self.label_rate).exp())
        return terms["classification"] - bound.logsumexp(0), terms
