"""A run folder: what it holds, when it is used again, when it is refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import leave_out_pictures
from ddvi import data, evaluation, folders, runs
from ddvi.catalogue import MEASURES
from ddvi.errors import InputError
from ddvi.settings import Settings, resolve
from ddvi.training import Trainer
from listeners import Messages

FILES = {
    "config.yaml",
    "checkpoint.safetensors",
    "model.safetensors",
    "metrics.json",
    "history.csv",
    "latents.png",
    "samples.png",
    "reconstructions.png",
    "curves.png",
    "report.html",
}


class Heard:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def step(self, epoch: int, step: int, steps: int) -> None: ...

    def epoch(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def message(self, text: str) -> None:
        self.messages.append(text)


class Killed(BaseException):
    """A process that ends in the middle."""


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Replace evaluation and pictures, which have tests of their own, and say of each call whether it was quick."""
    calls: list[bool] = []

    def evaluate(
        model: Any, dataset: Any, *, quick: bool, seed: int, semi_supervised: bool, report: Any = None
    ) -> dict[str, Any]:
        calls.append(quick)
        return {"elbo": -30.0, "elbo_standard_error": 0.5, "mmd": float("nan")}

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    leave_out_pictures(monkeypatch)
    return calls


def small(out: Path, **overrides: Any) -> Settings:
    """A digits run of a second."""
    values = {"epochs": 1, "hidden_size": 16, "limit": 200, "evaluation": "quick", "report": False, "out": out}
    return resolve("digits", "vae", "pinwheel", values | overrides)


def test_a_run_leaves_every_file_and_its_figures(tmp_path: Path) -> None:
    """With the real evaluation."""
    heard = Heard()
    metrics = runs.train(small(tmp_path / "run", epochs=2, report=True), heard)
    assert {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")} == FILES
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == metrics
    assert {"elbo", "log_likelihood", "inference_gap", "latent_nll", "knn_accuracy"} <= metrics.keys()
    assert metrics["inference_gap"] == pytest.approx(metrics["log_likelihood"] - metrics["elbo"], abs=1e-4)
    assert (metrics["n_train"], metrics["n_validation"], metrics["n_test"]) == (180, 20, 200)
    assert metrics["seconds"]["training"] > 0
    assert metrics["versions"]["torch"] == torch.__version__
    with (tmp_path / "run/history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"reconstruction", "divergence", "validation_bound", "examples_per_second"} <= rows[0].keys()
    assert float(rows[1]["validation_bound"]) == heard.rows[1]["validation_bound"]
    assert any("bernoulli" in text for text in heard.messages)


def test_a_search_measures_on_validation_examples_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brief: None
) -> None:
    loaded = runs.train(small(tmp_path / "whole", measured_on="validation"))
    assert (loaded["n_test"], loaded["n_validation"], loaded["test_examples"]) == (200, 20, 20)
    assert loaded["measured_on"] == "validation"
    original = data.load

    def corrupted(*arguments: Any) -> data.Dataset:
        dataset = original(*arguments)
        return dataclasses.replace(dataset, test_x=16 - dataset.test_x, test_y=0 * dataset.test_y)  # type: ignore[operator]

    monkeypatch.setattr(data, "load", corrupted)
    again = runs.train(small(tmp_path / "corrupted", measured_on="validation"))
    assert {n: v for n, v in again.items() if n in MEASURES} == {n: v for n, v in loaded.items() if n in MEASURES}
    with pytest.raises(InputError, match="needs validation examples"):
        small(tmp_path, measured_on="validation", validation=0)


def test_a_decoder_of_another_run_is_taken_and_rests(tmp_path: Path, measures: list[bool]) -> None:
    runs.train(small(tmp_path / "first"))
    runs.train(small(tmp_path / "second", decoder=tmp_path / "first", seed=1))
    first, second = (runs.load_run(tmp_path / name)[2] for name in ("first", "second"))
    for name, value in first.likelihood.state_dict().items():
        torch.testing.assert_close(second.likelihood.state_dict()[name], value, atol=0, rtol=0)
    assert not torch.equal(first.posterior.encoder.layers[0].weight, second.posterior.encoder.layers[0].weight)
    with pytest.raises(InputError, match="weights of another model"):
        runs.train(small(tmp_path / "third", decoder=tmp_path / "first", hidden_size=17))
    with pytest.raises(InputError, match="is not a folder"):
        small(tmp_path / "fourth", decoder=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no model"):
        runs.train(small(tmp_path / "fifth", decoder=tmp_path / "empty"))


def test_started_anew_nothing_of_the_old_run_is_left(tmp_path: Path, brief: None) -> None:
    runs.train(small(tmp_path, report=True))
    assert (tmp_path / "report.html").exists()
    runs.train(small(tmp_path, overwrite=True, lr=2e-3))
    assert not (tmp_path / "report.html").exists()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.suffix}
    assert modes["model.safetensors"] == modes["metrics.json"], "who may read the one may read the other"


def test_a_decoder_that_rests_drops_nothing(
    tmp_path: Path, measures: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.train(small(tmp_path / "first", dropout=0.5))
    modes = set()
    take = Trainer._step

    def step(trainer: Trainer, *given: Any) -> None:
        take(trainer, *given)
        modes.add((trainer.model.likelihood.training, trainer.model.posterior.training))

    monkeypatch.setattr(Trainer, "_step", step)
    runs.train(small(tmp_path / "second", dropout=0.5, decoder=tmp_path / "first", epochs=2, validation=20))
    assert modes == {(False, True)}


@pytest.mark.parametrize(("device", "stored", "taken"), [("cuda", "medium", "highest"), ("cpu", "medium", None)])
def test_a_path_of_products_is_kept_where_it_is_exact(
    device: str, stored: str, taken: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(tmp_path)
    folders.write_config(settings, {}, {}, stored)
    monkeypatch.setattr(runs, "choose_device", lambda _: device)
    monkeypatch.setattr("ddvi.arithmetic.measure_path", lambda *_, **__: (1.0, 1e-3))
    monkeypatch.setattr("ddvi.arithmetic.arithmetic", lambda precision, threads, path: path)
    assert runs.arithmetic(settings) == taken


def test_the_callers_state_is_untouched(tmp_path: Path, measures: list[bool]) -> None:
    before = torch.get_rng_state(), torch.get_num_threads()
    runs.train(small(tmp_path, threads=1))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == torch.get_num_threads()


def test_a_finished_run_is_shown_not_repeated(tmp_path: Path, measures: list[bool]) -> None:
    first = runs.train(small(tmp_path))
    weights = (tmp_path / "model.safetensors").read_bytes()
    heard = Heard()
    assert runs.train(small(tmp_path, threads=1), heard) == first
    assert not heard.rows
    assert "is finished" in heard.messages[0]
    assert first["mmd"] is None  # JSON has no NaN
    runs.train(small(tmp_path, overwrite=True), heard)
    assert len(heard.rows) == 1
    assert (tmp_path / "model.safetensors").read_bytes() == weights  # same seed
    assert measures == [True, True]


def test_full_after_quick_evaluates_again_and_only_that(tmp_path: Path, measures: list[bool]) -> None:
    runs.train(small(tmp_path))
    heard = Heard()
    assert runs.train(small(tmp_path, evaluation="full"), heard)["evaluation"] == "full"
    assert not heard.rows
    assert runs.train(small(tmp_path), heard)["evaluation"] == "full"
    assert measures == [True, False]


def test_what_a_finished_run_has_lost_is_made_again(tmp_path: Path, measures: list[bool]) -> None:
    runs.train(small(tmp_path))
    weights, heard = (tmp_path / "model.safetensors").read_bytes(), Heard()
    (tmp_path / "metrics.json").write_text('{"a')
    assert runs.train(small(tmp_path), heard)["evaluation"] == "quick"
    assert measures == [True, True]
    (tmp_path / "model.safetensors").unlink()
    runs.train(small(tmp_path, resume=True), heard)
    assert not heard.rows
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    (tmp_path / "history.csv").write_bytes(b"\x8c\xff\x00")
    with pytest.raises(InputError, match=r"history\.csv is damaged .* resume=true writes both anew"):
        runs.report([tmp_path])


def test_another_configuration_is_refused_and_named(tmp_path: Path, measures: list[bool]) -> None:
    runs.train(small(tmp_path, lr=0.001))
    kept = (tmp_path / "metrics.json").read_bytes()
    with pytest.raises(InputError, match=r"lr=0\.001 there, lr=0\.01 here"):
        runs.train(small(tmp_path, lr=0.01))
    assert (tmp_path / "metrics.json").read_bytes() == kept


def test_an_unfinished_run_asks_then_resumes(
    tmp_path: Path, measures: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = runs.train(small(tmp_path / "whole", epochs=3))

    class Killer(Heard):
        def step(self, epoch: int, step: int, steps: int) -> None:
            if epoch == 2:
                raise Killed

    folder = tmp_path / "cut"
    with pytest.raises(Killed):
        runs.train(small(folder, epochs=3), Killer())
    assert len(folders.read_history(folder)) == 2
    with pytest.raises(InputError, match="resume=true goes on"):
        runs.train(small(folder, epochs=3))
    heard = Heard()
    resumed = runs.train(small(folder, epochs=3, resume=True), heard)
    assert [row["epoch"] for row in heard.rows] == [3]
    assert len(folders.read_history(folder)) == 3
    for metrics in (undisturbed, resumed):
        del metrics["seconds"], metrics["examples_per_second"]
    assert resumed == undisturbed
    whole, cut = (runs.load_run(path)[2].state_dict() for path in (tmp_path / "whole", folder))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_killed_while_evaluating_only_the_evaluation_is_left(
    tmp_path: Path, measures: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", killed)
        with pytest.raises(Killed):
            runs.train(small(tmp_path))
    heard = Heard()
    runs.train(small(tmp_path, resume=True), heard)
    assert not heard.rows
    assert (tmp_path / "metrics.json").exists()


def test_nothing_to_resume_starts_from_the_beginning(tmp_path: Path, measures: list[bool]) -> None:
    heard = Heard()
    runs.train(small(tmp_path / "new", resume=True), heard)
    assert "nothing to resume" in heard.messages[0]
    assert len(heard.rows) == 1


def test_damaged_files_get_a_sentence(tmp_path: Path, measures: list[bool]) -> None:
    runs.train(small(tmp_path))
    (tmp_path / "metrics.json").unlink()
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"checkpoint\.safetensors is damaged"):
        runs.train(small(tmp_path, resume=True))
    config = tmp_path / "config.yaml"
    whole = config.read_text()
    for damage in ("", "a: [", "settings: 3", "!!python/object/apply:os.system ['true']", "settings: {lr: fast}", "\0"):
        config.write_text(damage)
        with pytest.raises(InputError, match=r"config\.yaml is damaged"):
            runs.load_run(tmp_path)
    config.write_text(whole.replace("event_shape:", "shape:"))
    with pytest.raises(InputError, match=r"config\.yaml is damaged"):
        runs.load_run(tmp_path)
    config.write_text(whole.replace("hidden_size: 16", "hidden_size: 17"))
    with pytest.raises(InputError, match=r"weights of another model: \S+ is of shape \(16\S*.*\) instead of \(17"):
        runs.load_run(tmp_path)
    with pytest.raises(InputError, match="not the folder of a run"):
        runs.load_run(tmp_path.parent)


def test_an_unwritable_out_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="can't be written"):
        folders.plan(small(tmp_path / "file/run"))


def test_two_processes_never_share_a_folder(tmp_path: Path, measures: list[bool]) -> None:
    with folders.alone(tmp_path), pytest.raises(InputError, match="another process"):
        runs.train(small(tmp_path))


def test_a_copied_folder_draws_without_data(tmp_path: Path, measures: list[bool]) -> None:
    """A table in its own units: model and data have the same mean and scale, far from 0 and 1."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(400, 3)) * [1.0, 10.0, 0.1] + [100.0, -50.0, 3.0]).astype(np.float32)
    np.savez(tmp_path / "table.npz", x=x)
    values = {"out": tmp_path / "run", "epochs": 20, "hidden_size": 32, "report": False}
    metrics = runs.train(resolve(str(tmp_path / "table.npz"), "vae", "gaussian", values))
    assert (metrics["n_train"], metrics["n_validation"], metrics["n_test"]) == (324, 36, 40)
    (tmp_path / "table.npz").unlink()
    shutil.move(tmp_path / "run", tmp_path / "copy")
    draws = runs.sample(tmp_path / "copy", 2000, seed=1)
    assert torch.equal(draws["x"], runs.sample(tmp_path / "copy", 2000, seed=1)["x"])
    assert not torch.equal(draws["x"], runs.sample(tmp_path / "copy", 2000, seed=2)["x"])
    np.testing.assert_allclose(draws["x"].mean(0), x.mean(0), atol=0.2 * x.std(0).max(), rtol=0.02)
    np.testing.assert_allclose(draws["x"].std(0), x.std(0), rtol=0.3)
    with pytest.raises(InputError, match="no file"):
        runs.evaluate_run(tmp_path / "copy")


def test_a_run_learns_how_much_counts_vary(tmp_path: Path, measures: list[bool]) -> None:
    """Negative binomial counts of dispersion 2, so of variance μ + μ²/2, which a Poisson likelihood couldn't have."""
    x = np.random.default_rng(0).negative_binomial(2, 2 / (2 + 6), size=(600, 4))
    np.save(tmp_path / "counts.npy", x)
    values = {"out": tmp_path / "run", "epochs": 25, "hidden_size": 8, "batch_size": 32, "lr": 2e-2}
    values |= {"likelihood": "negative_binomial", "latent_size": 1}
    runs.train(resolve(str(tmp_path / "counts.npy"), "vae", "gaussian", values))
    _, observations, model = runs.load_run(tmp_path / "run")
    assert observations.likelihood == "negative_binomial"
    assert 1.6 < model.likelihood.log_dispersion.exp().mean() < 2.6
    draws = runs.sample(tmp_path / "run", 5000)["x"]
    np.testing.assert_allclose(draws.var(0), x.var(0), rtol=0.35)
    reals = np.random.default_rng(0).normal(size=(50, 4))
    np.save(tmp_path / "counts.npy", reals)
    with pytest.raises(InputError, match="likelihood=negative_binomial needs whole numbers"):
        runs.train(resolve(str(tmp_path / "counts.npy"), "vae", "gaussian", values | {"out": tmp_path / "other"}))


def test_categories_by_the_million_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "counts.npy", np.arange(40).reshape(20, 2) * 10**6)
    values = {"out": tmp_path / "run", "likelihood": "categorical"}
    with pytest.raises(InputError, match=r"78,000,002 outputs, .* use likelihood=poisson"):
        runs.train(resolve(str(tmp_path / "counts.npy"), "vae", "gaussian", values))


def test_starting_anew_is_said_when_it_is_done(tmp_path: Path, brief: None) -> None:
    path, said = tmp_path / "own.npy", Messages()
    np.save(path, np.random.default_rng(0).normal(size=(30, 3)))
    values = {"out": tmp_path / "run", "epochs": 1, "evaluation": "quick", "report": False, "overwrite": True}
    runs.train(resolve(str(path), "vae", "gaussian", values), said)
    assert not [text for text in said.told if "anew" in text]
    path.write_bytes(b"nothing")
    with pytest.raises(InputError):
        runs.train(resolve(str(path), "vae", "gaussian", values), said)
    assert (tmp_path / "run" / "metrics.json").exists()
    assert not [text for text in said.told if "anew" in text]
    np.save(path, np.random.default_rng(1).normal(size=(30, 3)))
    runs.train(resolve(str(path), "vae", "gaussian", values), said)
    assert [text for text in said.told if "anew" in text] == [f"starting anew over the run in {tmp_path / 'run'}"]


def test_other_data_under_the_same_name_is_refused(tmp_path: Path, measures: list[bool]) -> None:
    path = tmp_path / "own.npy"
    np.save(path, np.random.default_rng(0).normal(size=(100, 3)))
    runs.train(resolve(str(path), "vae", "gaussian", {"epochs": 1, "hidden_size": 8, "out": tmp_path / "run"}))
    np.save(path, np.random.default_rng(1).normal(size=(100, 3)))
    with pytest.raises(InputError, match="not the file that the run"):
        runs.evaluate_run(tmp_path / "run")


def test_defaults_shrink_to_small_data_but_not_what_was_set(tmp_path: Path, measures: list[bool]) -> None:
    heard = Heard()
    metrics = runs.train(small(tmp_path / "a", limit=40), heard)
    assert (metrics["n_train"], metrics["n_validation"]) == (36, 4)
    assert {"validation=4, for want of data", "batch_size=36, for want of data"} <= set(heard.messages)
    with pytest.raises(InputError, match="batch_size=50"):
        runs.train(small(tmp_path / "b", limit=40, batch_size=50))
    with pytest.raises(InputError, match="validation=30"):
        runs.train(small(tmp_path / "c", limit=40, validation=30))


def test_double_precision_is_double_throughout(tmp_path: Path, measures: list[bool]) -> None:
    runs.train(small(tmp_path, precision="64"))
    settings, _, model = runs.load_run(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.get_default_dtype() == torch.float32
    assert runs.sample(tmp_path, 3)["x"].dtype == torch.float64
    assert settings.precision == "64"


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_reduced_precision_trains(precision: str, tmp_path: Path, measures: list[bool]) -> None:
    runs.train(small(tmp_path, precision=precision))
    assert {p.dtype for p in runs.load_run(tmp_path)[2].parameters()} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_missing_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device=cuda is not available"):
        runs.train(small(tmp_path, device="cuda"))


@pytest.mark.slow
@pytest.mark.skipif("DDVI_DATA" not in os.environ, reason="DDVI_DATA names no folder with MNIST")
@pytest.mark.parametrize("method", ["vae", "iaf_vae", "h_iaf_vae", "aae", "diff_vae_warmup"])
def test_an_epoch_of_each_method_on_real_mnist(method: str, tmp_path: Path, brief: None) -> None:
    values = {"limit": 500, "epochs": 1, "evaluation": "quick", "report": False, "out": tmp_path}
    values["data_root"] = os.environ["DDVI_DATA"]
    metrics = runs.train(resolve("mnist", method, "pinwheel", values))
    assert -600 < metrics["log_likelihood"] < -100
