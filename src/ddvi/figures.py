"""The pictures of a run: latent space, samples, reconstructions, curves.

Figures are plain `matplotlib.figure.Figure` objects drawn by Agg: no pyplot, no global state, no screen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ddvi.data import Dataset
from ddvi.evaluation import prepared
from ddvi.files import write_aside
from ddvi.folders import terms
from ddvi.likelihoods import means
from ddvi.model import LatentVariableModel
from ddvi.preprocessing import Preprocessing
from ddvi.randomness import seeded
from ddvi.settings import Settings

PALETTE = (
    "#332288",
    "#88CCEE",
    "#117733",
    "#DDCC77",
    "#CC6677",
    "#AA4499",
    "#44AA99",
    "#882255",
    "#E69F00",
    "#777777",
)
"""Ten colours that stay distinct for colour-blind readers, after Paul Tol's muted scheme."""
_INK, _PRIOR_COLOUR, _FAINT = "#333333", "#3B4A5A", "#CCCCCC"
_MOST_POINTS = 5000
_MOST_SHADED = 2000
_MOST_ROWS = 20
_DRAWS_PER_LABEL = 10


@torch.no_grad()
def draw_all(
    folder: Path,
    model: LatentVariableModel,
    dataset: Dataset,
    history: Sequence[Mapping[str, Any]],
    settings: Settings,
) -> None:
    """Write `latents.png`, `samples.png`, `reconstructions.png` and `curves.png` into a run folder.

    Of a semi-supervised run the latents are shown by predicted label too, and a row of samples for each label.

    Args:
        folder: the run folder.
        model: trained, in evaluation mode.
        dataset: whose test examples are shown.
        history: a row an epoch; values may be text.
        settings: the run's, for titles and the seed.
    """
    semi = settings.semi_supervised
    title = f"{dataset.name} · {settings.full_method} · {settings.prior}"
    device = next(model.parameters()).device
    guess = prior_label = None
    with seeded(settings.seed, "figures"):
        pieces = prepared(model.preprocessing, dataset.test_x[:_MOST_POINTS].to(device)).split(1000)
        z = torch.cat([model.latent(x).cpu() for x in pieces])
        count, label = max(len(z), 2000), None
        if semi:
            parts = model.prior.parts or 1
            guess = torch.cat([model.classify(x).argmax(-1).cpu() for x in pieces])
            prior_label = torch.arange(count) % parts
            label = torch.arange(min(parts, _MOST_ROWS)).repeat_interleave(_DRAWS_PER_LABEL)
        prior_z = model.prior.sample((count,), label=prior_label).cpu()
        samples = means(model.likelihood, model.prior.sample((100 if label is None else len(label),), label=label))
        raw = dataset.test_x[:16].to(device)
        pairs = model.preprocessing.picture(raw), means(model.likelihood, model.latent(model.preprocessing(raw)))
        real = model.preprocessing.picture(dataset.test_x[: len(samples)].to(device))
        if raw.dim() == 4:
            low, high = shades(model.preprocessing, dataset.test_x[:_MOST_SHADED].to(device), dataset.maximum)
            shaded = [(model.preprocessing.restore(x) - low) / (high - low) for x in (samples, *pairs)]
            samples, pairs = shaded[0], (shaded[1], shaded[2])
    labels = None if dataset.test_y is None else dataset.test_y[: len(z)]
    save(latent_space(z, labels, prior_z, dataset.classes, title, guess, prior_label), folder / "latents.png")
    save(sample_grid(samples, real, title, dataset.classes if semi else ()), folder / "samples.png")
    save(reconstruction_rows(*pairs, title), folder / "reconstructions.png")
    save(curves(history, title), folder / "curves.png")


def shades(preprocessing: Preprocessing, raw: Tensor, maximum: float | None) -> tuple[float, float]:
    """Which values of restored images are black and white.

    Of images as stored (N, C, H, W) and the value that stands for 1.0 in them; without one, the least and the largest.
    """
    if maximum is not None:
        return 0.0, preprocessing.white(maximum)
    values = preprocessing.restore(preprocessing.picture(raw))
    low, high = float(values.min()), float(values.max())
    return low, high if high > low else low + 1


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, aside and renamed."""
    FigureCanvasAgg(figure)
    write_aside(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150, facecolor="white"))


def latent_space(
    z: Tensor,
    labels: Tensor | None,
    prior_z: Tensor,
    classes: Sequence[str],
    title: str,
    guess: Tensor | None = None,
    prior_labels: Tensor | None = None,
) -> Figure:
    """Latents (N, D) coloured by class beside prior samples (M, D), on the same axes.

    With a guess (N,) of the labels a panel in between shows the latents by that, and labels (M,) colour the prior.
    """
    panels = [("test examples, z ~ q(z|x)", z, labels), ("prior, z ~ p(z)", prior_z, prior_labels)]
    if guess is not None:
        panels[0] = ("test examples, z ~ q(z|x), by true label", z, labels)
        panels[1] = ("prior, z ~ p(z|l)", prior_z, prior_labels)
        panels.insert(1, ("by predicted label, argmax q(l|x)", z, guess))
    figure = Figure(figsize=(4.7 * len(panels) + (1.2 if classes else 0), 4.9), layout="constrained")
    row = list(figure.subplots(1, len(panels), sharex=True, sharey=True))
    for axes, (name, points, colour) in zip(row, panels, strict=True):
        scatter(axes, points, colour, len(classes))
        axes.set_title(name, fontsize=10, color=_INK)
    _same_limits(row, (z, prior_z))
    if classes:
        colours = colours_of(len(classes))
        dots = [Line2D([], [], marker="o", linestyle="", markersize=5, color=colour) for colour in colours]
        figure.legend(
            dots, classes, loc="outside right center", frameon=False, fontsize=9, ncols=1 + len(classes) // 26
        )
    size = z.shape[1]
    figure.suptitle(title + (f" · the first two of {size} coordinates" if size > 2 else ""), fontsize=11, color=_INK)
    return figure


def latent_spaces(
    rows: Sequence[Sequence[tuple[str, Tensor, Tensor | None] | None]], names: Sequence[str] = ()
) -> Figure:
    """A grid of latent spaces: a row a prior, a column a method, by convention the prior's own samples last.

    Args:
        rows: in each row panels of (title, latents (N, D), labels (N,) or None); a column's title stands above it;
            None where there is nothing to show.
        names: what is written to the left of each row.
    """
    columns = max(len(row) for row in rows)
    lines = max(panel[0].count("\n") + 1 for row in rows for panel in row if panel)
    figure = Figure(figsize=(2.3 * columns, 2.35 * len(rows) + 0.2 * lines), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)  # type: ignore[union-attr]
    grid = figure.subplots(len(rows), columns, squeeze=False)
    classes = max(
        (int(panel[2].max()) + 1 for row in rows for panel in row if panel and panel[2] is not None), default=0
    )
    titled: set[int] = set()
    for i, row in enumerate(rows):
        clouds = []
        for j, axes in enumerate(grid[i]):
            axes.tick_params(length=0, labelbottom=False, labelleft=False)
            if j == 0 and names:
                axes.set_ylabel(names[i], fontsize=11, color=_INK)
            panel = row[j] if j < len(row) else None
            if panel is None:
                axes.set_frame_on(False)
                if j:
                    axes.set_axis_off()
                continue
            title, z, labels = panel
            clouds.append(z)
            scatter(axes, z, labels, classes, size=1.6)
            axes.tick_params(length=0, labelbottom=False, labelleft=False)
            if j not in titled:
                axes.set_title(title, fontsize=11, color=_INK)
                titled.add(j)
        _same_limits([axes for axes, panel in zip(grid[i], row, strict=False) if panel], clouds[-1:], margin=0.35)
    return figure


def sample_grid(samples: Tensor, real: Tensor, title: str, classes: Sequence[str] = ()) -> Figure:
    """Means of prior draws: images as a square grid, tables as a heat map beside rows of real data.

    With classes the draws are of one after the other, equally many: images get a row for each, with its name.
    """
    given, rows = ("z ~ p(z|l)", min(len(classes), _MOST_ROWS)) if classes else ("z ~ p(z)", math.isqrt(len(samples)))
    if samples.dim() == 2:
        order = ", label after label" if classes else ""
        return _tables((samples, real), (f"model, E[x|z], {given}{order}", "data"), title)
    columns = len(samples) // rows
    figure = Figure(figsize=(6, 0.3 + 6 * rows / columns), layout="constrained")
    axes = figure.subplots()
    images = samples[: rows * columns]
    _show(axes, _mosaic(images, columns))
    for i, name in enumerate(classes[:rows]):
        height = images.shape[-2]
        axes.text(-2, i * (height + 1) + (height - 1) / 2, name, ha="right", va="center", fontsize=9, color=_INK)
    axes.set_title(f"{title} · E[x|z], {given}", fontsize=10, color=_INK)
    return figure


def reconstruction_rows(examples: Tensor, reconstructions: Tensor, title: str) -> Figure:
    """Test examples above their reconstructions."""
    if examples.dim() == 2:
        return _tables((examples, reconstructions), ("test examples", "reconstructions"), title)
    columns = 8 if len(examples) > 8 else len(examples)
    figure = Figure(figsize=(8, 0.4 + 2.1 * math.ceil(len(examples) / columns)), layout="constrained")
    groups = figure.subplots(math.ceil(len(examples) / columns), 1, squeeze=False)[:, 0]
    for axes, x, y in zip(groups, examples.split(columns), reconstructions.split(columns), strict=True):
        _show(axes, _mosaic(torch.cat([x, y]), len(x)))
    figure.suptitle(f"{title} · test examples above E[x|z], z ~ q(z|x)", fontsize=10, color=_INK)
    return figure


def curves(history: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Every loss term of the history in a panel of its own, and the bound on validation examples."""
    names = terms(history)
    columns = min(3, max(1, len(names)))
    rows = max(1, math.ceil(len(names) / columns))
    figure = Figure(figsize=(3.4 * columns, 2.3 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    for i, axes in enumerate(panels):
        if i >= len(names):
            axes.set_axis_off()
            continue
        points = [(float(row["epoch"]), float(row[names[i]])) for row in history if row.get(names[i]) not in (None, "")]
        points = [(epoch, value) for epoch, value in points if math.isfinite(value)]
        epochs, values = zip(*points, strict=True) if points else ((), ())
        bound = names[i] == "validation_bound"
        axes.plot(
            epochs, values, color=PALETTE[4] if bound else PALETTE[0], linewidth=1.4, marker="." * (len(points) < 3)
        )
        axes.set_title(names[i].replace("_", " "), fontsize=10, color=_INK)
        axes.grid(color="#EEEEEE", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT)
        axes.tick_params(labelsize=8, colors="#666666", length=2)
        axes.tick_params(labelbottom=i + columns >= len(names))
        axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[attr-defined]
        if len(values) > 10:
            axes.set_ylim(*_limits(values))
        if i % columns == 0:
            axes.set_ylabel("nats", fontsize=8, color="#666666")
        if i + columns >= len(names):
            axes.set_xlabel("epoch", fontsize=8, color="#666666")
    figure.suptitle(title, fontsize=11, color=_INK)
    return figure


def scatter(axes: Axes, z: Tensor, labels: Tensor | None, classes: int = 0, size: float | None = None) -> None:
    """The first two coordinates of z (N, D); one coordinate is spread out at random for the eye."""
    points = z.detach().cpu().double()
    size = size or min(12.0, max(3.0, 5000 / len(points)))
    if points.shape[1] == 1:
        with seeded(0, "jitter"):
            points = torch.cat([points, 0.2 * torch.randn(len(points), 1, dtype=points.dtype)], 1)
    colours: Any = _PRIOR_COLOUR
    if labels is not None and classes:
        table = [*colours_of(classes), _FAINT]  # -1, unknown, takes the last
        colours = [table[label] for label in labels.tolist()]
    axes.scatter(
        points[:, 0].numpy(), points[:, 1].numpy(), s=size, c=colours, linewidths=0, alpha=0.75, rasterized=True
    )
    axes.set_aspect("equal")
    axes.tick_params(labelsize=8, colors="#666666", length=2)
    for spine in axes.spines.values():
        spine.set_color(_FAINT)


def colours_of(classes: int) -> list[str]:
    """A colour for each class; beyond ten along one perceptually even scale."""
    if classes <= len(PALETTE):
        return list(PALETTE[:classes])
    from matplotlib import colormaps

    return [to_hex(colormaps["turbo"](i / (classes - 1))) for i in range(classes)]


def _same_limits(panels: Sequence[Axes], clouds: Sequence[Tensor], margin: float = 0.15) -> None:
    """Square limits around all but the most extreme thousandth of the points."""
    points = torch.cat([cloud.detach().cpu().double()[:, :2] for cloud in clouds])
    if points.shape[1] == 1:
        points = torch.cat([points, torch.linspace(-1, 1, len(points), dtype=points.dtype)[:, None]], 1)
    low = torch.stack([torch.quantile(c, 0.001) for c in points.T])
    high = torch.stack([torch.quantile(c, 0.999) for c in points.T])
    centre, half = (low + high) / 2, max(float((high - low).max()) / 2, 1e-3) * (1 + margin)
    for axes in panels:
        axes.set_xlim(float(centre[0]) - half, float(centre[0]) + half)
        axes.set_ylim(float(centre[1]) - half, float(centre[1]) + half)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits that the first epochs, which fall from far away, don't flatten."""
    later = sorted(values[len(values) // 20 :])
    low, high = later[0], later[-1]
    space = 0.08 * max(high - low, 1e-3)
    return low - space, high + space


def _mosaic(images: Tensor, columns: int) -> Tensor:
    """Images (N, C, H, W) side by side in rows, with one white pixel between them: (H', W', C)."""
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    canvas = images.new_ones(channels, rows * (height + 1) - 1, columns * (width + 1) - 1)
    for i, image in enumerate(images.clamp(0, 1)):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        canvas[:, top : top + height, left : left + width] = image
    return canvas.movedim(0, -1).float().cpu()


def _show(axes: Axes, mosaic: Tensor) -> None:
    """A mosaic in colour if it has three channels, else its first channel, dark on white paper."""
    axes.set_axis_off()
    if mosaic.shape[-1] == 3:
        axes.imshow(mosaic.numpy(), interpolation="nearest")
    else:
        axes.imshow(mosaic[..., 0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _tables(tables: tuple[Tensor, Tensor], names: tuple[str, str], title: str) -> Figure:
    """Two heat maps on one scale: rows are examples, columns features."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    both = torch.cat([table.detach().float().flatten().cpu() for table in tables])
    low, high = float(torch.quantile(both[:100_000], 0.01)), float(torch.quantile(both[:100_000], 0.99))
    image = None
    for axes, table, name in zip(panels, tables, names, strict=True):
        image = axes.imshow(table.float().cpu().numpy(), aspect="auto", cmap="cividis", vmin=low, vmax=high)
        image.set_interpolation("nearest")
        axes.set_title(name, fontsize=10, color=_INK)
        axes.set_xlabel("feature", fontsize=9, color=_INK)
        axes.set_yticks([])
        axes.tick_params(labelsize=8, colors="#666666", length=2)
        axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[attr-defined]
    figure.colorbar(image, ax=list(panels), shrink=0.8).ax.tick_params(labelsize=8)  # type: ignore[arg-type]
    figure.suptitle(title, fontsize=11, color=_INK)
    return figure
