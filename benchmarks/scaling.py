"""How cost grows: time against batch size, T, latent size, K, labels and examples; memory against T and examples.

A quantity is doubled from point to point. What a step must do per example is flat in the batch size and in the number
of examples, and at most linear in the rest; memory is flat in the number of examples, beyond the data itself, and at
inference in T, beyond the constants of a longer chain. Times are the best of a few repeats; the last column is the
factor of the last doubling.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from memory import INFERENCE_BATCH, peak
from rates import CLASSES, Case, Images, Subject, inference_rate, step_seconds
from report import Sheet

from ddvi.methods import METHODS

TOLERANCE = 0.1
"""How far a factor may lie above the law: the noise of short measurements."""
_SEVERAL_DRAWS = {"ddvi": "reweighted_wake_sleep"}
_LAWS = {1: "flat", 2: "linear"}
_MICROSECONDS, _MEGABYTE = 1e6, 2**20


@dataclass(frozen=True)
class Series:
    """Costs of one case, a value for each of the quantity's."""

    name: str
    kind: str
    costs: list[float]
    judged: bool = True
    """Whether the law is meant for it."""


@dataclass(frozen=True)
class Sweep:
    """A table of costs against a quantity.

    Args:
        title: what the costs are, with their unit.
        kind: "cost" or "memory".
        quantity: what is doubled.
        law: the factor that a doubling may have: 1 is flat, 2 is linear.
        values: of the quantity.
        series: the rows.
    """

    title: str
    kind: str
    quantity: str
    law: int
    values: Sequence[int]
    series: list[Series]

    def doubling(self, series: Series) -> float:
        """The factor of the last doubling."""
        octaves = math.log2(self.values[-1] / self.values[-2])
        return (series.costs[-1] / max(series.costs[-2], 1e-12)) ** (1 / octaves)

    def verdict(self) -> str:
        """One line."""
        worst = max((each for each in self.series if each.judged), key=self.doubling)
        factor, law = self.doubling(worst), _LAWS[self.law]
        holds = "yes" if factor <= self.law * (1 + TOLERANCE) else "NO"
        return (
            f"At most {law} in the {self.quantity}: {holds}; the largest factor of the last doubling is"
            f" {factor:.2f} ({worst.name}, {worst.kind}), {law} is {self.law}."
        )

    def sheet(self) -> Sheet:
        rows = [
            (each.name, each.kind, *(f"{cost:,.{_digits(cost)}f}" for cost in each.costs), f"× {factor:.2f}")
            for each in self.series
            for factor in [self.doubling(each)]
        ]
        header = (self.quantity, "", *(f"{value:,}" for value in self.values), "doubled")
        return Sheet(self.title, header, rows, self.verdict(), words=2)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "doubling": [self.doubling(each) for each in self.series],
            "verdict": self.verdict(),
        }


def _digits(cost: float) -> int:
    return 0 if cost >= 100 else 1


@dataclass(frozen=True)
class Bench:
    """What all points have in common.

    Args:
        cases: those that were chosen.
        common: settings, see `Case.settings`.
        images: what is trained on.
        seconds: of a point, about.
        path: of matrix products; the caller has set it.
        say: told what is being measured.
    """

    cases: Sequence[Case]
    common: dict[str, Any]
    images: Images
    seconds: float
    path: str
    say: Callable[[str], None]

    def sweeps(self) -> Iterator[Sweep]:
        """Those that the cases allow."""
        single = [case for case in self.cases if not case.semi]
        semi = [case for case in self.cases if case.semi]
        # Cases that differ in T alone are one where T is what varies.
        chains = list({str(_without_steps(case)): case for case in reversed(single) if case.method == "ddvi"}.values())
        chains.reverse()
        # The objectives that draw several latents an example.
        many = [
            dataclasses.replace(case, overrides=case.overrides | {"objective": objective})
            for case in single
            for objective in [_SEVERAL_DRAWS.get(case.method, "importance_weighted")]
            if objective in METHODS[case.method].objectives
        ]
        largest = 8192 if self.common["device"] == "cuda" else 1024
        batches = _doubled(32, largest)
        if single:
            yield self._costs("batch size", "batch_size", batches, single, law=1, inference=True)
        if chains:
            yield self._costs("chain's length T", "steps", (5, 10, 20, 40, 80), chains, inference=True)
        if single:
            yield self._costs("latent size D", "latent_size", (2, 4, 8, 16, 32), single, inference=True)
        if many:
            yield self._costs("draws K", "samples", (1, 2, 4, 8, 16, 32), many)
        if semi:
            yield self._costs("labels C", "", (2, 4, 8, 16), semi)
        if single:
            yield self._costs("examples N", "", (7_500, 15_000, 30_000, 60_000), single, law=1)
            yield self._memory("examples N", (60_000, 120_000, 240_000), single)
        if chains:
            yield self._memory("chain's length T", (10, 20, 40, 80, 160), chains)

    def _costs(
        self,
        quantity: str,
        setting: str,
        values: Sequence[int],
        cases: Sequence[Case],
        law: int = 2,
        inference: bool = False,
    ) -> Sweep:
        kinds = ("training", "inference") if inference else ("training",)
        series = [Series(case.name, kind, []) for case in cases for kind in kinds]
        for value in values:
            for number, case in enumerate(cases):
                self.say(f"{case.name} at {value:,} {quantity}")
                costs = self._point(case, quantity, setting, value, inference)
                for row, cost in zip(series[number * len(kinds) :], costs, strict=False):
                    row.costs.append(cost * _MICROSECONDS)
        return Sweep(f"Microseconds per example against the {quantity}", "cost", quantity, law, values, series)

    def _point(self, case: Case, quantity: str, setting: str, value: int, inference: bool) -> list[float]:
        """Seconds per example in training, and in inference if wanted."""
        images, classes = self.images, CLASSES
        if quantity.startswith("examples"):
            value = min(value, len(images.x))
            images = Images(images.x[:value], images.label[:value])
        elif quantity.startswith("labels"):
            classes = value
            images = Images(images.x, torch.arange(len(images.x)) % classes)
        if setting:
            case = dataclasses.replace(case, overrides=case.overrides | {setting: value})
        settings = case.settings(self.common)
        subject = Subject.build(settings, images, classes)
        costs = [step_seconds(subject, self.seconds) / settings.batch_size]
        if inference:
            rate = inference_rate(subject, settings.batch_size, self.seconds / 2, repeats=3)
            costs.append(1 / rate.highest)
        return costs

    def _memory(self, quantity: str, values: Sequence[int], cases: Sequence[Case]) -> Sweep:
        """Peaks in megabytes: of training beyond the data, or of what inference adds to the model and its data."""
        training = quantity.startswith("examples")
        kind = "training" if training else "inference"
        series = [
            Series(case.name, part, [], judged)
            for case in cases
            for part, judged in ([("training", True)] if training else [("before it", False), ("added by it", True)])
        ]
        each = len(series) // max(len(cases), 1)
        for value in values:
            for number, case in enumerate(cases):
                self.say(f"memory of {case.name} at {value:,} {quantity}")
                if not training:
                    case = dataclasses.replace(case, overrides=case.overrides | {"steps": value})
                found = peak(case, self.common, kind, value if training else 2 * INFERENCE_BATCH, self.path)
                added = found.highest - found.built
                costs = [found.highest - found.data] if training else [found.built, added]
                for row, cost in zip(series[number * each :], costs, strict=False):
                    row.costs.append(cost / _MEGABYTE)
        beyond = "beyond the data" if training else f"on {INFERENCE_BATCH:,} examples at once"
        title = f"Megabytes of memory at most, in {kind}, {beyond}, against the {quantity}"
        return Sweep(title, "memory", quantity, 1, values, series)


def _without_steps(case: Case) -> dict[str, Any]:
    return {name: value for name, value in case.overrides.items() if name != "steps"}


def _doubled(first: int, last: int) -> tuple[int, ...]:
    return tuple(first * 2**power for power in range(int(math.log2(last / first)) + 1))
