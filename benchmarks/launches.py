"""What a step on a GPU waits for: launches by the CPU, kernels with little to do, or matrix products."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from rates import Clock, Subject, training_rates
from torch.profiler import ProfilerActivity, profile

_BEFORE, _WATCHED = 4, 5
"""Steps that go before, two of which aren't recorded yet, and steps that are watched."""


@dataclass(frozen=True)
class Launches:
    """Seconds of a step, and what they are made of."""

    one_by_one: float
    """Kernels launched by the CPU, each for itself."""
    recorded: float
    """Kernels launched as one."""
    kernels: float
    """How many."""
    busy: float
    """The sum of what each of them takes; what is left of a recorded step lies between them."""

    @classmethod
    def of(cls, subject: Subject, recorded: float, seconds: float, repeats: int) -> Launches:
        """Of a step of training whose time when recorded is known."""
        rates = training_rates(subject, seconds, repeats, graphs=False)
        watch = _Watch(subject.fabric.device)
        subject.trainer((_BEFORE + _WATCHED) * subject.settings.batch_size, 1, watch).fit()
        events = [event for event in watch.profile.key_averages() if event.self_device_time_total > 0]
        return cls(
            subject.settings.batch_size / statistics.median(rates),
            recorded,
            sum(event.count for event in events) / _WATCHED,
            sum(event.self_device_time_total for event in events) / 1e6 / _WATCHED,
        )


class _Watch(Clock):
    """Notes the kernels of some steps."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.profile: Any = profile(activities=[ProfilerActivity.CUDA])

    def step(self, epoch: int, step: int, steps: int) -> None:
        if step == _BEFORE:
            torch.cuda.synchronize()
            self.profile.start()
        elif step == _BEFORE + _WATCHED:
            torch.cuda.synchronize()
            self.profile.stop()
