"""Live views of a training in other programs: TensorBoard, Weights & Biases, MLflow, all by Fabric's logger interface.

The top imports no torch, so that a package that isn't installed is missed before any work starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ddvi.errors import InputError
from ddvi.settings import Settings

if TYPE_CHECKING:
    from lightning_fabric.loggers.logger import Logger

INSTALL = {
    "tensorboard": "pip install 'ddvi[tensorboard]'",
    "wandb": "pip install wandb",
    "mlflow": "pip install mlflow",
}
FOLDER = "tensorboard"
"""Where TensorBoard's event files are in a run folder."""


def check(settings: Settings) -> None:
    """Refuse a logger whose package isn't installed."""
    if settings.logger != "none" and not find_spec(settings.logger):
        raise InputError(f"logger={settings.logger} needs a package that isn't installed: {INSTALL[settings.logger]}")


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Logger | None]:
    """The logger that the settings ask for, for the length of a block, or None.

    Raises:
        InputError: its package isn't installed.
    """
    check(settings)
    logger = _make(settings)
    try:
        yield logger
    except BaseException:
        if logger:
            logger.finalize("aborted")
        raise
    if logger:
        logger.finalize("success")


def log(logger: Logger | None, values: Mapping[str, Any], prefix: str, step: int) -> None:
    """Hand on those of the values that are finite numbers, under names that group them."""
    numbers = {f"{prefix}/{name}": float(value) for name, value in values.items() if isinstance(value, int | float)}
    if logger:
        logger.log_metrics({name: value for name, value in numbers.items() if math.isfinite(value)}, step)


def _make(settings: Settings) -> Logger | None:
    match settings.logger:
        case "tensorboard":
            from lightning_fabric.loggers import TensorBoardLogger

            return TensorBoardLogger(settings.folder, name=FOLDER, version="")
        case "wandb":
            return _wandb(settings)
        case "mlflow":
            return _mlflow(settings)
    return None


def _title(settings: Settings) -> str:
    return " ".join(settings.folder.parts[-4:])


def _wandb(settings: Settings) -> Logger:
    import wandb  # type: ignore[import-not-found]

    identity = hashlib.sha256(str(settings.folder.absolute()).encode()).hexdigest()[:16]  # a resumed run goes on in it
    run = wandb.init(
        project="ddvi",
        name=_title(settings),
        id=identity,
        resume="allow",
        dir=str(settings.folder),
        config=settings.as_dict(),
    )
    return _adapted("wandb", lambda values, step: run.log(values, step=step), lambda status: run.finish(status))


def _mlflow(settings: Settings) -> Logger:
    import mlflow  # type: ignore[import-not-found]

    mlflow.set_experiment("ddvi")
    mlflow.start_run(run_name=_title(settings))
    mlflow.log_params(settings.as_dict())
    states = {0: "FINISHED", 1: "FAILED"}
    return _adapted(
        "mlflow",
        lambda values, step: mlflow.log_metrics(values, step=step),
        lambda status: mlflow.end_run(states[status]),
    )


def _adapted(name: str, send: Any, end: Any) -> Logger:
    """Fabric's interface around two functions: one that sends numbers, one that ends with status 0 or 1."""
    from lightning_fabric.loggers.logger import Logger

    class Adapted(Logger):
        @property
        def name(self) -> str:
            return name

        @property
        def version(self) -> None:
            return None

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            send(metrics, step)

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

        def finalize(self, status: str) -> None:
            end(0 if status == "success" else 1)

    return Adapted()
