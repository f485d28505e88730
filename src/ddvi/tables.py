"""Tables of finished runs: a table for each data set and prior, a row for each method or variant, and their pictures.

A cell is the mean over n seeds with its 95% t-interval,

    x̄ ± t₀.₉₇₅(n − 1) s / √n.

The best of a column is bold where it is better than the second best beyond doubt: the interval of the paired per-seed
difference lies above 0, and all of them were measured alike. Everything comes from the run folders; no run is repeated.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddvi import folders
from ddvi.catalogue import DATASETS, MEASURES, PRIORS
from ddvi.comparison import TRAINING, Run, comparable, differences, run_of
from ddvi.errors import InputError
from ddvi.files import write_aside
from ddvi.folders import CONFIG, METRICS, WEIGHTS
from ddvi.methods import METHODS
from ddvi.study import COMMANDS

FOLDER = "tables"
_POINTS = 5000  # test examples and prior samples in a panel


@dataclass(frozen=True)
class Cell:
    """Mean and half-width of the 95% t-interval (NaN for one seed); `best` beyond doubt or not."""

    mean: float
    half_width: float
    best: bool = False


@dataclass(frozen=True)
class Table:
    """One data set, one prior.

    Args:
        title: data set and prior.
        columns: the measures that apply.
        rows: label, number of seeds, cells by column.
        notes: what holds for all rows: settings, command, commit, machine.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, int, Mapping[str, Cell]]]
    notes: Sequence[str]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """x̄ and t₀.₉₇₅(n − 1) s / √n of n values; the half-width of one value is NaN."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return mean, math.nan
    from scipy.stats import t

    return mean, float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def exceeds(first: Mapping[int, float], second: Mapping[int, float]) -> bool:
    """Whether the 95% t-interval of first − second, paired over the seeds that both have, lies above 0."""
    paired = [first[seed] - second[seed] for seed in first if seed in second]
    if len(paired) < 2:
        return False
    mean, half_width = interval(paired)
    return mean > half_width


def find(root: Path) -> list[Run]:
    """The finished runs under a folder, at any depth.

    Raises:
        InputError: there are none, two are the same run, or a folder is damaged.
    """
    runs: list[Run] = []
    there: dict[tuple[Any, ...], Path] = {}
    for config in sorted(Path(root).rglob(CONFIG)):
        folder = config.parent
        if not (folder / METRICS).exists():
            continue
        run = run_of(folder)
        other = there.setdefault((*run.place, *run.row, run.settings.seed), folder)
        if other != folder:
            raise InputError(f"{folder} and {other} hold the same run; give a folder with only one of them in it")
        runs.append(run)
    if not runs:
        raise InputError(f"there is no finished run under {root}; 'ddvi study' and 'ddvi train' make them")
    return sorted(runs, key=lambda run: (_order(run), run.row, run.settings.seed))


def _order(run: Run) -> tuple[int, int, int]:
    """As in the catalogue; a file comes last."""
    dataset, settings = run.settings.dataset, run.settings
    return (
        [*DATASETS, dataset].index(dataset),
        list(PRIORS).index(settings.prior),
        list(METHODS).index(settings.method),
    )


def grouped(runs: Sequence[Run]) -> dict[tuple[str, str], dict[tuple[str, ...], dict[int, Run]]]:
    """Runs by table, row and seed."""
    groups: dict[tuple[str, str], dict[tuple[str, ...], dict[int, Run]]] = {}
    for run in runs:
        groups.setdefault(run.place, {}).setdefault(run.row, {})[run.settings.seed] = run
    return groups


def labels(rows: Sequence[tuple[str, ...]]) -> tuple[dict[tuple[str, ...], str], list[str]]:
    """What each row is called, and the deviations that all of them share."""
    shared = [change for change in rows[0][1:] if all(change in row for row in rows)]
    names = {row: " ".join([row[0], *(change for change in row[1:] if change not in shared)]) for row in rows}
    return names, shared


def _comparable(first: Mapping[int, Run], second: Mapping[int, Run]) -> bool:
    """Whether the runs of each seed that both rows have were measured alike."""
    return all(comparable([first[seed], second[seed]]) for seed in first if seed in second)


def tabulate(
    place: tuple[str, str], rows: Mapping[tuple[str, ...], Mapping[int, Run]], commands: Sequence[str] = ()
) -> Table:
    """The table of one data set and prior.

    Args:
        place: their names.
        rows: runs by seed, by row.
        commands: those that made the runs.
    """
    names, shared = labels(list(rows))
    found = {row: {seed: run.values() for seed, run in seeds.items()} for row, seeds in rows.items()}
    cells: dict[tuple[str, ...], dict[str, Cell]] = {row: {} for row in rows}
    columns = [*MEASURES, TRAINING]
    for column in columns:
        by_row = {
            row: {seed: values[column] for seed, values in seeds.items() if column in values}
            for row, seeds in found.items()
        }
        by_row = {row: values for row, values in by_row.items() if values}
        means = {row: interval(list(values.values())) for row, values in by_row.items()}
        winner = None
        if len(by_row) > 1 and column in MEASURES:
            sign = 1 if MEASURES[column][1] == "higher" else -1
            first, second = sorted(by_row, key=lambda row: -sign * means[row][0])[:2]
            signed = ({seed: sign * value for seed, value in by_row[row].items()} for row in (first, second))
            winner = first if exceeds(*signed) and _comparable(rows[first], rows[second]) else None
        for row, (mean, half_width) in means.items():
            cells[row][column] = Cell(mean, half_width, row == winner)
    columns = [column for column in columns if any(column in cells[row] for row in rows)]
    runs = [run for seeds in rows.values() for run in seeds.values()]
    settings = [f"settings: {' '.join(shared)}"] if shared else []
    seeds = {run.settings.seed for run in runs}
    together = ([run for run in runs if run.settings.seed == seed] for seed in seeds)
    warnings = list(dict.fromkeys(warning for part in together for warning in differences(part)))
    return Table(
        f"{place[0]}, {place[1]}",
        columns,
        [(names[row], len(rows[row]), cells[row]) for row in rows],
        [*settings, *(f"command: {command}" for command in commands), *_provenance(runs), *warnings],
    )


def _machine(run: Run) -> str:
    known, device = run.metrics.get("machine", {}), run.metrics.get("device", "cpu")
    words = [f"{known['processor']}, {known['cores']} cores, {known['threads']} threads a run"] if known else []
    words += [device] * (device != "cpu")
    return ", ".join([*words, f"torch {run.metrics.get('versions', {}).get('torch', 'unknown')}"])


def _provenance(runs: Sequence[Run]) -> list[str]:
    """Commits, machines and evaluations of runs, each with how many of them where they differ."""
    kinds = {
        "commit": [run.commit for run in runs],
        "machine": [_machine(run) for run in runs],
        "epochs": [str(run.metrics.get("epochs")) for run in runs],
        "evaluation": [str(run.metrics.get("evaluation")) for run in runs],
    }
    lines = []
    for kind, found in kinds.items():
        counts = Counter(found)
        common = counts.most_common()
        each = [text if len(counts) == 1 else f"{text} ({n} of {len(runs)} runs)" for text, n in common]
        lines.append(f"{kind}: {'; '.join(each)}")
    return lines


def _decimals(cells: Sequence[Cell]) -> int:
    """Enough for two digits of a typical half-width; where there is none, for a thousandth of the largest mean."""
    widths = [cell.half_width for cell in cells if cell.half_width > 0]
    scale = statistics.median(widths) if widths else max(abs(cell.mean) for cell in cells) / 1000
    return min(4, max(1, 1 - math.floor(math.log10(scale)))) if scale > 0 else 1


def _texts(table: Table, column: str, plus_minus: str) -> list[tuple[str, bool]]:
    """A column as text, row by row; whether it is the best."""
    cells = [row[2].get(column) for row in table.rows]
    decimals = _decimals([cell for cell in cells if cell])
    texts = []
    for cell in cells:
        if cell is None:
            texts.append(("–", False))
            continue
        half_width = "" if math.isnan(cell.half_width) else f" {plus_minus} {cell.half_width:.{decimals}f}"
        texts.append((f"{cell.mean:.{decimals}f}{half_width}", cell.best))
    return texts


def _heads(table: Table) -> list[str]:
    """Columns, with ↑ or ↓ for what is better."""
    arrows = {"higher": " ↑", "lower": " ↓"}
    return [column + (arrows[MEASURES[column][1]] if column in MEASURES else "") for column in table.columns]


def markdown(table: Table) -> str:
    """As Markdown."""
    columns = [_texts(table, column, "±") for column in table.columns]
    lines = [
        f"**{table.title}**: mean ± 95% t-interval over seeds; bold where better than the second best (paired, 95%)",
        "",
        "| " + " | ".join(["method", "seeds", *_heads(table)]) + " |",
        "|" + "|".join(["---", *["---:"] * (1 + len(table.columns))]) + "|",
    ]
    for number, (label, seeds, _) in enumerate(table.rows):
        texts = [f"**{text}**" if best else text for text, best in (column[number] for column in columns)]
        lines.append("| " + " | ".join([label, str(seeds), *texts]) + " |")
    return "\n".join([*lines, "", *(f"* {note}" for note in table.notes)]) + "\n"


def latex(table: Table) -> str:
    """As LaTeX, for the package booktabs; notes are comments."""

    def escaped(text: str) -> str:
        return re.sub(r"([_%&#$])", r"\\\1", text)

    columns = [_texts(table, column, r"\pm") for column in table.columns]
    heads = [escaped(head) for head in _heads(table)]
    heads = [head.replace("↑", r"$\uparrow$").replace("↓", r"$\downarrow$") for head in heads]
    lines = [f"% {note}" for note in (table.title, *table.notes)]
    lines += [r"\begin{tabular}{l" + "r" * (1 + len(columns)) + "}", r"\toprule"]
    lines += [" & ".join(["method", "seeds", *heads]) + r" \\", r"\midrule"]
    for number, (label, seeds, _) in enumerate(table.rows):
        cells = [column[number] for column in columns]
        texts = ["--" if text == "–" else rf"$\mathbf{{{text}}}$" if best else f"${text}$" for text, best in cells]
        lines.append(" & ".join([escaped(label), str(seeds), *texts]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def comma_separated(table: Table) -> str:
    """As CSV with every digit: for each measure mean, half-width (_interval) and whether it is bold (_best)."""
    text = io.StringIO()
    text.writelines(f"# {note}\n" for note in (table.title, *table.notes))
    heads = [head for column in table.columns for head in (column, f"{column}_interval", f"{column}_best")]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seeds", *heads])
    for label, seeds, cells in table.rows:
        row: list[Any] = [label, seeds]
        for column in table.columns:
            cell = cells.get(column)
            half_width = "" if cell is None or math.isnan(cell.half_width) else cell.half_width
            row += ["", "", ""] if cell is None else [cell.mean, half_width, int(cell.best)]
        writer.writerow(row)
    return text.getvalue()


def one_by_one(runs: Sequence[Run]) -> str:
    """As CSV a line for each run: what it is, its measures, and where they come from."""
    text = io.StringIO()
    columns = [*MEASURES, TRAINING]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "prior", "method", "settings", "seed", *columns, "commit", "machine"])
    for run in runs:
        (method, *deviations), values = run.row, run.values()
        measured = [values.get(column, "") for column in columns]
        writer.writerow(
            [*run.place, method, " ".join(deviations), run.settings.seed, *measured, run.commit, _machine(run)]
        )
    return text.getvalue()


def write(root: Path, output: Path | None = None) -> list[Path]:
    """Write every table of the runs under a folder, in each form, and the runs one by one; return the files.

    Args:
        root: with run folders in it, at any depth.
        output: where they go; `tables` in root if None.

    Raises:
        InputError: as `find`, or the output can't be written.
    """
    root, output = Path(root), Path(output or Path(root) / FOLDER)
    commands = (root / COMMANDS).read_text().splitlines() if (root / COMMANDS).exists() else []
    runs = find(root)
    tables = {place: tabulate(place, rows, commands) for place, rows in grouped(runs).items()}
    forms = (("md", markdown), ("csv", comma_separated), ("tex", latex))
    texts = {f"{'-'.join(place)}.{end}": form(table) for place, table in tables.items() for end, form in forms}
    texts["runs.csv"] = one_by_one(runs)
    folders.make_writable(output)
    for name, text in texts.items():
        write_aside(output / name, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    return [output / name for name in texts]


def draw(root: Path, output: Path | None = None, data_root: str | None = None) -> list[Path]:
    """Draw the latent spaces of the runs under a folder, a picture a data set: priors down, methods across.

    The prior itself stands last; of several seeds the first is shown.

    Args:
        root: as `write`.
        output: as `write`.
        data_root: folder with the data, empty for the cache; each run's own if None.

    Raises:
        InputError: as `find`, or the data can't be read.
    """
    from ddvi import evaluation, figures, runs
    from ddvi.randomness import generator

    output = Path(output or Path(root) / FOLDER)
    groups = grouped([run for run in find(root) if (run.folder / WEIGHTS).exists()])
    folders.make_writable(output)
    files = []
    for name in dict.fromkeys(name for name, _ in groups):
        tables = {prior: rows for (dataset, prior), rows in groups.items() if dataset == name}
        columns = list(dict.fromkeys(row for rows in tables.values() for row in rows))
        titles, _ = labels(columns)
        pictures: list[list[tuple[str, Any, Any] | None]] = []
        loaded: runs.Loaded = {}
        for rows in tables.values():
            panels: list[tuple[str, Any, Any] | None] = []
            prior_z = None
            for column in columns:
                if column not in rows:
                    panels.append(None)
                    continue
                settings, model, shown = runs.load_with_data(
                    next(iter(rows[column].values())).folder, data_root, loaded
                )
                y = None if shown.test_y is None else shown.test_y[:_POINTS]
                with runs.arithmetic(settings):
                    x = evaluation.prepared(model.preprocessing, shown.test_x[:_POINTS])
                    z = evaluation.latents(model, x, settings.seed)
                    prior_z = model.prior.sample((_POINTS,), generator=generator(settings.seed, "latent spaces"))
                panels.append((titles[column].replace(" ", "\n"), z, y))
            pictures.append([*panels, ("prior", prior_z, None)])
        path = output / f"{name}.png"
        figures.save(figures.latent_spaces(pictures, [prior.replace("_", " ") for prior in tables]), path)
        files.append(path)
    return files
