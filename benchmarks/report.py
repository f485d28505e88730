"""What has been measured, as tables for a terminal and as plain values."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from floor import Floor, Machine, Work
from launches import Launches
from rates import Case, Rate
from rich import box
from rich.console import Console
from rich.table import Table

from ddvi.settings import SEMI, Settings, resolve

WIDTH = 120
"""Columns where the output is no terminal."""
PAPERS_CODE = {
    "vae": (945, 9_960),
    "iaf_vae": (839, 10_300),
    "h_iaf_vae": (889, 8_820),
    "aae": (2_000, 13_900),
    "ddvi, the paper's": (505, 4_800),
}
"""Examples per second of the paper's code in training and in inference, see `PAPERS_MACHINE`."""
PAPERS_MACHINE = "the paper's code, on another machine: 2 AVX-512 cores, MNIST, its own settings"


@dataclass(frozen=True)
class Sheet:
    """A table: words on the left, numbers on the right, and a line or two below it.

    Args:
        title: what its numbers are, with their unit.
        header: of the columns.
        rows: a cell for each column.
        note: below it.
        words: how many columns on the left hold words.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: int = 1

    def show(self, console: Console) -> None:
        """Print it."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, name in enumerate(self.header):
            left = number < self.words
            table.add_column(name, justify="left" if left else "right", vertical="bottom", no_wrap=left)
        for row in self.rows:
            table.add_row(*row)
        console.print()
        console.print(self.title, style="bold", soft_wrap=True)
        console.print(table)
        if self.note:
            console.print(self.note, style="dim", soft_wrap=True)


def console(*, errors: bool = False) -> Console:
    """Standard output, or where errors go."""
    stream = sys.stderr if errors else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDTH, highlight=False, emoji=False, markup=False)


@dataclass(frozen=True)
class Measured:
    """A rate, the work that it is of, and the least time of that work."""

    rate: Rate
    work: Work
    machine: Machine

    @property
    def floor(self) -> Floor:
        return self.machine.floor(self.work)

    @property
    def reached(self) -> float:
        """The share of the floor, 0 … 1."""
        return self.rate.median / self.floor.rate

    def as_dict(self) -> dict[str, Any]:
        seconds = self.machine.product_seconds
        products = [
            {"product": str(product), "count": count, "flops": product.flops, "seconds": seconds(product)}
            for product, count in self.work.products.items()
        ]
        rates = dataclasses.asdict(self.rate)
        return rates | {"floor": self.floor.as_dict(), "reached": self.reached, "products": products}


@dataclass(frozen=True)
class Row:
    """All of one case."""

    case: Case
    settings: Settings
    training: Measured
    inference: Measured
    """In batches of training's size."""
    inference_large: Measured
    """In batches of `INFERENCE_BATCH`."""
    launches: Launches | None = None
    """On a GPU."""

    def as_dict(self) -> dict[str, Any]:
        kinds = ("training", "inference", "inference_large")
        measured: dict[str, Any] = {kind: getattr(self, kind).as_dict() for kind in kinds}
        facts: dict[str, Any] = {"name": self.case.name, "method": self.case.method}
        facts |= {"objective": self.settings.objective} | measured
        if self.launches is not None:
            facts["launches"] = dataclasses.asdict(self.launches)
        return facts | {"settings": self.settings.as_dict()}


def semi_costs(rows: Sequence[Row]) -> dict[str, float]:
    """By name, how many times as long a semi-supervised step takes as the same without labels, where both are there."""
    rates = {row.case.name: row.training.rate.median for row in rows}
    named = ((row.case.name, row.case.name.replace(SEMI, "")) for row in rows if row.case.semi)
    return {name: rates[single] / rates[name] for name, single in named if single in rates}


def training_sheet(rows: Sequence[Row]) -> Sheet:
    costs = semi_costs(rows)
    cells = [
        (
            row.case.name,
            row.settings.objective,
            str(row.training.rate),
            f"{row.training.floor.rate:,.0f}",
            f"{row.training.reached:.0%}",
            _of_the_paper(row, 0),
            f"× {costs[row.case.name]:.1f}" if row.case.name in costs else "",
        )
        for row in rows
    ]
    header = ("method", "objective", "measured", "floor", "reached", "paper*", "semi†")
    note = f"* {PAPERS_MACHINE}."
    if any(row.case.semi for row in rows):
        note += (
            "\n† Time of a semi-supervised step over one without labels: as many labelled examples beside the batch,"
        )
        note += "\n  which aren't counted as examples, and a sum over the classes of every other one."
    return Sheet("Training, examples per second: median (range)", header, cells, note, words=2)


def floor_sheet(rows: Sequence[Row]) -> Sheet:
    cells = []
    for row in rows:
        floor, examples = row.training.floor, row.training.floor.examples
        micro = 1e6 / examples
        cells.append(
            (
                row.case.name,
                f"{floor.flops / examples / 1e6:,.1f}",
                f"{floor.flops / floor.product_seconds / 1e9:,.0f}",
                f"{floor.product_seconds * micro:,.1f}",
                f"{floor.optimiser_bytes / 1e6:,.0f}",
                f"{floor.bandwidth / 1e9:,.0f}",
                f"{floor.optimiser_seconds * micro:,.1f}",
                f"{floor.seconds_per_example * 1e6:,.1f}",
                f"{1e6 / row.training.rate.median:,.1f}",
            )
        )
    header = ("method", "MFLOP", "GFLOP/s", "products, µs", "MB/step", "GB/s", "Adam, µs", "floor, µs", "measured, µs")
    note = "Matrix products at the best rate of their shapes, and the bytes that Adam moves at the bandwidth of memory."
    return Sheet("What an example costs in training, at least", header, cells, note)


def launches_sheet(rows: Sequence[Row]) -> Sheet:
    """On a GPU, what a step of training waits for."""
    milli = 1e3
    cells = [
        (
            row.case.name,
            f"{known.one_by_one * milli:.2f}",
            f"{known.recorded * milli:.2f}",
            f"{known.kernels:,.0f}",
            f"{known.busy * milli:.2f}",
            f"{row.training.floor.product_seconds * milli:.2f}",
            f"{row.training.floor.optimiser_seconds * milli:.2f}",
        )
        for row in rows
        if (known := row.launches) is not None
    ]
    header = ("method", "one by one", "recorded", "kernels", "they take", "products", "Adam")
    note = (
        "Kernels launched one by one, or as one recording; how many there are, what they take, and of that\n"
        "what matrix products and Adam would take at best. The rest is kernels that have less to do than to begin."
    )
    return Sheet("What a step of training waits for, milliseconds", header, cells, note)


def inference_sheet(rows: Sequence[Row]) -> Sheet:
    cells = [
        (
            row.case.name,
            f"{row.inference.floor.flops / row.inference.floor.examples / 1e6:,.1f}",
            str(row.inference.rate),
            f"{row.inference.reached:.0%}",
            str(row.inference_large.rate),
            f"{row.inference_large.reached:.0%}",
            _of_the_paper(row, 1),
        )
        for row in rows
    ]
    small, large = rows[0].inference.floor.examples, rows[0].inference_large.floor.examples
    header = ("method", "MFLOP", f"batch {small:,}", "of floor", f"batch {large:,}", "of floor", "paper*")
    return Sheet("Inference, examples per second: median (range)", header, cells, f"* {PAPERS_MACHINE}.")


def pythae_sheet(found: Sequence[dict[str, Any]], prior: str) -> Sheet:
    cells = [
        (
            row["name"],
            row["pythae"],
            str(Rate(**row["theirs"])),
            str(Rate(**row["ours"])),
            f"× {row['ratio']:.2f}",
        )
        for row in found
    ]
    header = ("method", "pythae's", "pythae", f"ddvi, {prior}", "ddvi / pythae")
    version = f"pythae {found[0]['version']} with torch {found[0]['torch']}"
    note = f"{version}: same encoder, decoder, batch, threads and path of matrix products; its prior is the Gaussian."
    return Sheet("Training beside pythae, examples per second: median (range)", header, cells, note, words=2)


def _of_the_paper(row: Row, which: int) -> str:
    known, paper = (
        PAPERS_CODE.get(row.case.name),
        resolve("mnist", row.settings.method, "pinwheel", {"preset": "paper"}),
    )
    same = all(getattr(row.settings, name) == getattr(paper, name) for name in ("hidden_size", "batch_size", "steps"))
    return f"{known[which]:,}" if known and same else ""
