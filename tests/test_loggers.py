"""Live views of a training get each epoch's row and the measures; what isn't installed is said before any work."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ddvi import folders, loggers, runs
from ddvi.errors import InputError
from ddvi.settings import resolve

SMALL = {"epochs": 2, "hidden_size": 16, "limit": 200, "evaluation": "quick", "report": False, "threads": 1}


def small(folder: Path, **more: Any):
    return resolve("digits", "vae", "gaussian", SMALL | {"out": folder} | more)


@pytest.mark.parametrize("name", loggers.INSTALL)
def test_what_is_not_installed_is_named_with_its_command(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install") as caught:
        runs.train(small(tmp_path / "run", logger=name))
    assert loggers.INSTALL[name] in str(caught.value)
    assert not (tmp_path / "run").exists(), "nothing has been done by then"


def test_tensorboard_has_the_history_and_the_measures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = runs.train(small(tmp_path / "run", logger="tensorboard"))
    events = EventAccumulator(str(tmp_path / "run" / loggers.FOLDER)).Reload()
    history = folders.read_history(tmp_path / "run")
    bound = events.Scalars("training/validation_bound")
    assert [event.step for event in bound] == [1, 2]
    expected = [float(row["validation_bound"]) for row in history]
    assert [event.value for event in bound] == pytest.approx(expected, rel=1e-6)
    (elbo,) = events.Scalars("measures/elbo")
    assert elbo.value == pytest.approx(metrics["elbo"], rel=1e-6)


def test_a_logger_decides_nothing_and_may_change_on_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    plain = runs.train(small(tmp_path / "plain"))
    logged = runs.train(small(tmp_path / "logged", logger="tensorboard"))
    assert plain["elbo"] == logged["elbo"]
    assert runs.train(small(tmp_path / "logged")) == logged


class Told(types.ModuleType):
    """A stand-in for a package, which remembers what it is told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **more: Any) -> Told:
            self.calls.append((name, args or more))
            if name in ("log", "log_metrics"):
                self.calls[-1] = (name, (args[0], more["step"]))
            return self

        return call


@pytest.mark.parametrize(
    ("name", "log", "end", "good", "bad"),
    [
        ("wandb", "log", "finish", (0,), (1,)),
        ("mlflow", "log_metrics", "end_run", ("FINISHED",), ("FAILED",)),
    ],
)
def test_the_others_through_the_same_interface(
    name: str, log: str, end: str, good: Any, bad: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = Told(name)
    monkeypatch.setitem(sys.modules, name, package)
    metrics = runs.train(small(tmp_path / "run", logger=name))
    logged = [told for call, told in package.calls if call == log]
    assert [step for _, step in logged] == [1, 2, 2]
    assert logged[-1][0]["measures/elbo"] == metrics["elbo"]
    assert package.calls[-1] == (end, good)
    with pytest.raises(RuntimeError), loggers.opened(small(tmp_path / "other", logger=name)):
        raise RuntimeError
    assert package.calls[-1] == (end, bad)


def test_only_finite_numbers_are_handed_on() -> None:
    package = Told("any")
    logger = loggers._adapted("any", lambda values, step: package.log(values, step=step), lambda status: None)
    loggers.log(logger, {"a": 1, "b": float("nan"), "c": "text", "d": None, "e": 0.5}, "x", 3)
    assert package.calls == [("log", ({"x/a": 1.0, "x/e": 0.5}, 3))]
    loggers.log(None, {"a": 1}, "x", 3)
