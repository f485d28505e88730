"""Prints examples per second of every method, in training and in inference, at the settings of the paper's code.

python benchmarks/throughput.py [--methods vae ddvi] [--seconds 10] [--data-root FOLDER] [--json FILE]

Training is a `Trainer`'s own epoch, from the rows of its history: preprocessing, objective, gradients and optimiser, as
in a run. Inference is one draw from q(z|x) per example in evaluation mode. Both are the median over repeats after a
warm-up, with their range; ratios hold on one machine and when nothing else runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddvi import data, runs
from ddvi.arithmetic import arithmetic, processor
from ddvi.composition import Observations, build_model, make_objective
from ddvi.errors import InputError
from ddvi.methods import METHODS
from ddvi.model import LatentVariableModel
from ddvi.randomness import generator, seeded
from ddvi.settings import Settings, resolve
from ddvi.training import Phase, Schedule, Trainer

IMAGE, MAXIMUM = (1, 28, 28), 255.0
MOST_EXAMPLES = 60_000


@dataclass(frozen=True)
class Case:
    """A row of the table: what is trained, how."""

    method: str
    name: str
    overrides: dict[str, str]

    def settings(self, arguments: argparse.Namespace) -> Settings:
        common = {"hidden_size", "batch_size", "device", "threads", "data_root"}
        if self.method == "ddvi":
            common |= {"steps"}
        given = {name: value for name in common if (value := getattr(arguments, name)) is not None}
        return resolve("mnist", self.method, arguments.prior, self.overrides | given)


PAPER = {"preset": "paper"}
OURS = {"preset": "default"}
CASES = tuple(
    case
    for method in METHODS
    for case in (
        (Case(method, "ddvi, the paper's", PAPER), Case(method, "ddvi, ours", OURS))
        if method == "ddvi"
        else (Case(method, method, PAPER),)
    )
)


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
        return f"{self.median:>9,.0f} {f'({self.lowest:,.0f} to {self.highest:,.0f})':<22}"


def images(data_root: str | None) -> Tensor:
    """MNIST from `data_root`, or as many random black and white images of its shape, (N, 1, 28, 28) of bytes."""
    if data_root:
        return data.load("mnist", data_root).train_x
    return torch.randint(0, 2, (MOST_EXAMPLES, *IMAGE), dtype=torch.uint8, generator=generator(0, "images")) * 255


def training_rate(model: LatentVariableModel, settings: Settings, raw: Tensor, seconds: float, repeats: int) -> Rate:
    """Of `repeats` epochs of about `seconds` in all; an epoch is made as long as the machine needs."""

    def epochs(steps: int, count: int) -> list[float]:
        schedule = Schedule(
            (Phase(count, make_objective(settings)),),
            settings.batch_size,
            settings.lr,
            "constant",
            settings.clip_norm,
        )
        part = raw[: steps * settings.batch_size]
        history = Trainer(model, schedule, part, fabric=runs.make_fabric(settings)).fit()
        return [row["examples_per_second"] for row in history]

    _, warm = epochs(2, 2)
    steps = fitting(warm * seconds / repeats, settings.batch_size, len(raw))
    return Rate.of(epochs(steps, repeats + 1)[1:])


@torch.no_grad()
def inference_rate(model: LatentVariableModel, settings: Settings, raw: Tensor, seconds: float, repeats: int) -> Rate:
    """Of `repeats` passes of about `seconds` in all over raw images, one draw each, in training's batches."""
    model.eval()
    fabric = runs.make_fabric(settings)

    def one_pass(steps: int) -> float:
        part = fabric.to_device(raw[: steps * settings.batch_size])
        started = time.perf_counter()
        with fabric.autocast():
            drawn = [model.posterior(model.preprocessing(x)).draw().z for x in part.split(settings.batch_size)]
        torch.cat(drawn).cpu()  # waits for the device
        return len(part) / (time.perf_counter() - started)

    with seeded(0, "inference"):
        one_pass(2)
        steps = fitting(one_pass(2) * seconds / repeats, settings.batch_size, len(raw))
        one_pass(steps)
        return Rate.of([one_pass(steps) for _ in range(repeats)])


def fitting(examples: float, batch_size: int, available: int) -> int:
    """How many full batches make about `examples`."""
    return max(1, min(math.ceil(examples / batch_size), available // batch_size))


def measure(case: Case, arguments: argparse.Namespace, raw: Tensor) -> dict[str, Any]:
    """A row of the table."""
    settings = case.settings(arguments)
    observations = Observations(IMAGE, "bernoulli", "binarise", parts=10, maximum=MAXIMUM)
    with arithmetic(settings.precision, settings.threads) as path:
        with seeded(0, "model"):
            model = build_model(settings, observations)
        training = training_rate(model, settings, raw, arguments.seconds, arguments.repeats)
        inference = inference_rate(model, settings, raw, arguments.seconds, arguments.repeats)
    return {
        "name": case.name,
        "method": case.method,
        "objective": settings.objective,
        "training": dataclasses.asdict(training),
        "inference": dataclasses.asdict(inference),
        "matrix_products": path,
        "settings": settings.as_dict(),
    }


def machine(threads: int | None) -> dict[str, Any]:
    """What the rates belong to."""
    return {
        "torch": torch.__version__,
        "threads": threads or torch.get_num_threads(),
        "processor": processor(),
        "processors": os.cpu_count(),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--prior", default="pinwheel")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--hidden-size", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=40, help="T, of ddvi")
    parser.add_argument("--threads", type=int, help="torch's own choice by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement, about")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data-root", help="folder with MNIST; random images without")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print, a row at a time."""
    arguments = parse(argv)
    cases = [case for case in CASES if case.method in arguments.methods]
    for case in cases:
        case.settings(arguments)  # a wrong value is refused before anything is measured
    raw, where = images(arguments.data_root), machine(arguments.threads)
    what = "MNIST" if arguments.data_root else "random images"
    print(f"torch {where['torch']}, {where['threads']} threads, {where['processor']}, {arguments.device}")
    print(f"{what}, hidden size {arguments.hidden_size}, batch {arguments.batch_size}, T = {arguments.steps}\n")
    print(f"{'examples per second':<20}{'objective':<23}{'training':>9} {'':<22}{'inference':>9}")
    rows = []
    for case in cases:
        row = measure(case, arguments, raw)
        rates = "".join(str(Rate(**row[kind])) for kind in ("training", "inference"))
        print(f"{case.name:<20}{row['objective']:<23}{rates}".rstrip(), flush=True)
        rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": where, "data": what, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"throughput: {error}")
