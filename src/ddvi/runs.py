"""One run: from settings to a run folder, and back from the folder to a model.

A folder is finished when it holds `metrics.json`, which is written last; every file is written aside and renamed, so
that a run may be killed at any moment. What decides whether a folder can be used needs no torch, and is asked first.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddvi.catalogue import DATASETS
from ddvi.errors import InputError, check_name
from ddvi.settings import FIELDS, FREE_ON_RESUME, Settings, convert, resolve

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import Tensor

    from ddvi.composition import Observations
    from ddvi.data import Dataset
    from ddvi.model import LatentVariableModel
    from ddvi.training import Listener, Trainer

CONFIG, CHECKPOINT, WEIGHTS = "config.yaml", "checkpoint.safetensors", "model.safetensors"
METRICS, HISTORY = "metrics.json", "history.csv"
FREE_ON_EVALUATION = {"evaluation", "device", "threads", "data_root"}
"""Settings that `evaluate_run` may change."""
_PACKAGES = ("ddvi", "torch", "numpy", "zuko", "lightning-fabric", "scikit-learn", "safetensors", "matplotlib")
_PRECISIONS = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed"}


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
    _make_writable(folder)
    ours = [name for name in (CONFIG, CHECKPOINT, WEIGHTS, METRICS, HISTORY) if (folder / name).exists()]
    if settings.overwrite:
        return Plan("train", f"starting anew over the run in {folder}" if ours else "")
    if not ours:
        return Plan("train", f"there is nothing to resume in {folder}: starting from the beginning" * settings.resume)
    stored = read_settings(folder)
    differing = [
        f"{name}={_text(getattr(stored, name))} there, {name}={_text(getattr(settings, name))} here"
        for name in FIELDS
        if name not in FREE_ON_RESUME and getattr(stored, name) != getattr(settings, name)
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise InputError(
            f"{folder} holds a run of another configuration ({'; '.join(differing[:3])}{more}): give another out, or"
            " overwrite=true to start anew"
        )
    if (folder / METRICS).exists():
        if settings.evaluation == "full" and read_metrics(folder).get("evaluation") == "quick":
            return Plan(
                "evaluate", f"the run in {folder} is finished, but its evaluation was quick: evaluating in full"
            )
        return Plan("show", f"the run in {folder} is finished, this is its table; overwrite=true trains anew")
    if not (folder / CHECKPOINT).exists():
        return Plan("train", f"the run in {folder} has saved nothing yet: starting from the beginning")
    if not settings.resume:
        raise InputError(f"{folder} holds an unfinished run: resume=true goes on with it, overwrite=true starts anew")
    return Plan("resume")


def train(settings: Settings, listener: Listener | None = None) -> dict[str, Any]:
    """Train, evaluate and fill the run folder, or do what is left of that.

    Args:
        settings: from `settings.resolve`.
        listener: who watches.

    Returns:
        What `metrics.json` holds.

    Raises:
        InputError: settings, data or folder can't be used; nothing has been trained by then.
        Interrupted: Ctrl-C in training; `resume=true` goes on.
        TrainingError: training had to stop, see `Trainer.fit`.
    """
    todo = plan(settings)
    say = listener.message if listener else _silent
    if todo.note:
        say(todo.note)
    if todo.action == "show":
        return read_metrics(settings.folder)
    if todo.action == "evaluate":
        changes = {name: getattr(settings, name) for name in FREE_ON_EVALUATION}
        return evaluate_run(settings.folder, changes, listener)
    with _alone(settings.folder), arithmetic(settings):
        return _train(settings, todo.action == "resume", listener)


def _train(settings: Settings, resume: bool, listener: Listener | None) -> dict[str, Any]:
    from ddvi import checkpoint, data
    from ddvi.composition import build_model, make_phases, observe
    from ddvi.randomness import seeded
    from ddvi.training import Schedule, Trainer

    folder, say = settings.folder, listener.message if listener else _silent
    fabric = make_fabric(settings)
    dataset = data.load(settings.dataset, settings.data_root or None, settings.seed, settings.limit or None)
    if resume:
        _check_same_data(folder, dataset)
    say(dataset.describe())
    observations = observe(dataset, settings)
    say(f"likelihood {observations.likelihood}: {observations.reason}")
    fitted = fit_to_size(settings, len(dataset.train_x))
    for name in ("validation", "batch_size"):
        if (value := getattr(fitted, name)) != getattr(settings, name):
            say(f"{name}={value}, for want of data")
    rows, held_out = data.split_validation(dataset, fitted.validation, settings.seed)
    train_x, validation_x = dataset.train_x[rows], dataset.train_x[held_out] if len(held_out) else None
    with seeded(settings.seed, "model"):
        model = build_model(settings, observations, train_x)
    schedule = Schedule(
        tuple(make_phases(settings)),
        fitted.batch_size,
        settings.lr,
        settings.schedule,
        settings.clip_norm,
        settings.seed,
    )
    watcher = _HistoryWriter(folder, listener)
    trainer = Trainer(model, schedule, train_x, validation_x, folder / CHECKPOINT, fabric, watcher)
    watcher.trainer = trainer
    if not resume:
        for name in (METRICS, WEIGHTS, CHECKPOINT, HISTORY):
            (folder / name).unlink(missing_ok=True)
        _write_config(settings, observations, dataset)
    facts = {"settings": {name: getattr(settings, name) for name in FIELDS if name not in FREE_ON_RESUME}}
    trainer.fit(resume=resume, facts=facts)
    watcher.write()
    checkpoint.save(folder / WEIGHTS, model.state_dict(), facts)
    return _evaluate(settings, observations, model, dataset, len(train_x), listener)


def evaluate_run(
    folder: Path, overrides: Mapping[str, Any] | None = None, listener: Listener | None = None
) -> dict[str, Any]:
    """Evaluate a trained run again: rewrites `metrics.json` and the pictures.

    Args:
        folder: a run folder with weights.
        overrides: any of `FREE_ON_EVALUATION`.
        listener: who watches.

    Returns:
        What `metrics.json` holds.

    Raises:
        InputError: the folder, an override or the data can't be used.
    """
    folder = Path(folder)
    given = {check_name("setting of an evaluation", name, sorted(FREE_ON_EVALUATION)) for name in overrides or {}}
    settings = read_settings(folder)
    settings = dataclasses.replace(settings, **{name: convert(name, (overrides or {})[name]) for name in given})
    _make_writable(folder)
    _check_trained(folder)
    with _alone(folder), arithmetic(settings):
        from ddvi import data

        fabric = make_fabric(settings)
        _, observations, model = load_run(folder)
        dataset = data.load(settings.dataset, settings.data_root or None, settings.seed, settings.limit or None)
        _check_same_data(folder, dataset)
        held_out = fit_to_size(settings, len(dataset.train_x)).validation
        model = fabric.to_device(model)
        return _evaluate(settings, observations, model, dataset, len(dataset.train_x) - held_out, listener)


def _evaluate(
    settings: Settings,
    observations: Observations,
    model: LatentVariableModel,
    dataset: Dataset,
    n_train: int,
    listener: Listener | None,
) -> dict[str, Any]:
    """Measures, pictures and `metrics.json` of a trained model; the last step of a run."""
    from ddvi import evaluation, figures

    folder, say = settings.folder, listener.message if listener else _silent
    model.eval()
    started = time.monotonic()
    report = (lambda what: say(f"evaluating: {what}")) if listener else None
    measures = evaluation.evaluate(
        model, dataset, quick=settings.evaluation == "quick", seed=settings.seed, report=report
    )
    seconds = time.monotonic() - started
    history = read_history(folder)
    figures.draw_all(folder, model, dataset, history, settings)
    rates = [float(row["examples_per_second"]) for row in history]
    metrics = measures | {
        "dataset": settings.dataset,
        "method": settings.method,
        "prior": settings.prior,
        "seed": settings.seed,
        "evaluation": settings.evaluation,
        "likelihood": observations.likelihood,
        "n_train": n_train,
        "n_validation": len(dataset.train_x) - n_train,
        "n_test": len(dataset.test_x),
        "epochs": len(history),
        "examples_per_second": statistics.median(rates) if rates else None,
        "seconds": {"training": sum(float(row["seconds"]) for row in history), "evaluation": seconds},
        "device": str(next(model.parameters()).device),
        "fingerprint": dataset.fingerprint,
        "versions": versions(),
    }
    metrics = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in metrics.items()}
    _write_text(folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    return metrics


def load_run(folder: Path) -> tuple[Settings, Observations, LatentVariableModel]:
    """Settings, observations and trained model (on the CPU, in evaluation mode) of a run folder; needs no data.

    A model of `precision=64` is to be used inside `arithmetic(settings)`.

    Raises:
        InputError: the folder holds no trained run, or a file in it is damaged.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    _check_trained(folder)
    from ddvi import checkpoint
    from ddvi.composition import Observations, build_model
    from ddvi.randomness import preserved

    try:
        stored = dict(_read_config(folder)["observations"])
        observations = Observations(**stored | {"event_shape": tuple(int(n) for n in stored["event_shape"])})
        with preserved(), arithmetic(settings):
            model = build_model(settings, observations)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, error) from None
    tensors, _ = checkpoint.load(folder / WEIGHTS)
    checkpoint.load_weights(model, tensors, folder / WEIGHTS)
    return settings, observations, model.eval()


def sample(folder: Path, count: int, seed: int = 0) -> dict[str, Tensor]:
    """Draws of a trained model: z from the prior (N, D), `mean` and `x` of p(x|z) (N, *event).

    Standardised data comes back in its own units, binarised and dequantised data in [0, 1].

    Raises:
        InputError: as `load_run`.
    """
    settings, _, model = load_run(folder)
    import torch

    from ddvi import figures
    from ddvi.preprocessing import Standardise
    from ddvi.randomness import seeded

    parts = []
    with arithmetic(settings), seeded(seed, "sample"), torch.no_grad():
        for z in model.prior.sample((count,)).split(1000):
            draws = {"x": model.likelihood(z).sample(), "mean": figures.means(model.likelihood, z)}
            if isinstance(prepare := model.preprocessing, Standardise):
                draws = {name: value * prepare.scale + prepare.mean for name, value in draws.items()}
            parts.append(draws | {"z": z})
    return {name: torch.cat([part[name] for part in parts]) for name in ("x", "mean", "z")}


@contextlib.contextmanager
def arithmetic(settings: Settings) -> Iterator[None]:
    """Run a block with the threads and the floating-point type of a run, and restore the caller's afterwards."""
    import torch

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(settings.threads or threads)
    torch.set_default_dtype(torch.float64 if settings.precision == "64" else torch.float32)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def make_fabric(settings: Settings) -> Fabric:
    """Device and precision of a run.

    Raises:
        InputError: the device isn't there, or can't have the precision.
    """
    import torch
    from lightning_fabric import Fabric

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if settings.precision == "64" and settings.device == "auto":
        available["mps"] = False
    device = next(name for name, there in available.items() if there) if settings.device == "auto" else settings.device
    if not available[device]:
        there = ", ".join(name for name, there in available.items() if there)
        raise InputError(f"device={device} is not available on this machine; choose from {there}, or leave it out")
    if device == "mps" and settings.precision == "64":
        raise InputError("device=mps has no precision=64; use device=cpu")
    return Fabric(accelerator=device, devices=1, precision=_PRECISIONS[settings.precision])  # type: ignore[arg-type]


def fit_to_size(settings: Settings, count: int) -> Settings:
    """Default `validation` and `batch_size` made to fit `count` training examples; what the user set stays."""
    named = settings.dataset if settings.dataset in DATASETS else "mnist"  # which has the general defaults
    default = resolve(named, settings.method, settings.prior, {"preset": settings.preset})
    changes: dict[str, int] = {}
    if settings.validation == default.validation and settings.validation > count // 10:
        changes["validation"] = count // 10
    left = count - changes.get("validation", settings.validation)
    if settings.batch_size == default.batch_size and settings.batch_size > left > 0:
        changes["batch_size"] = left
    return dataclasses.replace(settings, **changes)


def read_settings(folder: Path) -> Settings:
    """The settings in a run folder's `config.yaml`; `out` is the folder itself, wherever it is by now.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        stored = dict(_read_config(folder)["settings"])
        values: dict[str, Any] = {check_name("setting", name, FIELDS): convert(name, stored[name]) for name in stored}
        return Settings(**values | {"out": str(folder)})
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, error) from None


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
        raise InputError(f"{folder}/{METRICS} is damaged ({error}); ddvi evaluate {folder} writes it anew") from None


def read_history(folder: Path) -> list[dict[str, str]]:
    """The rows of `history.csv`, as text; none where there is no such file."""
    path = Path(folder) / HISTORY
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class _HistoryWriter:
    """Passes on what the trainer says, and keeps `history.csv` up to date."""

    trainer: Trainer

    def __init__(self, folder: Path, listener: Listener | None) -> None:
        self.path = folder / HISTORY
        self.listener = listener

    def step(self, epoch: int, step: int, steps: int) -> None:
        if self.listener:
            self.listener.step(epoch, step, steps)

    def epoch(self, row: dict[str, Any]) -> None:
        self.write()
        if self.listener:
            self.listener.epoch(row)

    def message(self, text: str) -> None:
        if self.listener:
            self.listener.message(text)

    def write(self) -> None:
        """Columns are the union over rows: the epoch, the terms as they appear, then what every row ends with."""
        rows = self.trainer.state.history
        last = ("validation_bound", "skipped", "examples_per_second", "seconds")
        names = list(dict.fromkeys(name for row in rows for name in row))
        names = [name for name in names if name not in last] + [name for name in last if name in names]

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="") as file:
                table = csv.DictWriter(file, names)
                table.writeheader()
                table.writerows(rows)

        from ddvi.checkpoint import write_aside

        write_aside(self.path, write)


def _silent(_: str) -> None:
    """Where nobody listens."""


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _write_text(path: Path, text: str) -> None:
    from ddvi.checkpoint import write_aside

    write_aside(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _write_config(settings: Settings, observations: Observations, dataset: Dataset) -> None:
    from omegaconf import OmegaConf

    stored = {
        "settings": settings.as_dict() | {"resume": False, "overwrite": False},
        "observations": observations.as_dict() | {"event_shape": list(observations.event_shape)},
        "fingerprint": dataset.fingerprint,
        "versions": versions(),
        "git_commit": _git_commit(),
    }
    _write_text(settings.folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(stored, flags={"allow_objects": False})))


def _read_config(folder: Path) -> dict[str, Any]:
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} is not the folder of a run: it holds no {CONFIG}")
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise _damaged(folder, error) from None
    if not isinstance(content, dict):
        raise _damaged(folder, "it holds no settings")
    return {str(name): value for name, value in content.items()}


def _damaged(folder: Path, error: object) -> InputError:
    if isinstance(error, InputError) and CONFIG in str(error):
        return error
    reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
    return InputError(
        f"{Path(folder) / CONFIG} is damaged ({reason}); restore it from a copy, or train anew with overwrite=true"
    )


def _check_trained(folder: Path) -> None:
    if not (Path(folder) / WEIGHTS).exists():
        raise InputError(f"the run in {folder} has no trained weights yet; resume=true goes on with it")


def _check_same_data(folder: Path, dataset: Dataset) -> None:
    """A resumed or evaluated run must see the files that it was trained on, where they are stored alike."""
    stored = _read_config(folder).get("fingerprint") or {}
    changed = [name for name, value in dataset.fingerprint.items() if stored.get(name, value) != value]
    if changed:
        raise InputError(
            f"{', '.join(changed)} is not the file that the run in {folder} was trained on (its SHA-256 differs); give"
            " the data_root of that one, or train anew in another folder"
        )


def _make_writable(folder: Path) -> None:
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"out={folder} can't be written ({error.strerror}); give another folder") from None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes; released by the system however this one ends."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise InputError(f"another process is at work in {folder}; wait for it, or give another out") from None


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
