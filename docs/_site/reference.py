"""The reference: a page for each module that `ddvi/__init__.pyi` names, with its theory and its public names."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import ddvi

FOLDER = Path(__file__).parents[1] / "api"


def setup(app: Any) -> None:
    app.connect("builder-inited", _write)


def public() -> dict[str, list[str]]:
    """Public names by the module that the stub has them from; scikit-learn's estimator stands beside."""
    stub = ast.parse(Path(ddvi.__file__).with_suffix(".pyi").read_text())
    found = {
        str(node.module): [alias.name for alias in node.names]
        for node in stub.body
        if isinstance(node, ast.ImportFrom) and node.module != "_version"
    }
    return found | {"sklearn": ["DDVI"]}


def _write(app: Any) -> None:
    FOLDER.mkdir(exist_ok=True)
    pages = {f"{module}.rst": _page(module, names) for module, names in public().items()}
    for old in FOLDER.glob("*.rst"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        file = FOLDER / name
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


def _page(module: str, names: list[str]) -> str:
    """In reStructuredText, which autodoc speaks."""
    home = importlib.import_module(f"ddvi.{module}")
    package = f"ddvi.{module}" if module == "sklearn" else "ddvi"
    lines = [*_heading(module, "="), f".. automodule:: ddvi.{module}", ""]
    places: dict[str, list[str]] = {}
    for name in names:
        places.setdefault(getattr(home, name).__module__, []).append(name)
    own = places.pop(home.__name__, [])
    for place in sorted(places, key=lambda place: (not place.endswith(".base"), place)):
        lines += [*_heading(place.rpartition(".")[2], "-"), f".. automodule:: {place}", ""]
        for name in places[place]:
            lines += [*_heading(name, "~"), *_entry(package, name, getattr(home, name))]
    for name in own:
        lines += [*_heading(name, "-"), *_entry(package, name, getattr(home, name))]
    return "\n".join(lines)


def _heading(text: str, line: str) -> list[str]:
    return [text, line * len(text), ""]


def _entry(package: str, name: str, value: object) -> list[str]:
    kind = "class" if isinstance(value, type) else "function"
    kind = "exception" if isinstance(value, type) and issubclass(value, BaseException) else kind
    return [f".. auto{kind}:: {package}.{name}", *["   :members:", "   :show-inheritance:"] * (kind == "class"), ""]
