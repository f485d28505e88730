"""Semi-supervised learning: any objective on data without labels, and the same with the label known.

    labelled x:    the objective given the label, and classifier_weight · log q(l|x)
    unlabelled x:  the objective summed over labels, Σ_l q(l|x) [ ELBO(x, l) + log p(l) − log q(l|x) ]

A few labels are soon learnt by heart. Against that the encoder's hidden units are dropped at random where q(l|x) learns
(and only there: bounds and draws are free of that noise), and without a label q(l|x) learns with units dropped what it
says with all of them, q̄(l|x): agreement_weight · Σ_l q̄(l|x) log q(l|x).

Sources: Kingma et al., Semi-supervised Learning with Deep Generative Models, 2014; Bachman et al., Learning with
Pseudo-Ensembles, 2014, for the agreement.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ddvi.errors import InputError
from ddvi.model import LatentVariableModel
from ddvi.networks import Dropout
from ddvi.objectives.base import Batch, DataObjective, Labelled, Objective, Update


@final
@dataclass(frozen=True)
class SemiSupervised(Objective):
    """`inner` on unlabelled and on labelled data; what it does beside data (sleep) happens once.

    An adversarial objective tells both kinds of data apart itself, and gains what makes q(l|x) learn.

    Args:
        inner: the objective on data.
        classifier_weight: of −log q(l|x) of labelled examples, in nats.
        agreement_weight: of −Σ_l q̄(l|x) log q(l|x) of unlabelled examples, in nats.
        dropout: whether the encoder's units are dropped where q(l|x) learns, and only there.
    """

    inner: Objective
    classifier_weight: float = 50.0
    agreement_weight: float = 0.0
    dropout: bool = False

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        labelled = batch.labelled
        if labelled is None or (model.classifier is None and isinstance(self.inner, DataObjective)):
            raise InputError("semi-supervised training needs labelled examples and a model with a classifier")
        updates, pending = self.inner.updates(model, batch), True
        while True:
            with self._undropped(model):
                update = next(updates, None)
            if update is None:
                return
            if pending and "posterior" in update.children:
                pending = False
                update = self._with_labels(model, batch, labelled, update)
            yield update

    def _with_labels(self, model: LatentVariableModel, batch: Batch, labelled: Labelled, update: Update) -> Update:
        """The first update of the posterior, with what labels add to it."""
        loss, terms, known = update.loss, {}, None
        if isinstance(self.inner, DataObjective):
            with self._undropped(model):
                told, terms = self.inner.loss(model, labelled.x, labelled.label, batch.progress)
            loss, known = loss + told, terms["classification"]
        terms = {f"labelled_{name}": value for name, value in terms.items()}
        learnt = self._classification(model, batch.x, labelled, known)
        loss = loss + self.classifier_weight * learnt["labelled_classification"]
        if "agreement" in learnt:
            loss = loss + self.agreement_weight * learnt["agreement"]
        return Update(update.children, loss, update.terms | terms | learnt)

    def _classification(
        self, model: LatentVariableModel, x: Tensor, labelled: Labelled, known: Tensor | None
    ) -> dict[str, Tensor]:
        """Minus log q(l|x) where l is known, and the cross entropy between q̄(l|x) and q(l|x) where it isn't."""
        agree = self.agreement_weight > 0 and bool(self._dropping(model))  # else they agree anyway
        if known is not None and not (agree or self.dropout):
            return {"labelled_classification": known}
        log_label = model.classify(torch.cat([labelled.x, x]) if agree else labelled.x)
        count = len(labelled.label)
        terms = {"labelled_classification": -log_label[:count].gather(1, labelled.label[:, None])[:, 0]}
        if agree:
            with torch.no_grad(), self._undropped(model):
                whole = model.classify(x).exp()
            terms["agreement"] = -(whole * log_label[count:]).sum(1)
        return terms

    @contextlib.contextmanager
    def _undropped(self, model: LatentVariableModel) -> Iterator[None]:
        """The encoder with all of its units, where they are dropped for q(l|x) alone."""
        layers = self._dropping(model)
        before = [layer.training for layer in layers]
        for layer in layers:
            layer.train(False)
        try:
            yield
        finally:
            for layer, training in zip(layers, before, strict=True):
                layer.train(training)

    def _dropping(self, model: LatentVariableModel) -> list[Dropout]:
        """The layers that are to drop units where q(l|x) learns."""
        modules = model.posterior.encoder.modules() if self.dropout else ()
        return [module for module in modules if isinstance(module, Dropout)]
