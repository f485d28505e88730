"""The page: what was gathered, put into the markup, with style, scripts and the plotting library inside.

Whatever a user has named (data sets, labels, paths) is text: escaped in markup, and in scripts' data by JSON without a
single angle bracket. The plotting library is the one that the package plotly brings, compressed once; a browser unpacks
it.
"""

from __future__ import annotations

import base64
import functools
import gzip
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ddvi import comparison, folders
from ddvi.catalogue import LIKELIHOODS, MEASURES, PRIORS
from ddvi.comparison import Run
from ddvi.figures import PALETTE, colours_of
from ddvi.methods import METHODS
from ddvi.settings import FIELDS, as_text, deviations

_HERE = Path(__file__).parent
_SCRIPTS = ("page.js", "latents.js", "path.js", "figures.js")
_HEADLINES = ("log_likelihood", "elbo", "accuracy", "inference_gap", "mmd", "knn_accuracy", "latent_nll", "nmi")
_MOST_HEADLINES = 5


def render(runs: Sequence[Run], gathered: Sequence[Mapping[str, Any]]) -> str:
    """The page's text.

    Args:
        runs: finished runs.
        gathered: of each what `gather` returns.
    """
    names = comparison.names(runs)
    data, entries = {}, []
    for run, name, found in zip(runs, names, gathered, strict=True):
        shown = found["data"]
        classes = shown["classes"]
        data[shown["key"]] = shown | {"colours": colours_of(len(classes)) if classes else []}
        facts = {"name": name, "data": shown["key"], "history": _history(run)}
        entries.append({**found, **facts, **_labels(run)})
    title = " · ".join([runs[0].place[0], runs[0].row[0], runs[0].settings.prior])
    if several := len(runs) > 1:
        title = f"{len(runs)} runs: {', '.join(names)}"
    wide = several or not all(shown["image"] for shown in data.values())
    content = {"runs": entries, "data": data, "palette": list(PALETTE)}
    return Template((_HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        head=_head(runs, names),
        wide="several" if wide else "",
        measures=_measures(runs, names),
        provenance="".join(_provenance(run, name) for run, name in zip(runs, names, strict=True)),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        data=_json(content),
        library=_library(),
        scripts="\n".join((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS),
    )


def _json(content: Any) -> str:
    """JSON that can stand inside a script element whatever text it holds."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@functools.cache
def _library() -> str:
    """plotly.min.js, gzipped, as base64."""
    source = importlib.resources.files("plotly") / "package_data" / "plotly.min.js"
    return base64.b64encode(gzip.compress(source.read_bytes(), mtime=0)).decode("ascii")


def _head(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The title, what a single run is in words, and its first measures in large figures."""
    if len(runs) > 1:
        items = "".join(f'<li><a href="#run-{i}">{escape(name)}</a></li>' for i, name in enumerate(names))
        return f"<h1>{len(runs)} runs side by side</h1><ul class='names'>{items}</ul>"
    run, metrics = runs[0], runs[0].metrics
    method, settings = METHODS[run.settings.method], run.settings
    told = [
        f"<b>{escape(run.row[0])}</b>, {escape(method.description)}",
        f"<b>{escape(settings.prior)}</b> prior, {escape(PRIORS[settings.prior].description)}",
        f"trained {metrics.get('epochs')} epochs with <b>{escape(settings.objective)}</b> on"
        f" {metrics.get('n_train'):,} examples of <b>{escape(run.place[0])}</b>, seed {settings.seed}",
    ]
    values = run.values()
    shown = [name for name in _HEADLINES if name in values][:_MOST_HEADLINES]
    figures = "".join(
        f"<div><dd>{_number(values[name])}</dd><dt>{escape(name.replace('_', ' '))}</dt></div>" for name in shown
    )
    title = "<span>·</span>".join(escape(part) for part in (run.place[0], run.row[0], settings.prior))
    return f"<h1>{title}</h1><p class='lead'>{'; '.join(told)}.</p><dl class='headlines'>{figures}</dl>"


def _number(value: float, decimals: int | None = None) -> str:
    """Enough digits to tell runs apart, with a true minus."""
    decimals = _decimals(value) if decimals is None else decimals
    return f"{value:,.{decimals}f}".replace("-", "−")


def _decimals(value: float) -> int:
    return 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3


def _measures(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The closing table, a column a run; what each measure means shows on hover and on focus."""
    values, best = [run.values() for run in runs], comparison.best(runs)
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    if len(runs) == 1:  # there is room for what else shows on demand
        heads += '<th scope="col" class="meaning">meaning</th>'
    rows = []
    for number, (measure, (meaning, better)) in enumerate(MEASURES.items()):
        if not any(measure in each for each in values):
            continue
        cells = []
        for index, (run, each) in enumerate(zip(runs, values, strict=True)):
            if measure not in each:
                cells.append('<td class="none">–</td>')
                continue
            error = run.metrics.get(f"{measure}_standard_error")
            value, decimals = each[measure], _decimals(each[measure])
            text = _number(value) + (f" <small>± {_number(error, decimals)}</small>" if error is not None else "")
            cells.append(f"<td><strong>{text}</strong></td>" if index in best.get(measure, ()) else f"<td>{text}</td>")
        if len(runs) == 1:
            cells.append(f'<td class="meaning">{escape(meaning)}</td>')
        arrow = "↑" if better == "higher" else "↓"
        counts = _counts(measure, runs[0])
        tip = f"{meaning}. {better.capitalize()} is better.{f' {counts}' if counts else ''}"
        rows.append(
            f'<tr><th scope="row"><button type="button" class="term" aria-describedby="tip-{number}">'
            f'{escape(measure.replace("_", " "))}</button> <span class="arrow" aria-hidden="true">{arrow}</span>'
            f'<span class="tip" role="tooltip" id="tip-{number}">{escape(tip)}</span></th>{"".join(cells)}</tr>'
        )
    said = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes(runs))
    legend = "± is the standard error over test examples; ↑ higher is better, ↓ lower." + (
        " Bold: the best of these runs." if best else ""
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table of measures"><table class="measures"><thead>'
        f'<tr><th scope="col">measure</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f'<ul class="notes"><li>{legend}</li>{said}</ul>'
    )


def _counts(measure: str, run: Run) -> str:
    """How much a measure has looked at, in words."""
    metrics = run.metrics
    known = {
        "draws": metrics.get(f"{measure}_draws"),
        "nodes": metrics.get(f"{measure}_nodes"),
        "examples": metrics.get(f"{measure}_examples") or metrics.get("test_examples"),
    }
    found = [f"{value:,} {name}" for name, value in known.items() if isinstance(value, int)]
    return f"From {', '.join(found)}." if found else ""


def _history(run: Run) -> dict[str, list[float | None]]:
    """The history by column, numbers or nothing."""
    rows = folders.read_history(run.folder)
    return {name: [_finite(row.get(name)) for row in rows] for name in ("epoch", *folders.terms(rows))} if rows else {}


def _finite(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def _labels(run: Run) -> dict[str, Any]:
    """What a classifier has confused, where there is one."""
    metrics = run.metrics
    if "confusion_matrix" not in metrics:
        return {}
    return {name: metrics.get(name) for name in ("confusion_matrix", "accuracy", "calibration_error")}


def _several(count: int | None, unit: str) -> str:
    return f"{count} {unit}{'s' * (count != 1)}"


def _provenance(run: Run, name: str) -> str:
    """Command, settings, versions, commit, machine and data of a run."""
    config, metrics, settings = folders.read_config(run.folder), run.metrics, run.settings
    changed = deviations(settings)
    likelihood = str(metrics.get("likelihood"))
    machine, seconds = metrics.get("machine") or {}, metrics.get("seconds") or {}
    facts = {
        "likelihood": f"{likelihood}, {LIKELIHOODS.get(likelihood, '')}",
        "commit": run.commit,
        "versions": ", ".join(f"{key} {value}" for key, value in (config.get("versions") or {}).items()),
        "machine": f"{machine.get('processor')}; {_several(machine.get('cores'), 'core')},"
        f" {_several(machine.get('threads'), 'thread')}, device {metrics.get('device')}",
        "seconds": ", ".join(f"{key} {value:,.0f}" for key, value in seconds.items()),
        "examples": f"{metrics.get('n_train'):,} for training, {metrics.get('n_validation'):,} for validation,"
        f" {metrics.get('n_test'):,} for tests",
        "data": "; ".join(f"{key} SHA-256 {value}" for key, value in (metrics.get("fingerprint") or {}).items()),
        "folder": str(run.folder),
    }
    lines = "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in facts.items() if value)
    rows = "".join(
        f'<tr{" class=changed" if key in changed else ""}><th scope="row">{key}</th>'
        f"<td>{escape(as_text(value))}</td><td>{escape(FIELDS[key].metadata['meaning'])}</td></tr>"
        for key, value in settings.as_dict().items()
    )
    command = escape(comparison.command(run))
    return (
        f'<article class="run"><h3>{escape(name)}</h3><p>The command that reproduces it:</p><div class="command">'
        f'<code>{command}</code><button type="button" class="copy">copy</button></div><dl class="facts">{lines}</dl>'
        f"<details><summary>All settings ({len(changed)} changed from the defaults, marked)</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="Settings"><table class="settings"><thead><tr>'
        f'<th scope="col">setting</th><th scope="col">value</th><th scope="col">meaning</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details></article>"
    )
