"""What the terminal shows: one line that stays one, and plain lines in a file."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ddvi import progress
from ddvi.settings import resolve

ROW = {"epoch": 1, "examples_per_second": 1234.5, "seconds": 1.0, "skipped": 0}
TERMS = {f"a_long_name_of_a_term_{i}": 1.5 * i for i in range(30)}


@pytest.mark.parametrize("width", [30, 80, 200])
def test_the_bar_stays_one_line(width: int) -> None:
    """However many terms there are: the cursor is never moved up, as it is to redraw more than one line."""
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=width, legacy_windows=False)
    with progress.Watcher(console, resolve("digits", "vae", "pinwheel", {"epochs": "20"})) as watcher:
        for epoch in range(20):
            watcher.step(epoch, 1, 2)
            watcher.epoch(ROW | {"epoch": epoch + 1} | TERMS)
            watcher.progress.refresh()
        watcher.message("evaluating: exact log-likelihood: 50,000 nodes, 1,000 of 1,000 examples still move")
        watcher.progress.refresh()
        drawn = terminal.getvalue()
    assert "\x1b[1A" not in drawn
    assert "epoch 20/20" in drawn


def test_a_counter_counts_on_a_terminal_and_is_silent_in_a_file() -> None:
    for terminal in (True, False):
        file = io.StringIO()
        with progress.Counter(Console(file=file, force_terminal=terminal, width=80), "rows") as counter:
            counter.advance(500, 1797)
            counter.progress.refresh()
        assert ("500/1,797 rows" in file.getvalue()) == terminal


def test_redirected_to_a_file_it_is_plain_lines(tmp_path: Path) -> None:
    words = ["digits", "vae", "pinwheel", "hidden_size=16", "limit=200", "evaluation=quick", "epochs=20", "threads=1"]
    command = [sys.executable, "-m", "ddvi.cli", "train", *words, f"out={tmp_path / 'run'}"]
    with (tmp_path / "log").open("wb") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True, timeout=100)
    said = (tmp_path / "log").read_text()
    assert "\x1b" not in said
    assert "\r" not in said
    assert len(re.findall(r"^epoch \d+/20  [\d,]+/s  recon", said, re.MULTILINE)) == 11, "the first and each tenth"
    assert said.splitlines()[-1] == f"report: {tmp_path / 'run/report.html'}"
    assert (tmp_path / "run/report.html").exists()
