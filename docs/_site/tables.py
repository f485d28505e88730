"""Tables that are made of the code when the site is built, where a page has a block `{generated} WHAT`.

What stands inside of such a block is shown where nothing is generated; the site puts the table in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from _site.links import ROOT
from ddvi import catalogue, study
from ddvi.methods import ALIASES, METHODS
from ddvi.settings import (
    DATASET_DEFAULTS,
    FIELDS,
    N_LABELS,
    OBJECTIVE_DEFAULTS,
    OBJECTIVE_SETTINGS,
    PIXEL_VALUES,
    STUDY_EPOCHS,
    Settings,
    as_text,
    resolve,
)

PAPERS = {name: alias for alias, name in ALIASES.items()}
_OWN = ("seed", "out", "data_root", "device", "devices", "threads", "resume", "overwrite", "report", "logger")


def setup(app: Any) -> None:
    app.add_directive("generated", Generated)


class Generated(SphinxDirective):
    """A table or list of the code, by name, with what it is about behind the name."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[nodes.Node]:
        name, *about = self.arguments[0].split()
        holder = nodes.container(classes=["generated"])
        self.state.nested_parse(StringList(GENERATORS[name](*about).splitlines()), 0, holder)
        return holder.children


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head = list(header)
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _allowed(name: str) -> str:
    field = FIELDS[name]
    if isinstance(field.default, bool):
        return "true, false"
    allowed = field.metadata
    if allowed["choices"]:
        return ", ".join(f"`{choice}`" for choice in allowed["choices"])
    limits = {"above": "above {:g}", "minimum": "{:g} or more", "maximum": "at most {:g}"}
    return ", ".join(text.format(allowed[key]) for key, text in limits.items() if allowed[key] is not None) or "text"


def _value(value: Any) -> str:
    return f"`{as_text(value)}`" if value != "" else ""


def settings_table(names: Iterable[str], values: Mapping[str, Any] | None = None) -> str:
    values = values or {name: field.default for name, field in FIELDS.items()}
    rows = [(f"`{name}`", _value(values[name]), _allowed(name), FIELDS[name].metadata["meaning"]) for name in names]
    return table(("setting", "default", "allowed", "meaning"), rows)


def settings() -> str:
    return settings_table(name for name in FIELDS if name not in ("dataset", "method", "prior", "semi_supervised"))


def dataset_defaults() -> str:
    every = dict.fromkeys(name for values in DATASET_DEFAULTS.values() for name in values)
    rows = [
        (f"`{dataset}`", *(_value(DATASET_DEFAULTS.get(dataset, {}).get(name, FIELDS[name].default)) for name in every))
        for dataset in catalogue.DATASETS
    ]
    return table(("data set", *(f"`{name}`" for name in every)), rows)


def methods() -> str:
    rows = [
        (
            f"[`{name}`]({name}.md)",
            f"`{PAPERS.get(name, name)}`" if name != "nsf_vae" else "–",
            m.description,
            *_trained(m),
        )
        for name, m in METHODS.items()
    ]
    return table(("name", "in the paper's commands", "posterior", "trained by default with", "or by"), rows)


def _trained(method: Any) -> tuple[str, str]:
    own, *others = (f"[`{name}`](../objectives.md#{name})" for name in method.objectives)
    return own, ", ".join(others) or "–"


def settings_of(method: str) -> str:
    """What a method's posterior takes, and what its own objective reads."""
    chosen = resolve("mnist", method, "pinwheel").as_dict()
    own = METHODS[method].objective
    extra = ("warmup", "warmup_kl_weight", "freeze_decoder") if METHODS[method].warms_up else ("freeze_decoder",)
    names = dict.fromkeys(
        (*METHODS[method].reads, *OBJECTIVE_SETTINGS[own], *extra, "latent_size", "hidden_size", "dropout")
    )
    names.pop("label_rate", None)
    return settings_table(names, chosen)


def composition(method: str) -> str:
    """A method's composition in a few lines."""
    m = METHODS[method]
    name = m.posterior_class().__name__
    rows = [
        ("name", f"`{method}`" + (f", in the paper's commands `{PAPERS[method]}`" if method in PAPERS else "")),
        ("posterior", f"{{py:class}}`~ddvi.{name}`"),
        ("objective", f"[`{m.objective}`](../objectives.md#{m.objective})"),
        ("others that train it", ", ".join(f"`{other}`" for other in m.objectives[1:]) or "none"),
        ("prior", "any, see [priors](../priors.md)"),
        ("likelihood", "any, chosen by the data, see [own data](../own_data.md)"),
    ]
    return table(("part", "is"), rows)


def objectives() -> str:
    rows = []
    for name, meaning in catalogue.OBJECTIVES.items():
        by = [f"`{key}`" for key, method in METHODS.items() if method.objective == name]
        rows.append((f"[`{name}`](#{name})", meaning, ", ".join(by) or "–"))
    return table(("objective", "maximises", "the default of"), rows)


def settings_of_objective(objective: str) -> str:
    defaults = {name: field.default for name, field in FIELDS.items()} | OBJECTIVE_DEFAULTS.get(objective, {})
    return settings_table(OBJECTIVE_SETTINGS[objective], defaults)


def priors() -> str:
    import pkgutil

    rows = []
    for name, prior in catalogue.PRIORS.items():
        width = pkgutil.resolve_name(prior.source).default_width
        rows.append((f"`{name}`", prior.description, f"{width:g}" if width else "none", prior.smallest_latent_size))
    return table(("prior", "shape", "`width` by default", "least D"), rows)


def measures() -> str:
    return table(("key", "says", "better"), ((f"`{name}`", *about) for name, about in catalogue.MEASURES.items()))


def effort() -> str:
    from ddvi.evaluation import FULL, QUICK

    def shown(value: object) -> str:
        return "all" if value is None else f"{value:,}"

    rows = [(f"`{name}`", shown(full), shown(getattr(QUICK, name))) for name, full in vars(FULL).items()]
    return table(("what is counted", "`evaluation=full`", "`evaluation=quick`"), rows)


def named(what: str) -> str:
    """Names with a line on each: DATASETS, LIKELIHOODS, NOISE_SCHEDULES."""
    return table(("name", "is"), ((f"`{name}`", text) for name, text in getattr(catalogue, what).items()))


def labels() -> str:
    return table(("data set", "labels seen by default"), ((f"`{name}_semi`", f"{n:,}") for name, n in N_LABELS.items()))


def layouts() -> str:
    from ddvi.data import _SOURCES

    rows = []
    for name, source in _SOURCES.items():
        files = ", ".join(f"`{file}`" for part in source.files for file in part)
        rows.append((f"`{name}`", files, ", ".join(f"`{folder}`" for folder in source.folders)))
    return table(("data set", "files", "in `data_root` or its sub-folder"), rows)


def studies() -> str:
    rows = []
    for name, path in study.stored().items():
        about = re.match(r"#\s*(.*?)[.:]?\n", path.read_text())
        given = ["decoder=."] if name == "mnist_frozen_decoder" else []
        members = study.read([name, *given]).members
        rows.append((f"`{name}`", about[1] if about else "", len(members)))
    return table(("study", "holds", "runs"), rows)


def paper_commands() -> list[tuple[str, str, str]]:
    """The paper's commands, from the script that runs them."""
    script = (ROOT / "scripts/seed_commands.sh").read_text()
    semi, plain = re.findall(r"methods='([^']*)'", script)
    (datasets,) = re.findall(r"^for dataset in (.*); do$", script, re.MULTILINE)
    (shapes,) = re.findall(r"for prior in (.*); do$", script, re.MULTILINE)
    return [
        (dataset, method, prior)
        for dataset in datasets.split()
        for method in (semi if dataset.endswith("_semi") else plain).split()
        for prior in shapes.split()
    ]


def commands() -> str:
    words = paper_commands()
    for names in words:
        resolve(*names, {"preset": "paper"})
    return "\n".join(["```sh", *(f"./run.sh {' '.join(names)}" for names in words), "```"])


def paper(dataset: str, semi: str = "") -> str:
    """What preset=paper says that the default doesn't, a column a method."""
    suffix = "_semi" if semi else ""
    written = dict.fromkeys(name for data, name, _ in paper_commands() if data == dataset + suffix)
    methods = [ALIASES.get(name, name) for name in (word.removesuffix("_semi") for word in written)]
    chosen = {name: resolve(dataset + suffix, name + suffix, "pinwheel", {"preset": "paper"}) for name in methods}
    usual = {name: resolve(dataset + suffix, name + suffix, "pinwheel") for name in methods}
    differ = [
        name
        for name in FIELDS
        if name not in (*_OWN, "preset")
        and any(_concerns(m, name, chosen[m]) and getattr(chosen[m], name) != getattr(usual[m], name) for m in methods)
    ]
    rows = [(f"`{name}`", *(_shown(m, name, chosen[m]) for m in methods)) for name in differ]
    return table(("setting", *(f"`{name}{suffix}`" for name in methods)), rows)


def _concerns(method: str, name: str, settings: Settings) -> bool:
    """Whether a setting has an effect on the method with these settings."""
    if name in {other for m in METHODS.values() for other in m.reads}:
        return name in METHODS[method].reads
    if name in {other for names in OBJECTIVE_SETTINGS.values() for other in names} - {"label_rate"}:
        return name in OBJECTIVE_SETTINGS[settings.objective]
    return name not in ("warmup", "warmup_kl_weight", "freeze_decoder") or METHODS[method].warms_up


def _shown(method: str, name: str, chosen: Settings) -> str:
    value = getattr(chosen, name)
    if not _concerns(method, name, chosen):
        return ""
    return f"{value:g}" if isinstance(value, float) else as_text(value)


def pixel_values() -> str:
    return ", ".join(f"{count:,} for `{name}`" for name, count in PIXEL_VALUES.items())


def study_epochs() -> str:
    return f"`preset=study` gives every method {STUDY_EPOCHS} passes over all data but `digits`."


GENERATORS: dict[str, Callable[..., str]] = {
    "commands": commands,
    "composition": composition,
    "dataset-defaults": dataset_defaults,
    "effort": effort,
    "labels": labels,
    "layouts": layouts,
    "measures": measures,
    "methods": methods,
    "named": named,
    "objectives": objectives,
    "paper": paper,
    "pixel-values": pixel_values,
    "priors": priors,
    "settings": settings,
    "settings-of": settings_of,
    "settings-of-objective": settings_of_objective,
    "studies": studies,
    "study-epochs": study_epochs,
}
