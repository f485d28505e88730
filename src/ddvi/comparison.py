"""Finished runs side by side: what each is called, which is best in what, what keeps them from being compared.

Torch-free, so that `ddvi compare` answers at once.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddvi import folders
from ddvi.catalogue import DATASETS, MEASURES, QUICK_SAYS
from ddvi.errors import InputError
from ddvi.settings import FIELDS, Settings, as_text, deviations

TRAINING = "training_seconds"
"""What a run's training took, which is no measure."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    settings: Settings
    metrics: Mapping[str, Any]
    commit: str

    @property
    def row(self) -> tuple[str, ...]:
        """Method and deviations, which decide the row that it belongs to."""
        return (self.settings.full_method, *(f"{name}={value}" for name, value in deviations(self.settings).items()))

    @property
    def place(self) -> tuple[str, str]:
        """Data set and prior, which decide the table."""
        return self.settings.full_dataset, self.settings.prior

    def values(self) -> dict[str, float]:
        """Its measures, and the seconds of its training."""
        found = {name: self.metrics.get(name) for name in MEASURES}
        found[TRAINING] = self.metrics.get("seconds", {}).get("training")
        return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def read(paths: Sequence[Path]) -> list[Run]:
    """The runs of folders, in the order given.

    Raises:
        InputError: a folder isn't there, is named twice or holds no finished run.
    """
    runs: list[Run] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"there is no run folder '{path}'; 'ddvi train' prints where it puts one")
        if any(path.samefile(run.folder) for run in runs):
            raise InputError(f"'{path}' is named twice; name each run once")
        runs.append(run_of(path))
    return runs


def run_of(path: Path) -> Run:
    """The finished run of a folder."""
    commit = str(folders.read_config(path).get("git_commit") or "unknown")
    return Run(path, folders.read_settings(path), folders.read_metrics(path), commit)


def common_folder(paths: Sequence[Path]) -> Path:
    """The run's folder, or the one that holds all of several."""
    if len(paths) == 1:
        return Path(paths[0])
    try:
        return Path(os.path.commonpath([Path(path).absolute().parent for path in paths]))
    except ValueError:  # on different drives
        return Path()


def names(runs: Sequence[Run]) -> list[str]:
    """What tells each run from the others: its method, and what else differs."""
    described = [
        (run.row[0], run.place[0], run.place[1], *run.row[1:], f"seed={run.settings.seed}", str(run.folder))
        for run in runs
    ]
    shared = set.intersection(*map(set, described))
    kept = [[parts[0], *(part for part in parts[1:-1] if part not in shared)] for parts in described]
    found = [" ".join(parts) for parts in kept]
    return [
        f"{name} in {parts[-1]}" if found.count(name) > 1 else name
        for name, parts in zip(found, described, strict=True)
    ]


def best(runs: Sequence[Run]) -> dict[str, set[int]]:
    """By measure, which runs have its best value; nothing where they can't be compared, or only one has it."""
    if len(runs) < 2 or not comparable(runs):
        return {}
    found: dict[str, set[int]] = {}
    values = [run.values() for run in runs]
    for name, (_, better) in MEASURES.items():
        there = {number: each[name] for number, each in enumerate(values) if name in each}
        if len(there) > 1 and len(set(there.values())) > 1:
            top = (max if better == "higher" else min)(there.values())
            found[name] = {number for number, value in there.items() if value == top}
    return found


def comparable(runs: Sequence[Run]) -> bool:
    """Whether all have been measured on the same data with the same effort."""
    return len({_data(run) for run in runs}) == 1 and len({run.metrics.get("evaluation") for run in runs}) == 1


def _data(run: Run) -> tuple[object, ...]:
    fingerprint = run.metrics.get("fingerprint") or {}
    told = (run.metrics.get(name) for name in ("n_test", "measured_on", "test_seed", "likelihood"))
    return (*sorted(fingerprint.values()), *told)


def differences(runs: Sequence[Run]) -> list[str]:
    """Why runs can't be compared, where they can't."""
    said = []
    if len({_data(run) for run in runs}) > 1:
        said.append("the runs have different data or likelihoods: their values can't be compared")
    if len({run.metrics.get("evaluation") for run in runs}) > 1:
        said.append("some were evaluated with evaluation=quick, some in full: their values can't be compared")
    return said


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader of the table must know."""
    said = differences(runs)
    if {run.metrics.get("evaluation") for run in runs} == {"quick"}:
        said.append(QUICK_SAYS)
    if len(runs) > 1 and comparable(runs):
        said.append(
            "one run each: whether a method is better than another takes several seeds, as 'ddvi study' runs them"
        )
    return said


def command(run: Run) -> str:
    """What reproduces a run."""
    settings = run.settings
    dataset = settings.full_dataset if settings.dataset in DATASETS else settings.dataset
    given = deviations(settings) | {"seed": as_text(settings.seed)}
    if settings.evaluation != FIELDS["evaluation"].default:
        given["evaluation"] = as_text(settings.evaluation)
    words = [dataset, settings.full_method, settings.prior, *(f"{name}={value}" for name, value in given.items())]
    return shlex.join(["ddvi", "train", *words])
