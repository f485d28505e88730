"""Docstrings as this project writes them, turned into reStructuredText: plain text, `code`, indented formulas.

Sections are Args, Returns, Raises, Attributes, Example and Source. What stands indented under a paragraph is a formula,
and kept as it is. Names of the package become links.
"""

from __future__ import annotations

import re
from typing import Any

import ddvi

_SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Examples?|Sources?):\s*(.*)$")
_ITEM = re.compile(r"([\w*, ]+?):\s+(.*)$")
_FIELDS = {"Args": "param", "Raises": "raises"}


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", lambda app, what, name, obj, options, lines: _replace(lines))
    app.connect("autodoc-skip-member", lambda app, what, name, obj, skip, options: True if _foreign(obj) else None)
    app.connect("autodoc-process-bases", lambda app, name, obj, options, bases: _publish(bases))


def _foreign(value: object) -> bool:
    """Whether a member is another package's, such as torch's sampler that a class has as an attribute."""
    return callable(value) and not str(getattr(value, "__module__", "ddvi") or "torch").startswith("ddvi")


def _publish(bases: list[type]) -> None:
    """In the place of private classes those that they derive from."""
    while any(base.__name__.startswith("_") for base in bases):
        bases[:] = [b for base in bases for b in (base.__bases__ if base.__name__.startswith("_") else [base])]


def _replace(lines: list[str]) -> None:
    lines[:] = converted(lines)


def converted(lines: list[str]) -> list[str]:
    """The docstring's lines as reStructuredText."""
    result: list[str] = []
    rest = list(lines)
    while rest:
        section = _SECTION.match(rest[0])
        if section:
            rest.pop(0)
            body = [section[2]] if section[2] else []
            while rest and (not rest[0].strip() or rest[0].startswith(" ") or (section[2] and rest[0].strip())):
                if section[2] and not rest[0].strip():
                    break  # a section on one line goes on until a paragraph ends
                body.append(rest.pop(0))
            result += ["", *_section(section[1], body), ""]
        elif rest[0].startswith("    "):
            block: list[str] = []
            while rest and (rest[0].startswith("    ") or not rest[0].strip()):
                block.append(rest.pop(0))
            result += ["", ".. code-block:: text", "", *block, ""]
        else:
            result.append(inline(rest.pop(0)))
    return result


def _section(name: str, body: list[str]) -> list[str]:
    body = _dedented(body)
    if name.startswith("Example"):
        return [".. rubric:: Example", "", *body]
    if name.startswith("Source"):
        return ["*Source:* " + inline(" ".join(line.strip() for line in body))]
    items = _items(body)
    if name == "Attributes":
        return [f"* ``{key}``: {inline(text)}" for key, text in items]
    if name == "Returns":
        return [f":returns: {inline(' '.join(line.strip() for line in body))}"]
    return [f":{_FIELDS[name]} {key}: {inline(text)}" for key, text in items]


def _dedented(body: list[str]) -> list[str]:
    while body and not body[-1].strip():
        body = body[:-1]
    margin = min((len(line) - len(line.lstrip()) for line in body if line.strip()), default=0)
    return [line[margin:] for line in body]


def _items(body: list[str]) -> list[tuple[str, str]]:
    """`name: text`, where text may go on, further in."""
    items: list[tuple[str, str]] = []
    for line in body:
        found = None if line.startswith(" ") else _ITEM.match(line)
        if found:
            items.append((found[1], found[2]))
        elif items and line.strip():
            items[-1] = (items[-1][0], f"{items[-1][1]} {line.strip()}")
    return items


def inline(text: str) -> str:
    """A line with its `code` as literals or links, and everything else as it stands."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a code that goes on in the next line: as it stands
        return re.sub(r"([\\*|`])", r"\\\1", text)
    pieces = []
    for number, part in enumerate(parts):
        if number % 2 == 0:
            part = re.sub(r"([\\*|])", r"\\\1", part)
            pieces.append(re.sub(r"_(?=\W|$)", r"\\_", part))
            continue
        name = part.removeprefix("ddvi.")
        known = name.split(".")[0] in ddvi.__all__
        pieces.append(f":py:obj:`{name} <ddvi.{name}>`" if known else f"``{part}``")
        if number + 1 < len(parts) and re.match(r"\w", parts[number + 1]):
            pieces.append("\\ ")
    return "".join(pieces)
