"""New data through a trained model: the numbers are the model's, in the data's order, in every form of table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import briefly
from ddvi import cli, data, embedding, runs
from ddvi.composition import Observations
from ddvi.errors import InputError
from ddvi.settings import resolve

SMALL = {"epochs": 1, "hidden_size": 16, "limit": 300, "evaluation": "quick", "report": False, "threads": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    for method in ("vae", "aae", "ddvi_semi"):
        semi = "_semi" * method.endswith("_semi")
        epochs = 10 if method == "vae" else 1  # its rows' bounds are to differ by more than their errors
        given = SMALL | {"out": root / method, "epochs": epochs}
        with briefly():
            runs.train(resolve("digits" + semi, method, "pinwheel", given))
    return {method: root / method for method in ("vae", "aae", "ddvi_semi")}


def read(path: Path) -> tuple[list[str], np.ndarray]:
    with path.open(newline="") as file:
        names, *rows = csv.reader(file)
    return names, np.array(rows, dtype=np.float64)


def embed(folder: Path, source: object, output: Path, *words: str) -> tuple[list[str], np.ndarray]:
    assert cli.main(["embed", str(folder), str(source), "-o", str(output), *words]) == 0
    return read(output)


def test_the_columns_are_those_of_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    bounds = ["z1", "z2", "elbo", "iw_bound"]
    assert embed(folders["vae"], "digits", tmp_path / "a.csv")[0] == bounds
    assert embed(folders["aae"], "digits", tmp_path / "b.csv")[0] == ["z1", "z2"]
    names, table = embed(folders["ddvi_semi"], "digits", tmp_path / "c.csv")
    assert names == [*bounds, *(f"p({digit})" for digit in range(10))]
    assert table.shape == (297, 14)
    assert np.allclose(table[:, 4:].sum(1), 1, atol=1e-5)


def test_the_numbers_are_the_models(folders: dict[str, Path], tmp_path: Path) -> None:
    """Binary data, of which nothing is drawn afresh: the bound is that of the measures, row by row.

    Log-ratios have heavy tails, so that a few rows may be far off; three quarters would be, were they in another order.
    """
    x = (data.load("digits").test_x > 7).float()
    np.save(tmp_path / "x.npy", x.numpy() * 16)
    _, table = embed(folders["vae"], tmp_path / "x.npy", tmp_path / "t.csv", "samples=200")
    _, _, model = runs.load_run(folders["vae"])
    with torch.no_grad():
        conditional = model.posterior(x)
        weights = model.log_weights(x, 2000)
        mean, deviation = conditional.sample((4000,)).mean(0), conditional.sample((4000,)).std(0)
    error = weights.std(0) / 200**0.5
    assert (np.abs(table[:, 2] - weights.mean(0).numpy()) < 3 * error.numpy()).mean() > 0.95
    assert (table[:, 3] >= table[:, 2]).all(), "more draws, a tighter bound"
    standard = (table[:, :2] - mean.numpy()) / deviation.numpy()
    assert abs(standard.mean()) < 0.15
    assert abs(standard.std() - 1) < 0.15
    exact = runs_evidence(model, x)
    assert (table[:, 3] < exact + 3 * error.numpy() + 0.5).mean() > 0.95


def runs_evidence(model, x: torch.Tensor) -> np.ndarray:
    from ddvi.evidence import exact_log_likelihood

    return exact_log_likelihood(model.prior, model.likelihood, x).log_likelihood.numpy()


def test_densities_are_in_the_datas_own_units(brief: None, tmp_path: Path) -> None:
    """Standardised, the same table in metres and in millimetres is the same; its densities are not."""
    x = np.random.default_rng(0).normal(size=(300, 3))
    x[:, 2] = x[:, 0] + 0.1 * x[:, 1]
    bounds, metrics = [], []
    for name, scale in (("metres", 1.0), ("millimetres", 1000.0)):
        np.savez(tmp_path / f"{name}.npz", x=scale * x)
        folder = tmp_path / name
        runs.train(resolve(str(tmp_path / f"{name}.npz"), "vae", "gaussian", SMALL | {"out": folder}))
        metrics.append(json.loads((folder / "metrics.json").read_text()))
        bounds.append(embed(folder, tmp_path / f"{name}.npz", tmp_path / f"{name}.csv")[1][:, 2:])
    for name in ("elbo", "iw_bound", "log_likelihood"):
        assert metrics[0][name] - metrics[1][name] == pytest.approx(3 * np.log(1000), abs=1e-3)
    assert bounds[0] - bounds[1] == pytest.approx(3 * np.log(1000), abs=1e-3)
    assert metrics[0]["inference_gap"] == pytest.approx(metrics[1]["inference_gap"], abs=1e-3)


def test_equal_seeds_give_equal_tables_in_every_form(folders: dict[str, Path], tmp_path: Path) -> None:
    first, again, other = (tmp_path / f"{name}.csv" for name in "abc")
    _, table = embed(folders["vae"], "digits", first, "seed=3")
    embed(folders["vae"], "digits", again, "seed=3")
    embed(folders["vae"], "digits", other, "seed=4")
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    assert cli.main(["embed", str(folders["vae"]), "digits", "-o", str(tmp_path / "t.npy"), "seed=3"]) == 0
    assert np.array_equal(np.load(tmp_path / "t.npy"), table.astype(np.float32)), "nine digits are all of a number"
    assert {path.name for path in tmp_path.iterdir()} == {"a.csv", "b.csv", "c.csv", "t.npy"}, "nothing is left"


def test_parquet_holds_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    names, table = embed(folders["vae"], "digits", tmp_path / "t.csv")
    assert cli.main(["embed", str(folders["vae"]), "digits", "-o", str(tmp_path / "t.parquet")]) == 0
    found = parquet.read_table(tmp_path / "t.parquet")
    assert found.column_names == names
    assert np.array_equal(np.stack([column.to_numpy() for column in found.columns], 1), table.astype(np.float32))


def test_rows_keep_their_order_and_files_are_read_as_they_come(folders: dict[str, Path], tmp_path: Path) -> None:
    digits = data.load("digits")
    x = torch.cat([digits.train_x, digits.test_x]).numpy()
    np.savez(tmp_path / "parts.npz", x_train=x[:1500], x_test=x[1500:])
    np.save(tmp_path / "whole.npy", x[:, 0])  # without a channel
    _, parts = embed(folders["aae"], tmp_path / "parts.npz", tmp_path / "a.csv")
    seen: list[tuple[int, int]] = []
    embedding.embed(folders["aae"], str(tmp_path / "whole.npy"), tmp_path / "b.csv", {}, lambda *at: seen.append(at))
    _, whole = read(tmp_path / "b.csv")
    assert parts.shape == whole.shape == (1797, 2)
    assert np.corrcoef(parts[:, 0], whole[:, 0])[0, 1] > 0.8, "row by row, but for what binarising draws"
    assert seen == [(500, 1797), (1000, 1797), (1500, 1797), (1797, 1797)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "takes a run folder and data, not 0 names"),
        (["{run}"], "not 1 names"),
        (["/nowhere", "digits"], "there is no run folder"),
        (["{run}", "digitz"], "did you mean 'digits'?"),
        (["{run}", "missing.npy"], "there is no file"),
        (["{run}", "digits", "-o", "{tmp}/x.txt"], "ends in none of .csv, .npy, .parquet"),
        (["{run}", "digits", "-o", "{tmp}/no/x.csv"], "a folder that doesn't exist"),
        (["{run}", "digits", "samples=0"], "must be at least 1"),
        (["{run}", "digits", "lr=3"], "unknown setting of an embedding"),
        (["{run}", "{tmp}/flat.npy"], "make it N x features"),
        (["{run}", "{tmp}/shape.npy"], "but the run was trained on (1, 8, 8)"),
        (["{run}", "{tmp}/scale.npy"], "whole numbers from 0 to 16; scale them alike"),
        (["{run}", "{tmp}/nan.npy"], "NaN"),
        (["{run}", "{tmp}/broken.npy"], "can't be read"),
        (["{run}", "{tmp}/none.npy"], "holds no examples"),
        (["{run}", "{tmp}/flat.npy", "-o", "{tmp}/flat.npy"], "is the data itself"),
    ],
)
def test_mistakes_get_one_sentence_and_leave_nothing(
    words: list[str], sentence: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "flat.npy", np.zeros(3))
    np.save(tmp_path / "shape.npy", np.zeros((3, 9, 9)))
    np.save(tmp_path / "scale.npy", np.full((3, 8, 8), 255))
    np.save(tmp_path / "nan.npy", np.full((3, 8, 8), np.nan))
    np.save(tmp_path / "none.npy", np.zeros((0, 8, 8)))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY broken")
    before = set(tmp_path.rglob("*")) | set(folders["vae"].iterdir())
    filled = [word.replace("{run}", str(folders["vae"])).replace("{tmp}", str(tmp_path)) for word in words]
    assert cli.main(["embed", *filled]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert set(tmp_path.rglob("*")) | set(folders["vae"].iterdir()) == before


def test_a_missing_writer_is_named_with_its_command(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(embedding, "find_spec", lambda _: None)
    assert cli.main(["embed", str(folders["vae"]), "digits", "-o", str(tmp_path / "t.parquet")]) == 2
    assert "pip install 'ddvi[parquet]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("likelihood", "preprocessing", "good", "bad"),
    [
        ("bernoulli", "as_is", [0, 1, 1], [0, 2, 1]),
        ("bernoulli", "as_is", [0.0, 1.0], [0.0, 0.5]),
        ("poisson", "as_is", [0, 400], [-1, 3]),
        ("categorical", "as_is", [0, 3], [0, 4]),
        ("gaussian", "dequantise", [0, 255], [0, 0.5]),
        ("bernoulli", "binarise", [0, 254], [0, 256]),
        ("bernoulli", "binarise", [0.0, 1.0], [0.0, 0.5]),
        ("gaussian", "standardise", [-1e6, 0.5], None),
    ],
)
def test_values_must_be_such_as_the_model_knows(
    likelihood: str, preprocessing: str, good: list[float], bad: list[float] | None
) -> None:
    observations = Observations((len(good),), likelihood, preprocessing, 10, maximum=255.0, categories=4)
    assert embedding.conform(np.array([good]), observations, "data", 0).tolist() == [good]
    if bad:
        observations = Observations((len(bad),), likelihood, preprocessing, 10, maximum=255.0, categories=4)
        with pytest.raises(InputError, match="examples 8 to 8 of 'data' lie between"):
            embedding.conform(np.array([bad]), observations, "data", 7)
