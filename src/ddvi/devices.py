"""The devices of a run, and the processes that it has on them, one each; the top imports no torch."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ddvi.errors import InputError
from ddvi.settings import Settings

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_PRECISIONS = {"32": "32-true", "tf32": "32-true", "64": "64-true", "bf16": "bf16-mixed"}


def choose_device(settings: Settings) -> str:
    """The kind of device of a run.

    Raises:
        InputError: the device isn't there, or can't have the precision.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if settings.precision == "64" and settings.device == "auto":
        available["mps"] = False
    device = next(name for name, there in available.items() if there) if settings.device == "auto" else settings.device
    if not available[device]:
        there = ", ".join(name for name, there in available.items() if there)
        raise InputError(f"device={device} is not available on this machine; choose from {there}, or leave it out")
    if device == "mps" and settings.precision == "64":
        raise InputError("device=mps has no precision=64; use device=cpu")
    return device


def make_fabric(settings: Settings, devices: int = 1, nodes: int = 1) -> Fabric:
    """Devices and precision of a run; raises as `choose_device`."""
    from lightning_fabric import Fabric

    precision: Any = _PRECISIONS[settings.precision]
    with _quiet():
        return Fabric(accelerator=choose_device(settings), devices=devices, num_nodes=nodes, precision=precision)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Fabric has some lines to say of how it starts, and of a precision that is chosen on purpose."""
    log = logging.getLogger("lightning_fabric")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def launched(settings: Settings) -> Iterator[Fabric]:
    """The fabric that a run is trained with, its processes connected for the length of a block.

    Where torchrun or Slurm have started them, they find each other; else this one starts the others, by the command
    that it was started with. A notebook can't be started so; it has one device.

    Raises:
        InputError: there are fewer devices, or not as many processes have been started.
    """
    import torch
    from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    device, devices, nodes = choose_device(settings), settings.devices, 1
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device, devices)
    if devices > there:
        raise InputError(f"devices={devices} is more than the {there} of device={device} on this machine; give fewer")
    if TorchElasticEnvironment.detect():
        nodes, started = (int(os.environ.get(name, 1)) for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        if devices != started:
            raise InputError(f"torchrun has started {started} processes, but devices={devices}; give devices={started}")
    elif devices > 1 and SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", 1))
    fabric = make_fabric(settings, devices, nodes)
    try:
        with _quiet():
            fabric.launch()
    except ValueError as error:  # Slurm has started another number
        raise InputError(f"devices={devices} doesn't fit the processes that were started: {error}") from None
    try:
        yield fabric
    finally:
        part_ways(fabric)


def part_ways(fabric: Fabric) -> None:
    """Disconnect the processes of a fabric: what the first still has to do it does alone."""
    import torch

    if fabric.world_size > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_first(settings: Settings) -> bool:
    """Whether this process is the one of its run that writes and speaks; known before any of them are connected."""
    if settings.devices == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # torchrun's, Fabric's and Slurm's, in the order that Fabric keeps
    return int(next((os.environ[name] for name in names if name in os.environ), 0)) == 0
