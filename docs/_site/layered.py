"""Flowcharts as SVG, without a script or a network: mermaid's `flowchart TD`, as much of it as the pages use.

Nodes stand in layers, an arrow always leads to a later one; long arrows go through a place in each layer between
(Sugiyama, Tagawa and Toda, Methods for Visual Understanding of Hierarchical System Structures, 1981).
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections import defaultdict
from dataclasses import dataclass, field
from html import escape

_NODE = r'(\w+)(?:(\[|\{)"([^"]*)"(?:\]|\}))?'
_ARROW = re.compile(rf'^\s+{_NODE}\s*-->(?:\|"([^"]*)"\|)?\s*{_NODE}\s*$')
LETTER, LINE, BETWEEN, GAP, MARGIN = 6.9, 17, 30, 16, 8
INWARDS = 0.3  # how much a box is drawn to the middle, rather than to what it is linked with
_WIDEST = 30  # letters of a line


@dataclass
class Node:
    """A box, or a place that an arrow goes through, with the arrow's label or nothing."""

    lines: list[str] = field(default_factory=list)
    question: bool = False
    boxed: bool = True
    layer: int = 0
    x: float = 0.0
    y: float = 0.0

    @property
    def width(self) -> float:
        return max(map(len, self.lines), default=0) * LETTER + (22 if self.lines else 4)

    @property
    def height(self) -> float:
        return len(self.lines) * LINE + (12 if self.lines else 0)


@dataclass(frozen=True)
class Arrow:
    start: str
    stop: str
    label: str = ""


def read(code: str) -> tuple[dict[str, Node], list[Arrow]]:
    """Boxes by name, and arrows.

    Raises:
        ValueError: a line that isn't an arrow between boxes.
    """
    nodes: dict[str, Node] = {}
    arrows = []
    for line in code.splitlines()[1:]:
        found = _ARROW.match(line)
        if not found:
            raise ValueError(f"not an arrow: {line}")
        start, shape, text, label, stop, last_shape, last_text = found.groups()
        for name, kind, words in ((start, shape, text), (stop, last_shape, last_text)):
            node = nodes.setdefault(name, Node([name]))
            if words:
                node.lines, node.question = textwrap.wrap(words, _WIDEST), kind == "{"
        arrows.append(Arrow(start, stop, label or ""))
    return nodes, arrows


def svg(code: str, about: str) -> str:
    """The picture of a flowchart; `about` is what it says to who can't see it."""
    nodes, arrows = read(code)
    _set_layers(nodes, arrows)
    ways = _ways(nodes, arrows)
    layers = _ordered(nodes, ways)
    _place(nodes, layers, ways)
    return _drawn(nodes, arrows, ways, about)


def _set_layers(nodes: dict[str, Node], arrows: list[Arrow]) -> None:
    """Arrows lead to later layers, those with a label past one that has room for it."""
    count = {arrow: 2 if arrow.label else 1 for arrow in arrows}
    for _ in nodes:
        for arrow in arrows:
            stop = nodes[arrow.stop]
            stop.layer = max(stop.layer, nodes[arrow.start].layer + count[arrow])
    for _ in nodes:  # a box with more arrows from it than to it stands as low as it can
        for name, node in nodes.items():
            onwards = [nodes[arrow.stop].layer - count[arrow] for arrow in arrows if arrow.start == name]
            if len(onwards) > sum(arrow.stop == name for arrow in arrows):
                node.layer = min(onwards)


def _ways(nodes: dict[str, Node], arrows: list[Arrow]) -> dict[Arrow, list[str]]:
    """Each arrow's way through the layers; its label stands in the middle of it."""
    ways = {}
    for arrow in arrows:
        first, last = nodes[arrow.start].layer, nodes[arrow.stop].layer
        between = [f"{arrow.start}>{arrow.stop}>{layer}" for layer in range(first + 1, last)]
        for number, name in enumerate(between):
            lines = textwrap.wrap(arrow.label, _WIDEST - 6) if number == len(between) // 2 else []
            nodes[name] = Node(lines, boxed=False, layer=first + 1 + number)
        ways[arrow] = [arrow.start, *between, arrow.stop]
    return ways


def _neighbours(ways: dict[Arrow, list[str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    above, below = defaultdict(list), defaultdict(list)
    for way in ways.values():
        for upper, lower in itertools.pairwise(way):
            below[upper].append(lower)
            above[lower].append(upper)
    return above, below


def _ordered(nodes: dict[str, Node], ways: dict[Arrow, list[str]]) -> list[list[str]]:
    """The layers, each in an order in which few arrows cross."""
    above, below = _neighbours(ways)
    layers: list[list[str]] = [[] for _ in range(1 + max(node.layer for node in nodes.values()))]
    for name, node in nodes.items():
        layers[node.layer].append(name)
    best, fewest = [list(layer) for layer in layers], _crossings(layers, below)
    for turn in range(40):
        near, order = (above, layers) if turn % 2 == 0 else (below, layers[::-1])
        for index, layer in enumerate(order[1:], start=1):
            place = {name: number for number, name in enumerate(order[index - 1])}
            own = {name: number for number, name in enumerate(layer)}

            def wanted(name: str, place: dict[str, int] = place, own: dict[str, int] = own) -> float:
                seen = [place[other] for other in near[name] if other in place]  # noqa: B023
                return sum(seen) / len(seen) if seen else own[name]

            layer.sort(key=wanted)
        crossings = _crossings(layers, below)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    return best


def _crossings(layers: list[list[str]], below: dict[str, list[str]]) -> int:
    total = 0
    for layer, lower in itertools.pairwise(layers):
        place = {name: number for number, name in enumerate(lower)}
        ends = [place[other] for name in layer for other in sorted(below[name], key=place.__getitem__)]
        total += sum(a > b for i, a in enumerate(ends) for b in ends[i + 1 :])
    return total


def _place(nodes: dict[str, Node], layers: list[list[str]], ways: dict[Arrow, list[str]]) -> None:
    above, below = _neighbours(ways)
    top = float(MARGIN)
    for layer in layers:
        height = max(nodes[name].height for name in layer)
        x = -sum(nodes[name].width + GAP for name in layer) / 2
        for name in layer:
            nodes[name].y, nodes[name].x = top + height / 2, x + nodes[name].width / 2
            x += nodes[name].width + GAP
        top += height + BETWEEN
    middle = {name: node.x for name, node in nodes.items()}
    for turn in range(60):
        for layer in layers if turn % 2 == 0 else layers[::-1]:
            wanted = []
            for name in layer:
                seen = [nodes[other].x for other in above[name] + below[name]]
                near = sum(seen) / len(seen) if seen else nodes[name].x
                wanted.append((1 - INWARDS) * near + INWARDS * middle[name])
            rightwards = _apart(layer, nodes, wanted)
            leftwards = [-x for x in _apart(layer[::-1], nodes, [-x for x in wanted[::-1]])][::-1]
            for name, low, high in zip(layer, rightwards, leftwards, strict=True):
                nodes[name].x = (low + high) / 2
    left = min(node.x - node.width / 2 for node in nodes.values())
    for node in nodes.values():
        node.x += MARGIN - left


def _apart(layer: list[str], nodes: dict[str, Node], wanted: list[float]) -> list[float]:
    """Places no further left than wanted, in order and apart."""
    places: list[float] = []
    for name, x in zip(layer, wanted, strict=True):
        if places:
            before = nodes[layer[len(places) - 1]]
            x = max(x, places[-1] + (before.width + nodes[name].width) / 2 + GAP)
        places.append(x)
    return places


def _drawn(nodes: dict[str, Node], arrows: list[Arrow], ways: dict[Arrow, list[str]], about: str) -> str:
    width = max(node.x + node.width / 2 for node in nodes.values()) + MARGIN
    height = max(node.y + node.height / 2 for node in nodes.values()) + MARGIN
    lines = [
        f'<div class="flowchart"><svg role="img" aria-label="{escape(about)}" width="{width:.0f}"'
        f' height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" xmlns="http://www.w3.org/2000/svg"'
        f' style="min-width: min({width:.0f}px, 42rem)">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker></defs>',
    ]
    for arrow in arrows:
        start, *between, stop = (nodes[name] for name in ways[arrow])
        points = [(start.x, start.y + start.height / 2)]
        for place in between:
            points += [(place.x, place.y - place.height / 2), (place.x, place.y + place.height / 2)]
        points.append((stop.x, stop.y - stop.height / 2 - 1))
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
        for (x, y), (u, v) in itertools.pairwise(points):
            middle = (y + v) / 2
            path += f"C{x:.1f} {middle:.1f} {u:.1f} {middle:.1f} {u:.1f} {v:.1f}"
        lines.append(f'<path class="arrow" d="{path}" marker-end="url(#tip)"/>')
    for node in nodes.values():
        x, y = node.x - node.width / 2, node.y - node.height / 2
        if node.boxed:
            corner = node.height / 2 if node.question else 4
            lines.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{node.width:.1f}" height="{node.height:.1f}" rx="{corner:.0f}"/>'
            )
        kind = "" if node.boxed else ' class="label"'
        for number, text in enumerate(node.lines):
            place = y + 6 + LINE * (number + 0.75)
            lines.append(f'<text{kind} x="{node.x:.1f}" y="{place:.1f}">{escape(text)}</text>')
    return "\n".join([*lines, "</svg></div>"])
