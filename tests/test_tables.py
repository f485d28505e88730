"""Tables: intervals and paired differences against scipy and hand; what stands in a cell; where it comes from."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ddvi import folders, tables
from ddvi.errors import InputError
from ddvi.settings import resolve


def finish(root: Path, method: str, seed: int, prior: str = "pinwheel", **given: Any) -> Path:
    """A finished run's config.yaml and metrics.json; measures among `given` have float values."""
    measures = {name: value for name, value in given.items() if isinstance(value, float)}
    settings = {name: value for name, value in given.items() if name not in measures}
    folder = root / method / prior / f"{len(list(root.rglob('config.yaml')))}"
    folder.mkdir(parents=True)
    folders.write_config(resolve("digits", method, prior, settings | {"seed": seed, "out": folder}), {}, {}, "highest")
    machine = {"processor": "Abacus", "cores": 2, "threads": 1}
    facts = {"seconds": {"training": 10.0 + seed}, "machine": machine, "versions": {"torch": "2.0"}, "epochs": 3}
    folders.write_metrics(folder, measures | facts | {"evaluation": "quick"})
    return folder


def test_the_interval_is_students() -> None:
    mean, half_width = tables.interval([1.0, 2.0, 3.0])  # s = 1, t₀.₉₇₅(2) = 4.302653
    assert (mean, half_width) == (2.0, pytest.approx(4.302653 / math.sqrt(3), abs=1e-6))
    values = np.random.default_rng(0).normal(size=7)
    low, high = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
    mean, half_width = tables.interval(list(values))
    assert (mean - half_width, mean + half_width) == pytest.approx((low, high))
    assert math.isnan(tables.interval([1.0])[1])


def test_a_difference_is_paired_by_seed() -> None:
    rng = np.random.default_rng(1)
    verdicts = []
    for _ in range(50):
        first, second = rng.normal(1, 1, 6), rng.normal(size=6)
        expected = stats.ttest_rel(first, second).pvalue < 0.05 and first.mean() > second.mean()
        verdicts.append(bool(expected))
        assert tables.exceeds(dict(enumerate(first)), dict(enumerate(second))) == expected
    assert 5 < sum(verdicts) < 45
    # Far apart from seed to seed, and yet always 1 ± 0.1 better: pairing sees it.
    assert tables.exceeds({0: 11.0, 1: 51.1, 2: 90.9}, {0: 10.0, 1: 50.0, 2: 90.0, 7: 1e6})
    assert not tables.exceeds({0: 1.0, 1: 2.0}, {1: 0.0, 2: 0.0}), "one common seed decides nothing"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """On the pinwheel vae, vae lr=0.01 and ddvi, the last with two seeds of three; vae alone on the swiss roll."""
    common = {"epochs": 3, "hidden_size": 8}
    for seed, (elbo, mmd) in enumerate([(-50.0, 0.30), (-51.0, 0.31), (-52.0, 0.32)]):
        finish(tmp_path, "vae", seed, **common, elbo=elbo, mmd=mmd)
        finish(
            tmp_path,
            "vae",
            seed,
            **common,
            lr=(0.01).__repr__(),
            elbo=elbo + 1 + seed / 10,
            mmd=mmd + 0.01 * (-1) ** seed,
        )
        if seed < 2:
            finish(tmp_path, "ddvi", seed, **common, mmd=mmd + 1)
    finish(tmp_path, "vae", 0, "swiss_roll", elbo=-60.0)
    (tmp_path / "commands.sh").write_text("ddvi study digits vae pinwheel\n")
    return tmp_path


def test_a_table_for_each_data_set_and_prior(root: Path) -> None:
    groups = tables.grouped(tables.find(root))
    assert list(groups) == [("digits", "pinwheel"), ("digits", "swiss_roll")]
    table = tables.tabulate(("digits", "pinwheel"), groups["digits", "pinwheel"], ["ddvi study"])
    assert [(label, seeds) for label, seeds, _ in table.rows] == [("vae", 3), ("vae lr=0.01", 3), ("ddvi", 2)]
    assert table.columns == ["elbo", "mmd", "training_seconds"]
    vae, fast, ddvi = (cells for _, _, cells in table.rows)
    assert vae["elbo"].mean == -51.0
    assert vae["elbo"].half_width == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    assert fast["elbo"].best, "1, 1.1 and 1.2 nats better: 1.1 ± 0.25"
    assert not vae["elbo"].best
    assert not vae["mmd"].best, "0.01, −0.01 and 0.01 better: 0.003 ± 0.029"
    assert not any(cells["training_seconds"].best for cells in (vae, fast, ddvi)), "time is no measure"
    assert "elbo" not in ddvi
    assert ddvi["mmd"].mean == pytest.approx(1.305)


def test_what_is_worse_on_the_seeds_that_both_have_is_never_bold(tmp_path: Path) -> None:
    for seed, elbo in enumerate([-101.0, -101.1, -101.2, -80.0, -80.0, -80.0]):
        finish(tmp_path, "vae", seed, elbo=elbo)
    for seed in range(3):
        finish(tmp_path, "iaf_vae", seed, elbo=-100.0)
    ((place, rows),) = tables.grouped(tables.find(tmp_path)).items()
    table = tables.tabulate(place, rows)
    assert not any(cells["elbo"].best for _, _, cells in table.rows)


@pytest.mark.parametrize("other", [{"evaluation": "full"}, {"fingerprint": {"digits": "x"}}, {"test_seed": 3}])
def test_what_was_measured_otherwise_has_no_best_and_is_said(tmp_path: Path, other: dict[str, Any]) -> None:
    for seed in range(3):
        finish(tmp_path, "vae", seed, elbo=-100.0 - seed)
        folder = finish(tmp_path, "iaf_vae", seed, elbo=-90.0 - 1.1 * seed)
        folders.write_metrics(folder, folders.read_metrics(folder) | other)
    ((place, rows),) = tables.grouped(tables.find(tmp_path)).items()
    table = tables.tabulate(place, rows)
    assert not any(cells["elbo"].best for _, _, cells in table.rows)
    assert any("can't be compared" in note for note in table.notes)


def test_each_form_says_the_same(root: Path) -> None:
    files = tables.write(root)
    names = [f"digits-{prior}.{suffix}" for prior in ("pinwheel", "swiss_roll") for suffix in ("md", "csv", "tex")]
    assert [path.name for path in files] == [*names, "runs.csv"]
    markdown, comma, latex = (path.read_text() for path in files[:3])
    assert "| method | seeds | elbo ↑ | mmd ↓ | training_seconds |" in markdown
    assert "| vae | 3 | -51.0 ± 2.5 | 0.310 ± 0.025 | 11.0 ± 2.5 |" in markdown
    assert "| vae lr=0.01 | 3 | **-49.9 ± 2.2** |" in markdown
    assert "| ddvi | 2 | – | 1.305 ± 0.064 |" in markdown
    assert r"vae lr=0.01 & 3 & $\mathbf{-49.9 \pm 2.2}$ &" in latex
    assert r"ddvi & 2 & -- & $1.305 \pm 0.064$ &" in latex
    assert r"training\_seconds" in latex
    rows = list(csv.DictReader(line for line in comma.splitlines() if not line.startswith("#")))
    assert [row["method"] for row in rows] == ["vae", "vae lr=0.01", "ddvi"]
    assert float(rows[1]["elbo"]) == pytest.approx(-49.9)
    assert [row["elbo_best"] for row in rows] == ["0", "1", ""]
    assert float(rows[0]["elbo_interval"]) == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    for text in (markdown, comma, latex):
        assert "settings: epochs=3 hidden_size=8" in text
        assert "command: ddvi study digits vae pinwheel" in text
        assert "machine: Abacus, 2 cores, 1 threads a run, torch 2.0" in text
        assert "commit: " in text
        assert "evaluation: quick" in text
    single = files[3].read_text()
    assert "| vae | 1 | -60.000 | 10.000 |" in single, "one seed has no interval and no best"


def test_every_run_has_its_line(root: Path) -> None:
    rows = list(csv.DictReader(tables.write(root)[-1].read_text().splitlines()))
    assert len(rows) == 9
    by_name = {(row["prior"], row["method"], row["settings"], row["seed"]): row for row in rows}
    assert len(by_name) == 9
    row = by_name["pinwheel", "vae", "epochs=3 hidden_size=8", "1"]
    found = row["dataset"], float(row["elbo"]), float(row["mmd"]), row["knn_accuracy"], float(row["training_seconds"])
    assert found == ("digits", -51.0, 0.31, "", 11.0)
    assert row["machine"] == "Abacus, 2 cores, 1 threads a run, torch 2.0"
    assert by_name["swiss_roll", "vae", "", "0"]["elbo"] == "-60.0"


def test_what_differs_between_runs_is_counted(root: Path) -> None:
    folder = finish(root, "vae", 5, elbo=-1.0)
    folders.write_metrics(folder, folders.read_metrics(folder) | {"evaluation": "full"})
    text = (root / "tables/digits-pinwheel.md").read_text() if tables.write(root) else ""
    assert "evaluation: quick (8 of 9 runs); full (1 of 9 runs)" in text
    assert "settings" not in text, "not all share them any more"
    assert "| vae epochs=3 hidden_size=8 | 3 |" in text


def test_the_same_run_twice_is_refused(root: Path) -> None:
    finish(root, "vae", 0, "swiss_roll", elbo=-60.0)
    with pytest.raises(InputError, match="hold the same run"):
        tables.find(root)


def test_nothing_finished_is_refused(tmp_path: Path) -> None:
    (finish(tmp_path, "vae", 0) / "metrics.json").unlink()
    with pytest.raises(InputError, match="no finished run under"):
        tables.write(tmp_path)
