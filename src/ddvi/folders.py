"""The run folder: its files, what may be done with it, and reading it back; torch-free.

A folder is finished when it holds `metrics.json`, which is written last; every file is written aside and renamed, so
that a run may be killed at any moment. What decides whether a folder can be used is asked before any work starts.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddvi.errors import InputError, check_name
from ddvi.files import write_aside
from ddvi.settings import FIELDS, FREE_ON_RESUME, Settings, as_text, convert

CONFIG, CHECKPOINT, WEIGHTS = "config.yaml", "checkpoint.safetensors", "model.safetensors"
METRICS, HISTORY, REPORT = "metrics.json", "history.csv", "report.html"
_PACKAGES = ("ddvi", "torch", "numpy", "zuko", "lightning-fabric", "scikit-learn", "safetensors", "matplotlib")


@dataclass(frozen=True)
class Plan:
    """What is to be done with a run's folder, see `plan`."""

    action: str
    """"train", "resume", "evaluate" or "show"."""
    note: str = ""
    """What the user should know of it; may be empty."""


def plan(settings: Settings) -> Plan:
    """Look at the run folder, make it if need be, and say what is to be done. Imports no torch.

    Raises:
        InputError: the folder can't be written, holds another configuration or an unfinished run that isn't resumed,
            or its `config.yaml` is damaged.
    """
    folder = settings.folder
    make_writable(folder)
    if settings.overwrite:
        return Plan("train", "")
    if not any((folder / name).exists() for name in (CONFIG, CHECKPOINT, WEIGHTS, METRICS, HISTORY)):
        return Plan("train", f"there is nothing to resume in {folder}: starting from the beginning" * settings.resume)
    stored = read_settings(folder)
    differing = [
        f"{name}={as_text(getattr(stored, name))} there, {name}={as_text(getattr(settings, name))} here"
        for name in FIELDS
        if name not in FREE_ON_RESUME and getattr(stored, name) != getattr(settings, name)
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise InputError(
            f"{folder} holds a run of another configuration ({'; '.join(differing[:3])}{more}): give another out, or"
            " overwrite=true to start anew"
        )
    if (folder / METRICS).exists() and ((folder / WEIGHTS).exists() or not (folder / CHECKPOINT).exists()):
        try:
            quick = read_metrics(folder).get("evaluation") == "quick"
        except InputError:
            return Plan("evaluate", f"the run in {folder} is finished, but {METRICS} is damaged: evaluating again")
        if quick and settings.evaluation == "full":
            return Plan(
                "evaluate", f"the run in {folder} is finished, but its evaluation was quick: evaluating in full"
            )
        return Plan("show", f"the run in {folder} is finished, this is its table; overwrite=true trains anew")
    if not (folder / CHECKPOINT).exists():
        return Plan("train", f"the run in {folder} has saved nothing yet: starting from the beginning")
    if not settings.resume:
        raise InputError(f"{folder} holds an unfinished run: resume=true goes on with it, overwrite=true starts anew")
    return Plan("resume")


def read_settings(folder: Path) -> Settings:
    """The settings in a run folder's `config.yaml`; `out` is the folder itself, wherever it is by now.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        stored = dict(read_config(folder)["settings"])
        values: dict[str, Any] = {check_name("setting", name, FIELDS): convert(name, stored[name]) for name in stored}
        values["out"] = str(folder)
        return Settings(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder, error) from None


def read_metrics(folder: Path) -> dict[str, Any]:
    """What `metrics.json` of a run folder holds.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        metrics = json.loads((Path(folder) / METRICS).read_text())
        return dict(metrics)
    except FileNotFoundError:
        raise InputError(f"the run in {folder} is not finished; resume=true goes on with it") from None
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{folder}/{METRICS} is damaged ({error}); {_evaluate(folder)} writes it anew") from None


def _evaluate(folder: Path) -> str:
    return shlex.join(["ddvi", "evaluate", str(folder)])


def read_history(folder: Path) -> list[dict[str, str]]:
    """The rows of `history.csv`, as text; none where there is no such file."""
    path = Path(folder) / HISTORY
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"{path} is damaged ({error}); take metrics.json away, and resume=true writes both anew"
        ) from None


_BESIDE = ("skipped", "examples_per_second", "seconds")


def terms(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What of a history's rows is of the objective: all but what counts and times."""
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("epoch", *_BESIDE)]


def write_history(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `history.csv`: the epoch, the terms as they appear, then what every row ends with."""
    last = ("validation_bound", *_BESIDE)
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if name not in last] + [name for name in last if name in names]

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            table = csv.DictWriter(file, names)
            table.writeheader()
            table.writerows(rows)

    write_aside(folder / HISTORY, write)


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write `metrics.json`, which says that the run is finished."""
    _write_text(folder / METRICS, json.dumps(metrics, indent=2) + "\n")


def write_config(
    settings: Settings, observations: Mapping[str, Any], fingerprint: Mapping[str, str], matrix_products: str
) -> None:
    """Write `config.yaml`: settings, what the model knows of its data, the data's files, versions and commit."""
    from omegaconf import OmegaConf

    stored = {
        "settings": settings.as_dict() | {"resume": False, "overwrite": False},
        "observations": dict(observations),
        "fingerprint": dict(fingerprint),
        "matrix_products": matrix_products,
        "versions": versions(),
        "git_commit": _git_commit(),
    }
    _write_text(settings.folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(stored, flags={"allow_objects": False})))


def read_config(folder: Path) -> dict[str, Any]:
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} is not the folder of a run: it holds no {CONFIG}")
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise damaged(folder, error) from None
    if not isinstance(content, dict):
        raise damaged(folder, "it holds no settings")
    return {str(name): value for name, value in content.items()}


def damaged(folder: Path, error: object) -> InputError:
    if isinstance(error, InputError) and CONFIG in str(error):
        return error
    reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
    return InputError(
        f"{Path(folder) / CONFIG} is damaged ({reason}); restore it from a copy, or train anew with overwrite=true"
    )


def check_trained(folder: Path) -> None:
    if not (Path(folder) / WEIGHTS).exists():
        raise InputError(f"the run in {folder} holds no {WEIGHTS}; resume=true goes on with it")


def check_same_data(folder: Path, fingerprint: Mapping[str, str]) -> None:
    """A resumed or evaluated run must see the files that it was trained on, where they are stored alike."""
    stored = read_config(folder).get("fingerprint") or {}
    changed = [name for name, value in fingerprint.items() if stored.get(name, value) != value]
    if changed:
        raise InputError(
            f"{', '.join(changed)} is not the file that the run in {folder} was trained on (its SHA-256 differs); give"
            " the data_root of that one, or train anew in another folder"
        )


def make_writable(folder: Path) -> None:
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # processes of one number on several machines share it
    except OSError as error:
        raise InputError(f"out={folder} can't be written ({error.strerror}); give another folder") from None


@contextlib.contextmanager
def alone(folder: Path, patience: float = 0) -> Iterator[None]:
    """Hold the folder against other processes; released by the system however this one ends.

    Args:
        folder: a run folder.
        patience: seconds to wait for another process to leave it.
    """
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / ".lock", timeout=patience):
            yield
    except Timeout:
        raise InputError(f"another process is at work in {folder}; wait for it, or give another out") from None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _write_text(path: Path, text: str) -> None:
    write_aside(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _git_commit() -> str | None:
    """The commit of the source, where this is a checkout; with a + behind it where files have changed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
