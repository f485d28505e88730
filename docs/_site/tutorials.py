"""What the tutorials need, asked for before they run, so that none is left out in silence."""

from __future__ import annotations

import importlib.util
from typing import Any

from sphinx.errors import ExtensionError

NEEDED = {"msprime": "msprime", "pandas": "pandas", "pyro": "pyro-ppl"}
"""Modules that tutorials import beside those of ddvi, and the packages that have them."""


def setup(app: Any) -> None:
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ExtensionError(f"the tutorials run in the build and need {', '.join(missing)}; pip install '.[docs]'")
