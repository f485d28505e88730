"""Objectives: frozen values that yield the updates of one training step."""

from ddvi.objectives.adversarial import Adversarial
from ddvi.objectives.base import Batch, Objective, Update
from ddvi.objectives.elbo import ELBO, ImportanceWeighted
from ddvi.objectives.wake_sleep import ReweightedWakeSleep, WakeSleep
from ddvi.objectives.warm_up import WarmUp

__all__ = [
    "ELBO",
    "Adversarial",
    "Batch",
    "ImportanceWeighted",
    "Objective",
    "ReweightedWakeSleep",
    "Update",
    "WakeSleep",
    "WarmUp",
]
