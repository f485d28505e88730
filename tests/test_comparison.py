"""Runs side by side: names that tell them apart, the best only where there is one, and what can't be compared said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ddvi import cli, comparison, folders, progress
from ddvi.settings import resolve


def finished(
    folder: Path, method: str = "vae", prior: str = "pinwheel", dataset: str = "digits", **metrics: Any
) -> Path:
    """A folder that holds what a finished run leaves, but for weights."""
    given = {name: metrics.pop(name) for name in ("seed", "lr", "epochs") if name in metrics}
    folder.mkdir()
    settings = resolve(dataset, method, prior, given | {"out": str(folder)})
    folders.write_config(settings, {"event_shape": [1, 8, 8]}, {"digits": "abc"}, "highest")
    common = {"evaluation": "full", "n_test": 297, "likelihood": "bernoulli", "measured_on": "test"}
    common["fingerprint"] = {"digits": "abc"}
    folders.write_metrics(folder, common | {"elbo": -25.0, "mmd": 0.2} | metrics)
    return folder


def test_names_say_what_differs_and_no_more(tmp_path: Path) -> None:
    folder = lambda name, **more: finished(tmp_path / name, **more)  # noqa: E731
    runs = comparison.read([folder("a", method="ddvi"), folder("b"), folder("c", lr=0.1)])
    assert comparison.names(runs) == ["ddvi", "vae", "vae lr=0.1"]
    runs = comparison.read([tmp_path / "b", folder("d", seed=1), folder("e", prior="gaussian")])
    assert comparison.names(runs) == ["vae pinwheel seed=0", "vae pinwheel seed=1", "vae gaussian seed=0"]
    runs = comparison.read([tmp_path / "b", folder("f")])
    assert comparison.names(runs) == [f"vae in {tmp_path / 'b'}", f"vae in {tmp_path / 'f'}"]


def test_the_best_is_by_each_measures_own_direction(tmp_path: Path) -> None:
    first = finished(tmp_path / "a", elbo=-20.0, mmd=0.3, nmi=0.5)
    second = finished(tmp_path / "b", method="aae", elbo=None, mmd=0.1, nmi=0.5)
    third = finished(tmp_path / "c", method="ddvi", elbo=-18.0, mmd=0.2, nmi=0.5)
    best = comparison.best(comparison.read([first, second, third]))
    assert best == {"elbo": {2}, "mmd": {1}}, "a draw has no best"
    assert comparison.best(comparison.read([first])) == {}


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"evaluation": "quick"}, "some in full"),
        ({"fingerprint": {"digits": "xyz"}}, "different data"),
        ({"measured_on": "validation"}, "different data"),
    ],
)
def test_what_is_not_comparable_has_no_best_and_is_said(other: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    runs = comparison.read([finished(tmp_path / "a"), finished(tmp_path / "b", elbo=-1.0, **other)])
    assert comparison.best(runs) == {}
    assert any(sentence in note for note in comparison.notes(runs))


def test_the_terminal_has_bold_and_a_file_a_star(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["compare", str(finished(tmp_path / "a")), str(finished(tmp_path / "b", method="ddvi", elbo=-20.0))]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("elbo")]
    assert line.split() == ["elbo", "-25.000", "-20.000*", "higher"]
    assert "several seeds" in said
    monkeypatch.setattr(progress, "console", lambda: Console(force_terminal=True, highlight=False, markup=False))
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "\x1b[1m-20.000\x1b[0m" in said
    assert "\x1b[1m-25.000" not in said
    assert "*" not in said


def test_what_is_no_run_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(finished(tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    unfinished = finished(tmp_path / "unfinished")
    (unfinished / "metrics.json").unlink()
    for words, sentence in (
        ([run], "takes two run folders or more, not 1"),
        ([run, str(tmp_path / "empty")], "holds no config.yaml"),
        ([run, str(tmp_path / "nowhere")], "there is no run folder"),
        ([run, run], "named twice"),
        ([run, str(unfinished)], "is not finished"),
        ([run, run, "out=x"], "unknown setting of a comparison"),
    ):
        assert cli.main(["compare", *words]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert sentence in said.err
        assert said.err.count("\n") == 1


def test_several_reports_go_where_all_runs_are(tmp_path: Path) -> None:
    assert comparison.common_folder([tmp_path / "a"]) == tmp_path / "a"
    assert comparison.common_folder([tmp_path / "x/a/seed0", tmp_path / "x/b/seed0"]) == tmp_path / "x"
    assert comparison.common_folder([tmp_path / "a", tmp_path / "b"]) == tmp_path
