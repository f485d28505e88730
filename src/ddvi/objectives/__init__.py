"""Objectives: frozen values that yield the updates of one training step."""

from ddvi.objectives.adversarial import Adversarial
from ddvi.objectives.base import Batch, DataObjective, Labelled, Objective, Update
from ddvi.objectives.elbo import ELBO, ImportanceWeighted
from ddvi.objectives.log_variance import LogVariance
from ddvi.objectives.marginal import MarginalLikelihood
from ddvi.objectives.reweighted import Reweighted
from ddvi.objectives.semi_supervised import SemiSupervised
from ddvi.objectives.sleep import Sleep
from ddvi.objectives.tempered import Tempered
from ddvi.objectives.wake_sleep import ReweightedWakeSleep, WakeSleep
from ddvi.objectives.warm_up import WarmUp

__all__ = [
    "ELBO",
    "Adversarial",
    "Batch",
    "DataObjective",
    "ImportanceWeighted",
    "Labelled",
    "LogVariance",
    "MarginalLikelihood",
    "Objective",
    "Reweighted",
    "ReweightedWakeSleep",
    "SemiSupervised",
    "Sleep",
    "Tempered",
    "Update",
    "WakeSleep",
    "WarmUp",
]
