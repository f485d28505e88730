"""The report: one page on one run or on several side by side, complete in one file that opens from disk.

`gathering` asks a run's model for all that the page shows, as plain values; `page` knows how it looks. The page's own
markup, style and scripts are files beside this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddvi.comparison import Run
from ddvi.files import write_aside

if TYPE_CHECKING:
    from ddvi.data import Dataset
    from ddvi.model import LatentVariableModel


def gather(run: Run, model: LatentVariableModel, dataset: Dataset) -> dict[str, Any]:
    """All that the page shows of a run's trained model, as plain values."""
    from ddvi.report.gathering import gather

    return gather(model, dataset, run.settings)


def write(found: Sequence[Run], gathered: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Write the page on finished runs, from what was gathered of each."""
    from ddvi.report.page import render

    text = render(found, gathered)
    write_aside(output, lambda temporary: temporary.write_text(text, encoding="utf-8"))
