"""Links between files of the project, as a forge has them, turned into links between pages of the site."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ELSEWHERE = {
    "README.md": "docs/index.md",
    "CONTRIBUTING.md": "docs/contributing.md",
    "CHANGELOG.md": "docs/changelog.md",
}
"""Files outside of docs, and the pages that stand for them."""
_TUTORIAL = re.compile(r"^docs/tutorials/(plot_\w+)\.py$")  # a script, and its page is made of it
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)")


def setup(app: Any) -> None:
    app.connect("source-read", _read)


def _read(app: Any, name: str, source: list[str]) -> None:
    page = DOCS / f"{name}.md"
    if not page.exists():
        return
    for file, stand_in in ELSEWHERE.items():
        if stand_in == f"docs/{name}.md" and file != "README.md":
            source[0] = rewritten((ROOT / file).read_text(), ROOT / file, page)
            return
    source[0] = rewritten(_filled(source[0], page.parent), page, page)


def _filled(text: str, folder: Path) -> str:
    """Without the places of a table of contents that no page is there for."""
    places = re.compile(r"^[\w/]*\*\n", re.MULTILINE)
    return places.sub(lambda found: found[0] if any(folder.glob(f"{found[0].strip()}.*")) else "", text)


def rewritten(text: str, file: Path, page: Path) -> str:
    """The text of a file with its links as they must be on a page; what the site doesn't hold is named, not linked."""

    def link(found: re.Match[str]) -> str:
        label, target, anchor = found[1], found[2], found[3] or ""
        place = Path(os.path.normpath(file.parent / target)).relative_to(ROOT).as_posix()
        place = _TUTORIAL.sub(r"docs/gallery/\1.rst", ELSEWHERE.get(place, place))
        if place.startswith("docs/") and place.endswith((".md", ".rst")):
            anchor = "" if place == "docs/index.md" else anchor
            return f"[{label}]({os.path.relpath(ROOT / place, page.parent)}{anchor})"
        return f"`{place}`" if label.strip("`") == place else f"{label} (`{place}`)"

    return _LINK.sub(link, text)
