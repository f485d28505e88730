"""What the terminal shows: the live line of a training, the bar of other work, the closing table."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from ddvi.catalogue import MEASURES, QUICK_SAYS
from ddvi.folders import REPORT, terms
from ddvi.settings import Settings

_WIDTH_OF_FILES = 160


def console() -> Console:
    """Of standard output; text is shown as it is, and for a file or a pipe without breaking lines early."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_FILES
    return Console(highlight=False, markup=False, width=width)


class Watcher:
    """Shows a training: one live line on a terminal, else a plain line for about every tenth of the epochs."""

    def __init__(self, console: Console, settings: Settings) -> None:
        self.console = console
        self.total: int = settings.epochs
        self.place: str = "before training"
        self.progress: Progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=12),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[losses]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=console,
            transient=True,
            expand=True,
            disable=not console.is_terminal,
        )
        fields = {"epoch": 0, "epochs": self.total, "rate": "", "losses": ""}
        self.task: TaskID = self.progress.add_task("", total=None, start=False, **fields)
        self.first: bool = True

    def __enter__(self) -> Watcher:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, epoch: int, step: int, steps: int) -> None:
        """A step of an epoch (from 0) is over; see `training.Listener`."""
        self.place = f"at epoch {epoch + 1} of {self.total}"
        done = epoch * steps + step
        if self.first:
            self.first = False
            self.progress.update(self.task, total=self.total * steps, completed=done)
            self.progress.start_task(self.task)
        self.progress.update(self.task, completed=done, epoch=epoch + 1)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is over."""
        losses = " ".join(f"{_short(name)} {row[name]:.2f}" for name in terms([row]))
        rate = f"{row['examples_per_second']:,.0f}/s"
        self.progress.update(self.task, losses=losses, rate=rate)
        epoch = int(row["epoch"])
        tenth = epoch * 10 // self.total > (epoch - 1) * 10 // self.total
        if not self.console.is_terminal and (tenth or epoch == 1):
            self.console.print(f"epoch {epoch}/{self.total}  {rate}  {losses}", soft_wrap=True)

    def message(self, text: str) -> None:
        """Something that the user should know."""
        evaluating = text.startswith("evaluating")
        if evaluating:
            self.place = "while evaluating"
            self.progress.update(self.task, losses=text)
        if not (evaluating and self.console.is_terminal):
            self.console.print(text, soft_wrap=True)


class Counter:
    """A bar that counts; nothing where there is no terminal."""

    def __init__(self, console: Console, unit: str) -> None:
        count = TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit)
        options: dict[str, Any] = {"console": console, "transient": True, "disable": not console.is_terminal}
        self.progress: Progress = Progress(count, BarColumn(bar_width=24), TimeRemainingColumn(compact=True), **options)
        self.task: TaskID = self.progress.add_task("", total=1)

    def __enter__(self) -> Counter:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, done: int, total: int) -> None:
        self.progress.update(self.task, completed=done, total=total)


def _short(name: str) -> str:
    """A term's name for the live line."""
    return "valid." if name == "validation_bound" else name if len(name) < 8 else f"{name[:5]}."


def print_metrics(console: Console, metrics: Mapping[str, Any], folder: Path) -> None:
    """The closing table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("measure", style="cyan", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("± s.e.", justify="right", no_wrap=True)
    table.add_column("better", no_wrap=True)
    table.add_column("meaning")
    for name, (meaning, better) in MEASURES.items():
        if isinstance(value := metrics.get(name), int | float):
            error = metrics.get(f"{name}_standard_error")
            table.add_row(name, f"{value:.3f}", "" if error is None else f"{error:.3f}", better, meaning)
    console.print(table)
    if metrics.get("evaluation") == "quick":
        console.print(QUICK_SAYS)
    console.print(f"run folder: {folder}", soft_wrap=True)
    if (folder / REPORT).exists():
        console.print(f"report: {folder / REPORT}", soft_wrap=True)
