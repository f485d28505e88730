"""The pictures of a run: written for every kind of data, the same each time, with panels that can be compared."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from ddvi import figures
from ddvi.composition import build_model, observe
from ddvi.data import Dataset
from ddvi.likelihoods import means
from ddvi.randomness import random_state, seeded
from ddvi.report.pictures import Tiles
from ddvi.settings import resolve

TINY = {"hidden_size": 8, "denoiser_size": 8, "denoiser_layers": 2, "steps": 2, "prior_denoiser": False}
NAMES = ("latents.png", "samples.png", "reconstructions.png", "curves.png")
PRIORS = {1: "gaussian", 2: "pinwheel", 3: "swiss_roll"}
HISTORY = [
    {"epoch": i, "loss": 100.0 - i, "kl": "3.5" if i else "", "validation_bound": -90.0 + i, "skipped": 0,
     "seconds": 1.0, "examples_per_second": 99.0} for i in range(12)
]  # fmt: skip
KINDS = ("images", "colour images", "table", "counts", "categories", "binary table")


def dataset(kind, labels=True, count=30):
    with seeded(0, "pictures"):
        match kind:
            case "images":
                x, maximum = torch.randint(0, 256, (count, 1, 6, 6), dtype=torch.uint8), 255.0
            case "colour images":
                x, maximum = torch.randint(0, 256, (count, 3, 6, 6), dtype=torch.uint8), 255.0
            case "table":
                x, maximum = 50 + 9 * torch.randn(count, 5), None
            case "counts" | "categories":
                x, maximum = torch.randint(0, 9, (count, 5)), None
            case _:
                x, maximum = torch.randint(0, 2, (count, 5)), None
        y = torch.arange(count) % 3
        y[-1] = -1
    half, classes = count // 2, ("cat", "dog", "fox") if labels else ()
    y_train, y_test = (y[:half], y[half:]) if labels else (None, None)
    return Dataset(kind, x[:half], x[half:], y_train, y_test, classes, maximum, {})


def draw(folder, kind="images", labels=True, size=2, history=HISTORY, method="ddvi"):
    folder.mkdir(exist_ok=True)
    data = dataset(kind, labels)
    likelihood = "categorical" if kind == "categories" else "auto"
    options = TINY | {"latent_size": size, "likelihood": likelihood}
    settings = resolve("digits" + "_semi" * method.endswith("_semi"), method, PRIORS[size], options)
    with seeded(0, "model"):
        model = build_model(settings, observe(data, settings), data.train_x).eval()
    figures.draw_all(folder, model, data, history, settings)
    return {name: (folder / name).read_bytes() for name in NAMES}


def assert_pictures(folder):
    assert {path.name for path in folder.iterdir()} == set(NAMES), "nothing is left beside them"
    for name in NAMES:
        pixels = imread(folder / name)[..., :3]
        assert min(pixels.shape[:2]) > 150, name
        assert pixels.std() > 0.01, f"{name} is blank"
        assert np.allclose(pixels[0, 0], 1), f"{name} is on white paper"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data(kind, tmp_path):
    draw(tmp_path, kind)
    assert_pictures(tmp_path)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("size", PRIORS)
def test_every_latent_size_with_and_without_labels(size, labels, tmp_path):
    draw(tmp_path, labels=labels, size=size)
    assert_pictures(tmp_path)


@pytest.mark.parametrize("method", ["ddvi_semi", "aae_semi", "vae"])
def test_what_has_learnt_labels_and_what_has_not(method, tmp_path, monkeypatch):
    panels, whole = [], figures.latent_space
    monkeypatch.setattr(figures, "latent_space", lambda *given: panels.append(whole(*given)) or panels[-1])
    draw(tmp_path, method=method)
    assert_pictures(tmp_path)
    assert len(panels[0].axes) == (3 if method.endswith("_semi") else 2), "by true and by predicted label"


def test_the_same_each_time_and_no_random_state_is_touched(tmp_path):
    torch.manual_seed(1)
    before = random_state()["cpu"]
    first = draw(tmp_path / "first", size=1)
    assert torch.equal(random_state()["cpu"], before)
    torch.manual_seed(2)
    assert draw(tmp_path / "second", size=1) == first


@pytest.mark.parametrize("history", [HISTORY[1:2], []])
def test_short_histories(history, tmp_path):
    """One epoch; none, where a run was evaluated without its history."""
    draw(tmp_path, history=history)
    assert all((tmp_path / name).stat().st_size > 2000 for name in NAMES)


def latent_panels(z, prior_z, labels=None, classes=()):
    figure = figures.latent_space(z, labels, prior_z, classes, "title")
    left, right = figure.axes
    return figure, left, right


@pytest.mark.parametrize("size", [1, 2, 5])
def test_latents_and_prior_share_square_axes(size):
    with seeded(0):
        z, prior_z = 3 + torch.randn(400, size), 0.5 * torch.randn(900, size)
    figure, left, right = latent_panels(z, prior_z)
    assert left.get_xlim() == right.get_xlim()
    assert left.get_ylim() == right.get_ylim()
    assert left.get_aspect() == right.get_aspect() == 1
    (x0, x1), (y0, y1) = left.get_xlim(), left.get_ylim()
    assert x1 - x0 == pytest.approx(y1 - y0)
    assert len(left.collections[0].get_offsets()) == 400
    assert len(right.collections[0].get_offsets()) == 900
    for axes, points in ((left, z), (right, prior_z)):
        shown = np.asarray(axes.collections[0].get_offsets())
        assert np.allclose(shown[:, 0], points[:, 0].numpy())
        inside = (shown[:, 0] > x0) & (shown[:, 0] < x1) & (shown[:, 1] > y0) & (shown[:, 1] < y1)
        assert inside.mean() > 0.99, "both clouds are in view"
    assert ("the first two of 5 coordinates" in figure.get_suptitle()) == (size > 2)


def test_a_wild_latent_does_not_hide_the_others():
    with seeded(0):
        z = torch.randn(3000, 2)
    z[0] = 1e6
    left = latent_panels(z, torch.randn(3000, 2))[1]
    assert left.get_xlim()[1] < 10


def test_colours_say_the_class():
    with seeded(0):
        z = torch.randn(40, 2)
    labels = torch.arange(40) % 3
    labels[7] = -1
    figure, left, _ = latent_panels(z, z, labels, ("cat", "dog", "fox"))
    colours = left.collections[0].get_facecolors()
    assert len({tuple(c) for c in colours}) == 4, "three classes and what is unknown"
    for label in (0, 1, 2, -1):
        assert len({tuple(c) for c, y in zip(colours, labels.tolist(), strict=True) if y == label}) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cat", "dog", "fox"]
    for classes in (2, 10, 11, 60):
        assert len(set(figures.colours_of(classes))) == classes


def test_a_grid_of_latent_spaces():
    with seeded(0):
        panel = lambda title: (title, torch.randn(50, 2), torch.arange(50) % 4)  # noqa: E731
        rows = [[panel("vae"), panel("ddvi"), ("prior", 2 * torch.randn(50, 2), None)], [panel("vae")]]
    figure = figures.latent_spaces(rows, ("pinwheel", "square"))
    assert len(figure.axes) == 6
    first = figure.axes[:3]
    assert [axes.get_title() for axes in first] == ["vae", "ddvi", "prior"]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in first}) == 1
    assert figure.axes[3].get_ylabel() == "square"
    assert not figure.axes[4].axison


def test_a_grid_with_a_gap_keeps_titles_and_names():
    with seeded(0):
        panel = ("vae\nlr=0.1", torch.randn(50, 2), None)
        prior = ("prior", 2 * torch.randn(50, 2), None)
    figure = figures.latent_spaces([[None, prior], [panel, prior]], ("pinwheel", "square"))
    assert [axes.get_title() for axes in figure.axes] == ["", "prior", "vae\nlr=0.1", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == ["pinwheel", "", "square", ""]
    assert [len(axes.collections) for axes in figure.axes] == [0, 1, 1, 1]


def test_curves_leave_out_times_and_show_every_term():
    figure = figures.curves(HISTORY, "title")
    shown = {axes.get_title(): axes for axes in figure.axes if axes.axison}
    assert shown.keys() == {"loss", "kl", "validation bound"}
    assert shown["loss"].lines[0].get_ydata().tolist() == [100.0 - i for i in range(12)]
    assert shown["kl"].lines[0].get_xdata().tolist() == list(range(1, 12)), "epochs without a value are passed over"


def test_mosaics_hold_every_image():
    images = torch.stack([torch.full((1, 2, 2), v) for v in (0.0, 0.25, 0.5)])
    mosaic = figures._mosaic(images, 2)
    assert mosaic.shape == (5, 5, 1)
    assert mosaic[0, 0].item() == 0.0
    assert mosaic[0, 3].item() == 0.25
    assert mosaic[3, 0].item() == 0.5
    assert mosaic[2, 0].item() == mosaic[3, 3].item() == 1.0, "paper is white"


@pytest.mark.parametrize(
    ("likelihood", "unit", "maximum"),
    [
        ("poisson", 1, 255.0),
        ("gaussian", 1, 255.0),
        ("gaussian", 255, 1.0),
        ("bernoulli", 255, 1.0),
        ("gaussian", 5, None),
    ],
)
def test_images_are_as_grey_as_they_are_stored(likelihood, unit, maximum, tmp_path, monkeypatch):
    """Counts, dequantised and standardised ones, bounded or not, in the pictures and in the report."""
    x = torch.arange(256).repeat(2).view(2, 1, 16, 16)
    x = x.to(torch.uint8) if unit == 1 else x / unit
    data = Dataset("ramp", x, x, None, None, (), maximum, {})
    settings = resolve("digits", "vae", "pinwheel", TINY | {"likelihood": likelihood})
    model = build_model(settings, observe(data, settings), x).eval()
    drawn = []
    monkeypatch.setattr(figures, "_show", lambda axes, mosaic: drawn.append(mosaic))
    figures.draw_all(tmp_path, model, data, [], settings)
    expected = torch.arange(256).view(16, 16) / 255
    originals = drawn[-1][:16, :16, 0]
    torch.testing.assert_close(originals, expected, atol=0.003, rtol=0)
    tile = Tiles.of(model.preprocessing, x, maximum).raw(x)[0, 0]
    torch.testing.assert_close(tile.float(), expected, atol=0.003, rtol=0)


def test_means_of_categories_are_of_their_numbers():
    data = dataset("categories")
    settings = resolve("digits", "vae", "pinwheel", TINY | {"likelihood": "categorical"})
    with seeded(0):
        model = build_model(settings, observe(data, settings))
        z = torch.randn(4, 2)
    probability = model.likelihood.decoder(z).softmax(-1)
    expected = (probability * torch.arange(9)).sum(-1)
    torch.testing.assert_close(means(model.likelihood, z), expected)
