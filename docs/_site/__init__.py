"""What the site has from the code (tables, pictures, the reference), and what makes pages of a forge its own."""

from __future__ import annotations

from typing import Any

from _site import docstrings, links, pictures, reference, tables, tutorials


def setup(app: Any) -> dict[str, Any]:
    """Sphinx's entry point."""
    for part in (docstrings, links, pictures, reference, tables, tutorials):
        part.setup(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
