"""Semi-supervised learning: any objective on data without labels, and the same with the label known.

    labelled x:    the objective given the label, and classifier_weight · log q(l|x)
    unlabelled x:  the objective summed over labels, Σ_l q(l|x) [ ELBO(x, l) + log p(l) − log q(l|x) ]

Source: Kingma et al., Semi-supervised Learning with Deep Generative Models, 2014.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from ddvi.errors import InputError
from ddvi.model import LatentVariableModel
from ddvi.objectives.base import Batch, DataObjective, Objective, Update


@final
@dataclass(frozen=True)
class SemiSupervised(Objective):
    """`inner` on unlabelled and on labelled data; what it does beside data (sleep) happens once.

    Args:
        inner: the objective on data.
        classifier_weight: of −log q(l|x) of labelled examples, in nats.
    """

    inner: DataObjective
    classifier_weight: float = 50.0

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        if batch.labelled is None or model.classifier is None:
            raise InputError("semi-supervised training needs labelled examples and a model with a classifier")
        x, label = batch.labelled.x, batch.labelled.label
        updates = self.inner.updates(model, batch)
        first = next(updates)
        loss, terms = self.inner.loss(model, x, label, batch.progress)
        loss = first.loss + loss + self.classifier_weight * terms["classification"]
        labelled = {f"labelled_{name}": value for name, value in terms.items()}
        yield Update(first.children, loss, first.terms | labelled)
        yield from updates
