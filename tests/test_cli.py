"""The command line as a user meets it: answers, sentences, exit statuses."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddvi import cli, folders

SMALL = ("digits", "vae", "pinwheel", "hidden_size=16", "limit=200", "evaluation=quick")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["list"], 0),
        (["train", "--help"], 0),
        (["trian"], 2),
        (["train", "mnist", "vae"], 2),
        (["train", "minst", "vae", "pinwheel"], 2),
        (["train", "mnist", "vae", "pinwheel", "epochs=x"], 2),
        (["train", "digits", "vae", "pinwheel", "out=/dev/null/run"], 2),
        (["evaluate", "/nowhere"], 2),
        (["study", "--help"], 0),
        (["study", "nope"], 2),
        (["study", "mnist", "vae,vea", "pinwheel"], 2),
        (["tables", "/nowhere"], 2),
        (["sample"], 2),
        (["report", "--help"], 0),
        (["report"], 2),
        (["report", "/nowhere"], 2),
        (["compare", "/nowhere", "/nowhere"], 2),
        (["embed", "/nowhere", "digits"], 2),
    ],
)
def test_answers_that_need_no_torch_import_none(words: list[str], status: int) -> None:
    code = (
        "import sys\nfrom ddvi import cli\n"
        "try: status = cli.main(sys.argv[1:])\nexcept SystemExit as end: status = end.code\n"
        "assert not {'torch', 'numpy', 'matplotlib', 'sklearn'} & set(sys.modules), 'a heavy import'\nsys.exit(status)"
    )
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == (status != 0)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "did you mean 'train'?"),
        (["mnist", "vae", "pinwheel"], "did you mean 'ddvi train mnist …'?"),
        (["train", "mnist", "vae"], "'mnist vae' are 2 of 3 names"),
        (["train", "--epochs=3"], "write epochs=…"),
        (["train", "--fast"], "settings are written key=value"),
        (["train", "digits", "vae", "pinwheel", "epoch=3"], "did you mean 'epochs'?"),
        (["evaluate"], "takes one run folder"),
        (["sample", ".", "sed=3"], "did you mean 'seed'?"),
        (["sample", ".", "-n", "0"], "at least 1"),
        (["sample", "."], "holds no config.yaml"),
        (["report", "."], "holds no config.yaml"),
        (["report", ".", "to=x"], "choose from out, data_root"),
        (["embed", ".", "digits"], "holds no config.yaml"),
        (["sample", ".", "-n", "many"], "invalid int value: 'many'; see 'ddvi sample --help'"),
        (["sample", ".", "-o", "x.csv"], "-o x.csv doesn't end in .npz"),
    ],
)
def test_mistakes_get_one_sentence(
    words: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("ddvi: ")
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_list_names_everything_within_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    for name in ("digits", "mnist", "cifar", "h_iaf_vae", "diff_vae_warmup", "less_noisy_square", "sleep_weight"):
        assert name in text
    assert "E[z_0|z_t]" in text  # not taken for markup
    assert max(map(len, text.splitlines())) <= 80


def test_train_evaluate_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert cli.main(["train", *SMALL, "epochs=1", f"out={folder}"]) == 0
    said = capsys.readouterr().out
    assert "epoch 1/1" in said
    assert re.search(r"log_likelihood +-\d+\.\d{3} +\d\.\d{3} +higher", said)
    assert str(folder) in said
    before = folders.read_metrics(folder)
    (folder / "metrics.json").unlink()
    assert cli.main(["evaluate", str(folder), "threads=1"]) == 0
    after = folders.read_metrics(folder)
    assert after.pop("seconds").keys() == before.pop("seconds").keys()
    assert after == before
    assert cli.main(["evaluate", str(folder), "lr=1"]) == 2
    assert cli.main(["sample", str(folder), "-n", "7", "-o", str(tmp_path / "draws.npz"), "seed=2"]) == 0
    with np.load(tmp_path / "draws.npz") as draws:
        assert draws["x"].shape == draws["mean"].shape == (7, 1, 8, 8)
        assert draws["z"].shape == (7, 2)
        assert set(np.unique(draws["x"])) == {0, 1}
        assert 0 < draws["mean"].min() < draws["mean"].max() < 1


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, brief: None) -> None:
    folder = tmp_path / "run"
    words = [*SMALL, "epochs=150", "report=false", f"out={folder}"]
    program = [sys.executable, "-m", "ddvi.cli", "train"]
    process = subprocess.Popen([*program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "history.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    stopped = re.fullmatch(r"ddvi: stopped at epoch (\d+) of 150; go on with: ddvi train (.*)\n", error)
    assert stopped, error
    again = stopped[2].split()
    assert again == [*words, "resume=true"]
    assert not (folder / "metrics.json").exists()
    assert cli.main(["train", *words]) == 2
    assert cli.main(["train", *again]) == 0
    epochs = [int(row["epoch"]) for row in folders.read_history(folder)]
    assert epochs == list(range(1, 151))


@pytest.mark.slow
def test_two_devices_stop_together_and_one_goes_on(tmp_path: Path, brief: None) -> None:
    """As a terminal does it, Ctrl-C reaches both processes; one of them speaks."""
    folder = tmp_path / "run"
    words = [*SMALL, "epochs=150", "report=false", f"out={folder}", "device=cpu", "devices=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "ddvi.cli", "train"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*program, *words], **pipes, env=environment, start_new_session=True)
    deadline = time.monotonic() + 100
    while not (folder / "history.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, error = process.communicate(timeout=100)  # the pipes are closed when both have ended
    assert process.returncode == 130
    assert output.count("2 processes share each batch") == output.count("epoch 1/150") == 1
    stopped = re.fullmatch(r"ddvi: stopped at epoch (\d+) of 150; go on with: ddvi train (.*)\n", error)
    assert stopped, error
    assert cli.main(["train", *stopped[2].split(), "devices=1"]) == 0
    assert [int(row["epoch"]) for row in folders.read_history(folder)] == list(range(1, 151))


def test_what_goes_on_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ddvi.runs.train", stopped)
    monkeypatch.setenv("DDVI_PROGRAM", "/my files/run.sh")
    assert cli.main(["train", *SMALL, f"out={tmp_path / 'a run'}"]) == 130
    (command,) = re.findall(r"go on with: (.*)\n", capsys.readouterr().err)
    assert shlex.split(command) == ["/my files/run.sh", *SMALL, f"out={tmp_path / 'a run'}", "resume=true"]


def test_an_encoding_without_our_signs_is_no_error() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-m", "ddvi.cli", "list"]
    result = subprocess.run(words, env=environment, capture_output=True, timeout=60, check=True)
    assert b"swiss_roll" in result.stdout
    assert result.stderr == b""


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "ddvi.cli", "list"], stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert result.stderr == b""
