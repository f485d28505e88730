"""Semi-supervised learning: any objective on data without labels, and the same with the label known.

    labelled x:    the objective given the label, and classifier_weight · log q(l|x)
    unlabelled x:  the objective summed over labels, Σ_l q(l|x) [ ELBO(x, l) + log p(l) − log q(l|x) ]

A few labels are soon learnt by heart. Against that q(l|x) learns without a label to say of a disturbed x what it says
of x itself, q̄(l|x): agreement_weight · Σ_l q̄(l|x) log q(l|x + r). The disturbance r, of a given length, is the one that
changes q(l|x) most, found by one step of power iteration on the Hessian of KL( q̄(l|x) ‖ q(l|x + r) ) at r = 0.

A q(l|x) that says the same of every x agrees with itself too. Against that it learns to be sure of each x and yet, on
the average over them, q(l), to be as the model's p(l): information_weight · ( H(q(l|x)) + 4 KL( q(l) ‖ p(l) ) ), which
is least where x and l share the most information.

Sources: Kingma et al., Semi-supervised Learning with Deep Generative Models, 2014; Miyato et al., Virtual Adversarial
Training, 2018, for the agreement; Krause et al., Discriminative Clustering by Regularized Information Maximization,
2010, and Hu et al., Learning Discrete Representations via Information Maximizing Self-Augmented Training, 2017, for the
information and its factor of 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ddvi.errors import InputError
from ddvi.model import LatentVariableModel
from ddvi.objectives.base import Batch, DataObjective, Labelled, Objective, Update
from ddvi.randomness import draw, whole_mean

_PROBE = 0.1  # length of the step that asks for the direction: small beside x itself, large beside rounding
_BALANCE = 4.0


@final
@dataclass(frozen=True)
class SemiSupervised(Objective):
    """`inner` on unlabelled and on labelled data; what it does beside data (sleep) happens once.

    An adversarial objective tells both kinds of data apart itself, and gains what makes q(l|x) learn. Its q(l|x)
    follows from a prior whose parts are thin, so that it is sure nearly everywhere, and one example between two parts
    outweighs all others; at a temperature τ it learns as q(l|x)^(1/τ), whose most probable label is the same.

    Args:
        inner: the objective on data.
        classifier_weight: of −log q(l|x) of labelled examples, in nats.
        agreement_weight: of −Σ_l q̄(l|x) log q(l|x + r) of unlabelled examples, in nats. Categories, which are whole
            numbers, can't be disturbed and have no such term.
        agreement_radius: length of r, in units of x.
        information_weight: of H(q(l|x)) + 4 KL( q(l) ‖ p(l) ) of unlabelled examples, in nats; q(l) is the batch's.
        temperature: τ, in agreement and information, and where there is no classifier in log q(l|x) too.
    """

    inner: Objective
    classifier_weight: float = 50.0
    agreement_weight: float = 0.0
    agreement_radius: float = 1.0
    information_weight: float = 0.0
    temperature: float = 1.0

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        labelled = batch.labelled
        if labelled is None or (model.classifier is None and isinstance(self.inner, DataObjective)):
            raise InputError("semi-supervised training needs labelled examples and a model with a classifier")
        pending = True
        for update in self.inner.updates(model, batch):
            if pending and "posterior" in update.children:
                pending = False
                update = self._with_labels(model, batch, labelled, update)
            yield update

    def _with_labels(self, model: LatentVariableModel, batch: Batch, labelled: Labelled, update: Update) -> Update:
        """The first update of the posterior, with what labels add to it."""
        loss, terms = update.loss, dict(update.terms)
        if isinstance(self.inner, DataObjective):
            told, named = self.inner.loss(model, labelled.x, labelled.label, batch.progress)
            loss = loss + told
            terms |= {f"labelled_{name}": value for name, value in named.items()}
        else:
            log_label = self._classify(model, labelled.x)
            terms["labelled_classification"] = -log_label.gather(1, labelled.label[:, None])[:, 0]
        loss = loss + self.classifier_weight * terms["labelled_classification"]
        weights = {"agreement": self.agreement_weight, "information": self.information_weight}
        for name, value in self._without_labels(model, batch.x).items():
            terms[name] = value
            loss = loss + weights[name] * value
        return Update(update.children, loss, terms)

    def _without_labels(self, model: LatentVariableModel, x: Tensor) -> dict[str, Tensor]:
        """What q(l|x) of x (B, *event) learns without a label, (B,) each; what has no weight is left out."""
        disturbed = self.agreement_weight > 0 and x.is_floating_point()
        if not disturbed and not self.information_weight > 0:
            return {}
        with torch.set_grad_enabled(self.information_weight > 0):
            log_label = self._classify(model, x)
        terms: dict[str, Tensor] = {}
        if disturbed:
            terms["agreement"] = self._disagreement(model, x, log_label.detach())
        if self.information_weight > 0:
            label = log_label.exp()
            surplus = whole_mean(label).clamp_min(torch.finfo(label.dtype).tiny).log() + math.log(label.shape[1])
            terms["information"] = (label * (_BALANCE * surplus - log_label)).sum(1)
        return terms

    def _disagreement(self, model: LatentVariableModel, x: Tensor, log_label: Tensor) -> Tensor:
        """−Σ_l q̄(l|x) log q(l|x + r) of x (B, *event), with log q̄ (B, C) as it is: (B,)."""
        probe = _unit(draw(torch.randn, x.shape, 0, device=x.device, dtype=x.dtype)).mul_(_PROBE).requires_grad_()
        (steepest,) = torch.autograd.grad(_steepness(log_label, self._classify(model, x + probe)).sum(), probe)
        disturbed = self._classify(model, x + self.agreement_radius * _unit(steepest))
        return -(log_label.exp() * disturbed).sum(1)

    def _classify(self, model: LatentVariableModel, x: Tensor) -> Tensor:
        """log q(l|x) at the temperature of x (B, *event): (B, C)."""
        log_label = model.classify(x)
        return log_label if self.temperature == 1 else (log_label / self.temperature).log_softmax(1)


def _steepness(before: Tensor, after: Tensor) -> Tensor:
    """What has the gradient of −Σ_l q̄(l) log q(l) of log q̄ and log q (B, C), up to a positive factor: (B,).

    With t the most probable label and η logits, that gradient is Σ_{l≠t} q̄(l) (q(l)/q̄(l) − 1) ∇(η_l − η_t). Where q̄ is
    sure of t, all q̄(l) vanish in floating point; what they are to each other doesn't.
    """
    top = before.argmax(1, keepdim=True)
    change = after.detach() - before
    growth = torch.where(change > 0, change + (-torch.expm1(-change)).log(), (-torch.expm1(change)).log())
    size = before.scatter(1, top, -torch.inf) + growth  # log |q̄(l) (q(l)/q̄(l) − 1)|
    factor = (change.sign() * (size - size.amax(1, keepdim=True)).exp()).nan_to_num(0.0)
    return (factor * (after - after.gather(1, top))).sum(1)


def _unit(value: Tensor) -> Tensor:
    """Rows (B, *event) at length 1; those of length 0 as they are."""
    rows = value.flatten(1)
    smallest = torch.finfo(value.dtype).tiny
    rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(smallest)  # the square of a small gradient would vanish
    return (rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(smallest)).view_as(value)
