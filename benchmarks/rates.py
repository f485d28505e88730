"""How many examples a second a method trains on, and draws latents for."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from ddvi import data, runs
from ddvi.composition import Observations, build_model, make_phases
from ddvi.labels import choose_labelled
from ddvi.model import LatentVariableModel
from ddvi.objectives.base import Labelled, Objective
from ddvi.randomness import generator, seeded
from ddvi.schedule import Phase, Schedule
from ddvi.settings import SEMI, Settings, resolve
from ddvi.training import Trainer

IMAGE, MAXIMUM = (1, 28, 28), 255.0
EXAMPLES, CLASSES = 60_000, 10
INFERENCE_BATCH = 1000
"""The batch of inference beside that of training."""
_LEARNING_RATE = 1e-4  # of most of the paper's code: by those of real images random ones may diverge, which costs time


@dataclass(frozen=True)
class Case:
    """What is measured: a method as in the commands, `_semi` included, and what differs from the common settings."""

    name: str
    method: str
    overrides: dict[str, Any]

    @property
    def semi(self) -> bool:
        return self.method.endswith(SEMI)

    def settings(self, common: dict[str, Any]) -> Settings:
        """The settings of a run; an InputError names what can't be used."""
        options = dict(common)
        return resolve("mnist" + SEMI * self.semi, self.method, options.pop("prior"), options | self.overrides)


@dataclass(frozen=True)
class Rate:
    """Examples per second: the median of repeats and their range."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, rates: Sequence[float]) -> Rate:
        return cls(statistics.median(rates), min(rates), max(rates))

    def __str__(self) -> str:
        return f"{self.median:,.0f} ({self.lowest:,.0f}–{self.highest:,.0f})"


@dataclass(frozen=True)
class Images:
    """Grey images (N, 1, 28, 28) of bytes, and their labels (N,)."""

    x: Tensor
    label: Tensor

    @classmethod
    def load(cls, data_root: str | None, count: int = EXAMPLES, classes: int = CLASSES) -> Images:
        """MNIST from `data_root`, or as many random black and white images of its shape."""
        if data_root:
            dataset = data.load("mnist", data_root)
            assert dataset.train_y is not None
            return cls(dataset.train_x, dataset.train_y)
        random = generator(0, "images")
        x = torch.randint(0, 2, (count, *IMAGE), dtype=torch.uint8, generator=random).mul_(255)
        return cls(x, torch.arange(count) % classes)


@dataclass(frozen=True)
class Subject:
    """A fresh model and all that its training needs."""

    settings: Settings
    model: LatentVariableModel
    objective: Objective
    images: Images
    labelled: Labelled | None
    fabric: Fabric

    @classmethod
    def build(cls, settings: Settings, images: Images, classes: int = CLASSES) -> Subject:
        """To be called, and used, inside `ddvi.arithmetic.arithmetic`."""
        observations = Observations(IMAGE, "bernoulli", "binarise", parts=classes, maximum=MAXIMUM)
        fabric, labelled = runs.make_fabric(settings), None
        with seeded(0, "model"):
            model = build_model(settings, observations)
        if settings.semi_supervised:
            count = min(settings.n_labels, len(images.label))
            shown = choose_labelled(images.label, count, classes, settings.seed)
            labelled = Labelled(images.x[shown], images.label[shown])
        fabric.to_device(model)
        return cls(settings, model, make_phases(settings)[-1].objective, images, labelled, fabric)

    def trainer(self, examples: int, epochs: int, clock: Clock | None = None, graphs: bool = True) -> Trainer:
        """Of so many epochs over the first `examples`."""
        settings = self.settings
        phases = (Phase(epochs, self.objective),)
        schedule = Schedule(phases, settings.batch_size, _LEARNING_RATE, "constant", settings.clip_norm)
        part = self.images.x[:examples]
        options: dict[str, Any] = {"fabric": self.fabric, "labelled": self.labelled, "compiles": settings.compile}
        return Trainer(self.model, schedule, part, listener=clock, graphs=graphs, **options)

    def train_one_step(self) -> None:
        """A whole step of the loop, on one batch."""
        self.trainer(self.settings.batch_size, 1).fit()

    @torch.no_grad()
    def infer(self, part: Tensor, batch_size: int) -> Tensor:
        """A draw of q(z | x) for each raw image, (N, D) on the CPU, which waits for the device."""
        model = self.model.eval()
        with seeded(0, "inference"), self.fabric.autocast():
            return torch.cat([model.latent(model.preprocessing(x)) for x in part.split(batch_size)]).cpu()


class Enough(Exception):
    """A training has shown what it was run for."""


class Clock:
    """Listens to a training: seconds at which epochs, and steps if wanted, have ended.

    Args:
        device: waited for before the time is taken.
        steps: after as many of them, one more for warm-up, `Enough` is raised; None listens to epochs alone.
    """

    def __init__(self, device: torch.device, steps: int | None = None) -> None:
        self.device = device
        self.steps = steps
        self.ends: list[float] = []

    def step(self, epoch: int, step: int, steps: int) -> None:
        if self.steps is None:
            return
        self._tick()
        if len(self.ends) > self.steps:
            raise Enough

    def epoch(self, row: dict[str, Any]) -> None:
        if self.steps is None:
            self._tick()

    def message(self, text: str) -> None:
        pass

    def _tick(self) -> None:
        wait(self.device)
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """From each end to the next."""
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_rates(subject: Subject, seconds: float, repeats: int, graphs: bool = True) -> list[float]:
    """Of `repeats` epochs of about `seconds` in all, after a warm-up; an epoch is as long as the machine needs."""
    batch_size = subject.settings.batch_size

    def epochs(steps: int, count: int) -> list[float]:
        clock = Clock(subject.fabric.device)
        subject.trainer(steps * batch_size, count, clock, graphs).fit()
        return [steps * batch_size / spent for spent in clock.seconds]

    warm = max(epochs(2, 3))
    return epochs(_steps(warm * seconds / repeats, batch_size, len(subject.images.x)), repeats + 1)


def step_seconds(subject: Subject, seconds: float, least: int = 5) -> float:
    """Seconds of a step on all the images, the best of at least `least` and of about `seconds` in all."""

    def measured(steps: int) -> float:
        clock, batch_size = Clock(subject.fabric.device, steps), subject.settings.batch_size
        examples = len(subject.images.x) // batch_size * batch_size  # a smaller batch would be the fastest
        with contextlib.suppress(Enough):
            subject.trainer(examples, 1 + (steps + 1) * batch_size // examples, clock).fit()
        return min(clock.seconds)

    return measured(max(least, math.ceil(seconds / measured(2))))


def inference_rate(subject: Subject, batch_size: int, seconds: float, repeats: int) -> Rate:
    """Of `repeats` passes of about `seconds` in all over raw images on the device, after a warm-up."""
    batch_size = min(batch_size, len(subject.images.x))

    def one_pass(steps: int) -> float:
        part = subject.fabric.to_device(subject.images.x[: steps * batch_size])
        wait(subject.fabric.device)
        started = time.perf_counter()
        subject.infer(part, batch_size)
        return len(part) / (time.perf_counter() - started)

    one_pass(2)
    steps = _steps(one_pass(2) * seconds / repeats, batch_size, len(subject.images.x))
    one_pass(steps)
    return Rate.of([one_pass(steps) for _ in range(repeats)])


def _steps(examples: float, batch_size: int, available: int) -> int:
    """How many full batches make about `examples`."""
    return max(1, min(math.ceil(examples / batch_size), available // batch_size))
