"""Commands on trained runs: `ddvi report`, `compare`, `embed`, `sample`.

Each takes what the command line has parsed and returns the exit status; torch is imported when all names are right.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddvi import folders
from ddvi.catalogue import MEASURES
from ddvi.errors import InputError, check_name
from ddvi.files import check_file
from ddvi.settings import convert

if TYPE_CHECKING:
    from rich.table import Table

    from ddvi.tables import Run


def _check(command: str, given: Mapping[str, str], allowed: Sequence[str]) -> None:
    for name in given:
        check_name(f"setting of {command}", name, allowed)


def report(names: Sequence[str], given: Mapping[str, str]) -> int:
    """Write the page of one run, or of several side by side."""
    _check("a report", given, ["out", "data_root"])
    from ddvi import runs

    output = Path(given["out"]) if given.get("out") else None
    print(runs.report(_several("report", names, 1), output, given.get("data_root")))
    return 0


def compare(names: Sequence[str], given: Mapping[str, str]) -> int:
    """Print the measures of runs side by side, the best in bold; in a file, where nothing is bold, with a star."""
    _check("a comparison", given, [])
    from ddvi import comparison, progress

    runs = comparison.read(_several("compare", names, 2))
    console = progress.console()
    console.print(_table(runs, stars=not console.is_terminal))
    for note in comparison.notes(runs):
        console.print(note, soft_wrap=True)
    return 0


def _several(command: str, names: Sequence[str], least: int) -> list[Path]:
    if len(names) < least:
        wanted = "a run folder" if least == 1 else "two run folders or more"
        raise InputError(f"'ddvi {command}' takes {wanted}, not {len(names)}; see 'ddvi {command} --help'")
    return [Path(name) for name in names]


def _table(runs: Sequence[Run], stars: bool) -> Table:
    from rich.table import Table
    from rich.text import Text

    from ddvi import comparison

    best, values = comparison.best(runs), [run.values() for run in runs]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("measure", style="cyan", no_wrap=True)
    for name in comparison.names(runs):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("better", no_wrap=True)
    for measure, (_, better) in MEASURES.items():
        if not any(measure in each for each in values):
            continue
        cells = []
        for number, each in enumerate(values):
            top = number in best.get(measure, ())
            text = f"{each[measure]:.3f}" if measure in each else "–"
            mark = ("*" if top else " ") if stars and best else ""
            cells.append(Text(text + mark, style="bold" if top else ""))
        table.add_row(measure, *cells, better)
    return table


def sample(folder: Path, given: Mapping[str, str], arguments: argparse.Namespace) -> int:
    """Draw from a trained model into a file."""
    _check("sampling", given, ["seed"])
    seed = convert("seed", given.get("seed", 0))
    if arguments.count < 1:
        raise InputError(f"-n {arguments.count} is not at least 1")
    output = Path(arguments.output or folder / "samples.npz")
    if output.suffix != ".npz":
        raise InputError(f"-o {output} doesn't end in .npz, the one form in which x, mean and z are written; let it")
    folders.read_settings(folder)
    check_file(output)
    import numpy as np

    from ddvi import runs
    from ddvi.files import write_aside

    draws = runs.sample(folder, arguments.count, seed)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, x=draws["x"].numpy(), mean=draws["mean"].numpy(), z=draws["z"].numpy())

    write_aside(output, write)
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in draws.items())
    print(f"{output}: {shapes}")
    return 0


def embed(names: Sequence[str], given: Mapping[str, str], output: str | None) -> int:
    """Write latents, bounds and class probabilities of data into a table."""
    _check("an embedding", given, ["seed", "samples", "data_root", "device", "threads"])
    if len(names) != 2:
        raise InputError(f"'ddvi embed' takes a run folder and data, not {len(names)} names; see 'ddvi embed --help'")
    folder, data = Path(names[0]), names[1]
    if not folder.is_dir():
        raise InputError(f"there is no run folder '{folder}'; 'ddvi train' prints where it puts one")
    from ddvi import embedding

    values = {name: convert(name, value) for name, value in given.items()}
    folders.read_settings(folder)
    folders.check_trained(folder)
    path = Path(output or folder / "latents.csv")
    embedding.check_output(path)
    embedding.check_source(data)
    source = Path(data).expanduser()
    if path.exists() and source.exists() and path.samefile(source):
        raise InputError(f"{path} is the data itself, which would be lost; give another file to write")
    check_file(path)
    from ddvi import progress

    console = progress.console()
    with progress.Counter(console, "rows") as counter:
        columns, count = embedding.embed(folder, data, path, values, counter.advance)
    console.print(f"{path}: {count:,} rows of {', '.join(columns)}", soft_wrap=True)
    return 0
