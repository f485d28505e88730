"""One run: from settings to a filled run folder, and from the folder back to a model."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddvi import folders, loggers
from ddvi.catalogue import DATASETS
from ddvi.devices import choose_device, is_first, launched, make_fabric, part_ways
from ddvi.errors import check_name
from ddvi.files import check_file
from ddvi.folders import CHECKPOINT, HISTORY, METRICS, REPORT, WEIGHTS
from ddvi.settings import FIELDS, FREE_ON_RESUME, SEMI, Settings, convert, resolve

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.logger import Logger
    from torch import Tensor

    from ddvi.composition import Observations
    from ddvi.data import Dataset
    from ddvi.model import LatentVariableModel
    from ddvi.objectives.base import Labelled
    from ddvi.training import Listener, Trainer

    Loaded = dict[tuple[Any, ...], Dataset]
    """Data sets by where they come from."""

FREE_ON_EVALUATION = {"evaluation", "device", "threads", "data_root", "report"}
"""Settings that `evaluate_run` may change."""


def train(settings: Settings, listener: Listener | None = None) -> dict[str, Any]:
    """Train, evaluate and fill the run folder, or do what is left of that.

    Args:
        settings: from `settings.resolve`.
        listener: who watches.

    Returns:
        What `metrics.json` holds; nothing in a process that isn't the first of several, which has no listener either.

    Raises:
        InputError: settings, data or folder can't be used; nothing has been trained by then.
        Interrupted: Ctrl-C in training; `resume=true` goes on.
        TrainingError: training had to stop, see `Trainer.fit`.
    """
    loggers.check(settings)
    todo = folders.plan(settings)
    first = is_first(settings)
    listener = listener if first else None
    if todo.note and listener:
        listener.message(todo.note)
    if todo.action == "show":
        return folders.read_metrics(settings.folder)
    if todo.action == "evaluate":
        changes = {name: getattr(settings, name) for name in FREE_ON_EVALUATION}
        return evaluate_run(settings.folder, changes, listener) if first else {}
    # The first process takes the folder before others are started. They plan before they join it, and it writes after.
    alone = folders.alone(settings.folder) if first else nullcontext()
    watched = loggers.opened(settings) if first else nullcontext()
    with alone, launched(settings) as fabric, arithmetic(settings) as path, watched as logger:
        return _train(settings, todo.action == "resume", path, fabric, listener, logger)


def _train(
    settings: Settings,
    resume: bool,
    matrix_products: str,
    fabric: Fabric,
    listener: Listener | None,
    logger: Logger | None,
) -> dict[str, Any]:
    import torch

    from ddvi import checkpoint, data
    from ddvi.composition import build_model, make_schedule, observe
    from ddvi.randomness import seeded
    from ddvi.training import Trainer

    folder, say = settings.folder, listener.message if listener else _silent
    if settings.decoder:
        folders.check_trained(Path(settings.decoder))
    if fabric.world_size > 1:  # each has measured which path is the fastest, and all must take the same
        matrix_products = fabric.broadcast(matrix_products)
        torch.set_float32_matmul_precision(matrix_products)
        say(f"{fabric.world_size} processes share each batch")
    dataset = data.load(settings.dataset, settings.data_root or None, settings.seed, settings.limit or None)
    if resume:
        folders.check_same_data(folder, dataset.fingerprint)
    say(dataset.describe())
    observations = observe(dataset, settings)
    if observations.preprocessing == "standardise":
        data.check_varied(dataset)
    say(f"likelihood {observations.likelihood}: {observations.reason}")
    fitted = fit_to_size(settings, len(dataset.train_x))
    for name in ("validation", "batch_size"):
        if (value := getattr(fitted, name)) != getattr(settings, name):
            say(f"{name}={value}, for want of data")
    rows, held_out = data.split_validation(dataset, fitted.validation, settings.seed)
    train_x, validation_x = dataset.train_x[rows], dataset.train_x[held_out] if len(held_out) else None
    labelled = None
    if settings.semi_supervised:
        labelled = _labelled(dataset, rows, settings)
        say(f"{len(labelled.label)} labels are seen")
    with seeded(settings.seed, "model"):
        model = build_model(settings, observations, train_x)
    if settings.decoder:
        _take_decoder(model, Path(settings.decoder))
    watcher = _HistoryWriter(folder, listener, logger)
    schedule = make_schedule(fitted)
    trainer = Trainer(
        *(model, schedule, train_x, validation_x, folder / CHECKPOINT, fabric, watcher, labelled),
        graphs=settings.graphs,
        compiles=settings.compile,
    )
    watcher.trainer = trainer
    if not resume and fabric.is_global_zero:
        old = [folder / name for name in (METRICS, WEIGHTS, CHECKPOINT, HISTORY, REPORT) if (folder / name).exists()]
        if old:
            say(f"starting anew over the run in {folder}")
        for path in old:
            path.unlink()
        folders.write_config(settings, observations.as_dict(), dataset.fingerprint, matrix_products)
    decisive = {name: getattr(settings, name) for name in FIELDS if name not in FREE_ON_RESUME}
    facts: dict[str, Any] = {"settings": decisive, "classes": list(dataset.classes)}
    trainer.fit(resume=resume, facts=facts)
    part_ways(fabric)
    if not fabric.is_global_zero:
        return {}
    folders.write_history(folder, trainer.state.history)
    checkpoint.save(folder / WEIGHTS, model.state_dict(), facts)
    metrics = _evaluate(settings, observations, model, dataset, fitted.validation, listener)
    loggers.log(logger, metrics, "measures", trainer.state.epoch)
    return metrics


def _take_decoder(model: LatentVariableModel, folder: Path) -> None:
    """Likelihood and preprocessing of another run, as they were learnt there.

    Raises:
        InputError: that run's decoder has another form.
    """
    from ddvi import checkpoint

    tensors, _ = checkpoint.load(folder / WEIGHTS)
    for child in ("likelihood", "preprocessing"):
        own = {name.removeprefix(f"{child}."): v for name, v in tensors.items() if name.startswith(f"{child}.")}
        checkpoint.load_weights(model.get_submodule(child), own, folder / WEIGHTS)


def _labelled(dataset: Dataset, rows: Tensor, settings: Settings) -> Labelled:
    """The labelled examples that a semi-supervised run sees, of the training rows."""
    import torch

    from ddvi.labels import choose_labelled
    from ddvi.objectives.base import Labelled

    labels = dataset.train_y[rows] if dataset.train_y is not None else torch.full((len(rows),), -1)
    shown = choose_labelled(labels, settings.n_labels, len(dataset.classes), settings.seed)
    return Labelled(dataset.train_x[rows][shown], labels[shown])


def evaluate_run(
    folder: Path, overrides: Mapping[str, Any] | None = None, listener: Listener | None = None
) -> dict[str, Any]:
    """Evaluate a trained run again: rewrites `metrics.json`, the pictures and the report.

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
    settings = folders.read_settings(folder)
    settings = dataclasses.replace(settings, **{name: convert(name, (overrides or {})[name]) for name in given})
    folders.make_writable(folder)
    folders.check_trained(folder)
    with folders.alone(folder), arithmetic(settings):
        from ddvi import data

        fabric = make_fabric(settings)
        _, observations, model = load_run(folder)
        dataset = data.load(settings.dataset, settings.data_root or None, settings.seed, settings.limit or None)
        folders.check_same_data(folder, dataset.fingerprint)
        held_out = fit_to_size(settings, len(dataset.train_x)).validation
        fabric.to_device(model)
        return _evaluate(settings, observations, model, dataset, held_out, listener)


def _evaluate(
    settings: Settings,
    observations: Observations,
    model: LatentVariableModel,
    dataset: Dataset,
    n_validation: int,
    listener: Listener | None,
) -> dict[str, Any]:
    """Measures, pictures, `metrics.json` and the report of a trained model; the last step of a run."""
    import torch

    from ddvi import evaluation, figures
    from ddvi.arithmetic import processor

    folder, say = settings.folder, listener.message if listener else _silent
    sizes = {
        "n_train": len(dataset.train_x) - n_validation,
        "n_validation": n_validation,
        "n_test": len(dataset.test_x),
    }
    dataset = measured(settings, dataset)
    model.eval()
    if next(model.parameters()).device.type == "mps":
        model.to("cpu")  # the measures need double precision
    started = time.monotonic()
    tell = (lambda what: say(f"evaluating: {what}")) if listener else None
    measures = evaluation.evaluate(
        model,
        dataset,
        quick=settings.evaluation == "quick",
        seed=settings.seed,
        semi_supervised=settings.semi_supervised,
        report=tell,
    )
    seconds = time.monotonic() - started
    history = folders.read_history(folder)
    figures.draw_all(folder, model, dataset, history, settings)
    rates = [float(row["examples_per_second"]) for row in history]
    metrics = measures | {
        "dataset": settings.dataset,
        "method": settings.method,
        "prior": settings.prior,
        "seed": settings.seed,
        "evaluation": settings.evaluation,
        "measured_on": settings.measured_on,
        "test_seed": settings.seed if dataset.drawn else None,
        "likelihood": observations.likelihood,
        **sizes,
        "epochs": len(history),
        "examples_per_second": statistics.median(rates) if rates else None,
        "seconds": {"training": sum(float(row["seconds"]) for row in history), "evaluation": seconds},
        "device": str(next(model.parameters()).device),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "fingerprint": dataset.fingerprint,
        "versions": folders.versions(),
    }
    metrics = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in metrics.items()}
    folders.write_metrics(folder, metrics)
    if settings.report:  # when the measures are safe
        from ddvi import comparison, report

        say("evaluating: report")
        run = comparison.run_of(folder)
        report.write([run], [report.gather(run, model, dataset)], folder / REPORT)
    return metrics


def load_run(folder: Path) -> tuple[Settings, Observations, LatentVariableModel]:
    """Settings, observations and trained model (on the CPU, in evaluation mode) of a run folder; needs no data.

    A model of `precision=64` is to be used inside `arithmetic(settings)`.

    Raises:
        InputError: the folder holds no trained run, or a file in it is damaged.
    """
    folder = Path(folder)
    settings = folders.read_settings(folder)
    folders.check_trained(folder)
    from ddvi import checkpoint
    from ddvi.composition import Observations, build_model
    from ddvi.randomness import preserved

    try:
        stored: dict[str, Any] = dict(folders.read_config(folder)["observations"])
        stored["event_shape"] = tuple(int(size) for size in stored["event_shape"])
        observations = Observations(**stored)
        with preserved(), arithmetic(settings):
            model = build_model(settings, observations)
    except (KeyError, TypeError, ValueError) as error:
        raise folders.damaged(folder, error) from None
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

    from ddvi.likelihoods import means
    from ddvi.randomness import seeded

    parts = []
    with arithmetic(settings), seeded(seed, "sample"), torch.no_grad():
        for z in model.prior.sample((count,)).split(1000):
            draws = {"x": model.likelihood(z).sample(), "mean": means(model.likelihood, z)}
            draws = {name: model.preprocessing.restore(value) for name, value in draws.items()}
            parts.append(draws | {"z": z})
    return {name: torch.cat([part[name] for part in parts]) for name in ("x", "mean", "z")}


def report(paths: Sequence[Path], output: Path | None = None, data_root: str | None = None) -> Path:
    """Write a page on finished runs, side by side, and return its file.

    Args:
        paths: run folders.
        output: the file; `report.html` in the folder that holds all of the runs if None.
        data_root: folder with the data, empty for the cache; each run's own if None.

    Raises:
        InputError: a folder holds no finished run, the data can't be read, or the file can't be written.
    """
    from ddvi import comparison

    found = comparison.read(paths)
    output = output or comparison.common_folder(paths) / REPORT
    check_file(output)
    for run in found:
        folders.check_trained(run.folder)
    from ddvi import report

    loaded: Loaded = {}
    gathered = []
    for run in found:
        settings, model, shown = load_with_data(run.folder, data_root, loaded)
        with arithmetic(settings):
            gathered.append(report.gather(run, model, shown))
    report.write(found, gathered, output)
    return output


def load_with_data(
    folder: Path, data_root: str | None, loaded: Loaded
) -> tuple[Settings, LatentVariableModel, Dataset]:
    """Settings and trained model of a run folder, and the data with what it is measured on as the test part.

    Args:
        folder: of the run.
        data_root: where the data is; None is where the run found it.
        loaded: data read before, to which this is added.

    Raises:
        InputError: the folder holds no trained run, the data can't be read, or it isn't the run's.
    """
    from ddvi import data

    settings, _, model = load_run(folder)
    place = settings.data_root if data_root is None else data_root
    source = (settings.dataset, place or None, settings.seed, settings.limit or None)
    if source not in loaded:
        loaded[source] = data.load(*source)
    folders.check_same_data(folder, loaded[source].fingerprint)
    return settings, model, measured(settings, loaded[source])


def measured(settings: Settings, dataset: Dataset) -> Dataset:
    """The data with what a run is measured on as its test part, which `measured_on=validation` takes from training."""
    if settings.measured_on != "validation":
        return dataset
    from ddvi import data

    held_out = fit_to_size(settings, len(dataset.train_x)).validation
    return dataset.held_out(*data.split_validation(dataset, held_out, settings.seed))


def arithmetic(settings: Settings) -> AbstractContextManager[str]:
    """The arithmetic of a run, for the length of a block; on a CPU it keeps its path of matrix products if that is
    exact there too."""
    from ddvi.arithmetic import arithmetic, keeps_precision, path_of

    path = path_of(choose_device(settings), settings.precision)
    if path is None and (settings.folder / folders.CONFIG).exists() and not settings.overwrite:
        path = folders.read_config(settings.folder).get("matrix_products")
        path = path if path and keeps_precision(path) else None
    return arithmetic(settings.precision, settings.threads, path)


def fit_to_size(settings: Settings, count: int) -> Settings:
    """Default `validation` and `batch_size` made to fit `count` training examples; what the user set stays."""
    named = settings.full_dataset
    if settings.dataset not in DATASETS:
        named = "mnist" + SEMI * settings.semi_supervised  # which has the general defaults
    default = resolve(named, settings.full_method, settings.prior, {"preset": settings.preset})
    changes: dict[str, int] = {}
    if settings.validation == default.validation and settings.validation > count // 10:
        changes["validation"] = count // 10
    left = count - changes.get("validation", settings.validation)
    if settings.batch_size == default.batch_size and settings.batch_size > left > 0:
        changes["batch_size"] = left
    return dataclasses.replace(settings, **changes)


class _HistoryWriter:
    """Passes on what the trainer says, and keeps `history.csv` up to date."""

    trainer: Trainer

    def __init__(self, folder: Path, listener: Listener | None, logger: Logger | None) -> None:
        self.folder = folder
        self.listener = listener
        self.logger = logger

    def step(self, epoch: int, step: int, steps: int) -> None:
        if self.listener:
            self.listener.step(epoch, step, steps)

    def epoch(self, row: dict[str, Any]) -> None:
        folders.write_history(self.folder, self.trainer.state.history)
        loggers.log(self.logger, row, "training", row["epoch"])
        if self.listener:
            self.listener.epoch(row)

    def message(self, text: str) -> None:
        if self.listener:
            self.listener.message(text)


def _silent(_: str) -> None:
    """Where nobody listens."""
