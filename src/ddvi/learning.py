"""Further training of a model that a user holds in Python, as `Inference` and `Target` do."""

from __future__ import annotations

from typing import Any

from lightning_fabric import Fabric
from torch import Tensor

from ddvi.arithmetic import fast_products
from ddvi.model import LatentVariableModel
from ddvi.schedule import Schedule
from ddvi.settings import Settings
from ddvi.training import Trainer


def learn(
    model: LatentVariableModel,
    schedule: Schedule,
    x: Tensor,
    history: list[dict[str, Any]],
    fabric: Fabric,
    settings: Settings,
    **data: Any,
) -> None:
    """Train a model, with fresh optimisers, and write on its history, whose epochs go on counting.

    Args:
        model: what learns; in evaluation mode afterwards, however it ends.
        schedule: how.
        x: raw training data (N, *event).
        history: rows of earlier trainings, to which those of this one are added.
        fabric: devices and precision.
        settings: whether steps are recorded and fused.
        data: what else `Trainer` is given.

    Raises:
        InputError, Interrupted, TrainingError: as `Trainer`.
    """
    options = {"graphs": settings.graphs, "compiles": settings.compile}
    trainer = Trainer(model, schedule, x, fabric=fabric, **options, **data)
    before = len(history)
    try:
        with fast_products(fabric.device):
            trainer.fit()
    finally:
        model.eval()
        history += [row | {"epoch": before + row["epoch"]} for row in trainer.state.history]
