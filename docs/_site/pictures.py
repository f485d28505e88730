"""Pictures that are drawn when the site is built: the flowcharts of pages, and those that `{picture} NAME` names."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from _site import layered


def setup(app: Any) -> None:
    app.add_directive("picture", Picture)
    app.connect("doctree-read", _draw_flowcharts)


def _draw_flowcharts(app: Any, doctree: Any) -> None:
    for block in list(doctree.findall(nodes.literal_block)):
        if block.get("language") == "mermaid":
            title = next((section[0].astext() for section in _around(block)), "a flowchart")
            block.replace_self(nodes.raw("", layered.svg(block.astext(), title), format="html"))


def _around(node: Any) -> list[Any]:
    """The sections that a node stands in, inmost first."""
    found = []
    while node.parent is not None:
        node = node.parent
        if isinstance(node, nodes.section):
            found.append(node)
    return found


class Picture(SphinxDirective):
    """A picture, by name; what stands inside says what it shows."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        about = " ".join(self.content)
        drawing = PICTURES[self.arguments[0]]()
        html = f'<figure class="drawn">{drawing.replace("<svg ", f"<svg role=img aria-label={about!r} ", 1)}'
        caption = re.sub(r"`([^`]*)`", r"<code>\1</code>", about)
        return [nodes.raw("", f"{html}<figcaption>{caption}</figcaption></figure>", format="html")]


def _as_svg(figure: Any) -> str:
    """A figure whose black is the colour of the page's text, whether that is light or dark."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ddvi"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = file.getvalue()
    text = text[text.index("<svg ") :]
    return text.replace("#000000", "currentColor").replace("stroke: black", "stroke: currentColor")


@functools.cache
def priors() -> str:
    """log p(z) of every prior on a grid, coloured by the label that is most probable there."""
    import matplotlib.pyplot as plt
    import numpy as np
    import torch

    from ddvi import make_prior
    from ddvi.catalogue import PRIORS

    figure, axes = plt.subplots(1, len(PRIORS), figsize=(2 * len(PRIORS), 2.3), layout="constrained")
    extent, size = 3.4, 170
    line = torch.linspace(-extent, extent, size)
    z = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    colours = np.array(plt.get_cmap("tab10").colors)
    for axis, name in zip(axes, PRIORS, strict=True):
        prior = make_prior(name)
        density = prior.log_prob(z).exp().numpy()
        parts = prior.log_prob(z, torch.arange(10)[:, None, None])
        colour = colours[parts.argmax(0).numpy()]
        shade = np.minimum(1, density / np.quantile(density[density > 0.02 * density.max()], 0.9)) ** 0.6
        picture = np.concatenate([colour, shade[..., None]], -1)
        png = io.BytesIO()
        plt.imsave(png, picture[::-1])
        axis.imshow(plt.imread(io.BytesIO(png.getvalue())), extent=(-extent, extent, -extent, extent))
        axis.set_title(name, fontsize=9)
        axis.set_xticks([-2, 0, 2])
        axis.set_yticks([-2, 0, 2] if axis is axes[0] else [])
        axis.tick_params(labelsize=7)
    return _as_svg(figure)


@functools.cache
def noise() -> str:
    """α_t and σ_t of every fixed schedule at T = 10 and 40."""
    import matplotlib.pyplot as plt

    from ddvi import NoisingProcess

    figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained", sharey=True)
    for axis, steps in zip(axes, (10, 40), strict=True):
        for schedule, marker in (("log_snr", "o"), ("cosine", "s"), ("linear_beta", "^")):
            alpha = NoisingProcess(steps, schedule).constants().alpha
            axis.plot(range(steps + 1), alpha, marker=marker, markersize=3.5, linewidth=1.2, label=schedule)
        axis.set_title(f"T = {steps}", fontsize=9)
        axis.set_xlabel("t", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("α_t", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False)
    return _as_svg(figure)


PICTURES: dict[str, Callable[[], str]] = {"priors": priors, "noise": noise}
