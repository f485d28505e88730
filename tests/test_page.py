"""The report's page in a real browser: nothing goes wrong at any width, in any colours, and all of it can be worked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser import Page, browser, program
from conftest import briefly
from ddvi import runs
from ddvi.settings import resolve

pytestmark = pytest.mark.skipif(
    program() is None, reason="there is no Chromium: apt install chromium, or set DDVI_CHROMIUM"
)
SMALL = {"epochs": 2, "hidden_size": 16, "limit": 300, "evaluation": "quick", "threads": 1}
HOSTILE = "</script><img src=x onerror=\"document.title='pwned'\">"
RUNS = [("digits_semi", "ddvi_semi", "pinwheel"), ("digits", "aae", "gaussian")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A semi-supervised diffusion run, one without a density, and a table with hostile labels in one dimension."""
    root = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 200)
    names = np.array([HOSTILE, "<b>bold</b>", "plain"])
    np.savez(root / "table.npz", x=random.normal(size=(200, 5)) + y[:, None], y=names[y])
    found = []
    for names_, more in (
        (RUNS[0], {}),
        (RUNS[1], {}),
        ((str(root / "table.npz"), "vae", "gaussian"), {"latent_size": 1}),
    ):
        settings = resolve(*names_, SMALL | more | {"out": root / names_[1]})
        with briefly():
            runs.train(settings)
        found.append(root / names_[1])
    return found


HELPERS = """
const all = (which) => [...document.querySelectorAll(which)];
const box = (which, number = 0) => {
    const { x, y, width, height } = all(which)[number].getBoundingClientRect();
    return [x, y, width, height];
};
const shown = () => all('.plot').map((plot) => plot.data.slice(1).filter((trace) => trace.visible).length);
const tips = () => all('.tip').filter((tip) => getComputedStyle(tip).display !== 'none').map((tip) => tip.textContent);
const pixels = (which) => {
    const canvas = document.querySelector(which);
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    return copy.getImageData(0, 0, canvas.width, canvas.height).data;
};
const ink = (which) => pixels(which).reduce((a, b) => a + b, 0);
const focused = () => {
    const element = document.activeElement;
    if (element === document.body) return null;
    const name = element.textContent.slice(0, 40) || element.getAttribute('aria-label') || element.tagName;
    return [name.trim(), getComputedStyle(element).outlineStyle];
};
const choose = (number, value) => {
    const labels = all('label').filter((label) => label.textContent.startsWith('Examples'));
    const select = labels[number].querySelector('select');
    select.value = value;
    select.dispatchEvent(new Event('change'));
    return all('.gallery')[number].textContent;
};
const light = (colour) => {
    const linear = (v) => (v <= 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.match(/[0-9.]+/g).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const paper = () => getComputedStyle(document.body).backgroundColor;
const contrast = (which) => {
    const [a, b] = [light(paper()), light(getComputedStyle(document.querySelector(which)).color)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
};
const where = (row) => {
    const plot = document.querySelector('.plot');
    const [x, y] = box('.plot');
    const { xaxis, yaxis } = plot._fullLayout;
    for (const trace of plot.data.slice(1)) {
        const i = trace.customdata.indexOf(row);
        if (i >= 0) return [x + xaxis._offset + xaxis.l2p(trace.x[i]), y + yaxis._offset + yaxis.l2p(trace.y[i])];
    }
};
"""


def load(page: Page, path: Path, *window: Any, **how: Any) -> None:
    """Open a page and tell it what the tests ask; it scrolls at once, so that what is measured stays where it is."""
    page.open(path, *window, **how)
    page.evaluate(HELPERS + "document.documentElement.style.scrollBehavior = 'auto';")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as found:
        yield found


@pytest.fixture(autouse=True)
def all_is_well(page: Page) -> Iterator[None]:
    """After each test: no error, no warning, and nothing was asked of a network."""
    page.errors.clear()
    page.addresses.clear()
    yield
    assert page.errors == []
    assert [address for address in page.addresses if not address.startswith(("file:", "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def single(folders: list[Path]) -> Path:
    return folders[0] / "report.html"


@pytest.fixture(scope="module")
def together(folders: list[Path]) -> Path:
    return runs.report(folders)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "touch"), [(390, True), (1280, False)])
def test_it_fits_and_can_be_read(page: Page, together: Path, scheme: str, width: int, touch: bool) -> None:
    load(page, together, width, 850, scheme, touch)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    outside = "all('.plot svg, canvas, img').filter((e) => e.getBoundingClientRect().right > innerWidth + 1).length"
    assert page.evaluate(outside) == 0
    assert page.evaluate("shown()") == [10, 10, 3]
    for which in ("body", ".about", "nav a", ".caption", ".term", "figcaption", ".legend .count"):
        assert page.evaluate(f"contrast('{which}')") > 4.5, "as the accessibility guidelines ask"
    assert (page.evaluate("paper()") == "rgb(255, 255, 255)") == (scheme == "light")


def test_colour_is_never_alone(page: Page, single: Path) -> None:
    load(page, single)
    looks = page.evaluate("document.querySelector('.plot').data.slice(1).map(t => [t.marker.color, t.marker.symbol])")
    assert len({colour for colour, _ in looks}) == len({symbol for _, symbol in looks}) == 10
    outlines = page.evaluate("[...document.querySelectorAll('.legend path')].map(p => p.getAttribute('d'))")
    assert len(set(outlines)) == 10


def test_the_legend_switches_a_class_everywhere(page: Page, single: Path) -> None:
    load(page, single)
    ink = "ink('.screen canvas')"
    before = page.evaluate(ink)
    page.evaluate("document.querySelector('.legend button').click()")
    assert page.evaluate("document.querySelector('.legend button').getAttribute('aria-pressed')") == "false"
    assert page.evaluate("shown()") == [9]
    assert page.evaluate(ink) < before, "in the picture of the path too"
    page.evaluate("[...document.querySelectorAll('.legend button')].at(-1).click()")
    assert page.evaluate("shown()") == [10]
    page.evaluate("[...document.querySelectorAll('.legend button')].at(-1).click()")
    assert page.evaluate("shown()") == [0]


def test_the_slider_moves_by_keyboard_and_play_reaches_the_end(page: Page, single: Path) -> None:
    load(page, single)
    pixels = "document.querySelector('.screen canvas').toDataURL()"
    first = page.evaluate(pixels)
    page.evaluate("document.querySelector('input[type=range]').focus()")
    page.key("ArrowRight", 3)
    assert page.evaluate("document.querySelector('.step').textContent") == "t = 7 of 10"
    assert page.evaluate("document.querySelector('input[type=range]').getAttribute('aria-valuetext')") == "t = 7 of 10"
    second = page.evaluate(pixels)
    assert second != first
    page.key("ArrowLeft", 3)
    assert page.evaluate(pixels) == first
    page.evaluate("document.querySelector('.screen button').click()")
    page.wait("document.querySelector('.step').textContent === 't = 0 of 10'")
    page.wait("document.querySelector('.screen button').textContent === 'play'")
    page.evaluate("document.querySelectorAll('.film button')[0].click()")
    assert page.evaluate(pixels) == first


def test_a_measure_is_explained_on_focus_and_on_hover(page: Page, single: Path) -> None:
    load(page, single)
    assert page.evaluate("tips()") == []
    page.evaluate("document.querySelector('#measures .scroll').focus()")
    page.key("Tab")
    page.wait("tips().length")
    (said,) = page.evaluate("tips()")
    assert said.startswith("exact log p(x), nats per example, by quadrature")
    assert "Higher is better." in said
    page.evaluate("document.activeElement.blur()")
    page.wait("!tips().length")
    x, y, _, _ = page.evaluate("box('.term', 3)")
    page.mouse("mouseMoved", x + 5, y + 5)
    page.wait("tips().length")
    (said,) = page.evaluate("tips()")
    assert "what the bound loses" in said


def test_all_that_can_be_worked_is_reached_by_keyboard_and_shows_its_focus(page: Page, single: Path) -> None:
    load(page, single)
    names = set()
    for _ in range(200):
        page.key("Tab")
        focused = page.evaluate("focused()")
        if not focused:  # past the end of the page
            break
        name, outline = focused
        names.add(name)
        assert outline in ("solid", "auto"), f"{name} shows that it has the focus"
    wanted = {"Skip to the content", "Measures", "log likelihood", "all / none", "play", "Step of the chain", "copy"}
    assert wanted <= names
    assert any(name.startswith("All settings") for name in names)


def test_hover_shows_the_example_and_a_loop_selects(page: Page, single: Path) -> None:
    load(page, single, 1280, 1000)
    page.evaluate("document.querySelector('#latents').scrollIntoView()")
    x, y = page.evaluate("where(5)")
    page.mouse("mouseMoved", x - 2, y)
    page.mouse("mouseMoved", x, y)
    page.wait("!document.querySelector('#hover').hidden")
    assert "test example" in page.evaluate("document.querySelector('#hover').textContent")
    assert "% sure" in page.evaluate("document.querySelector('#hover').textContent")
    assert page.evaluate("pixels('#hover canvas').some((v) => v > 0 && v < 255)"), "the image itself"
    assert page.evaluate("document.querySelectorAll('.ring').length") == 1
    left, top, width, height = page.evaluate("box('.plot .nsewdrag')")
    corners = [(0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98), (0.02, 0.03)]
    points = [(left + a * width, top + b * height) for a, b in corners]
    page.mouse("mouseMoved", *points[0])
    page.mouse("mousePressed", *points[0], pressed=True)
    for (a, b), (c, d) in itertools.pairwise(points):
        for share in (0.25, 0.5, 0.75, 1):
            page.mouse("mouseMoved", a + share * (c - a), b + share * (d - b), pressed=True)
    page.mouse("mouseReleased", *points[-1])
    page.wait("document.querySelector('.gallery').textContent.includes('selected')")
    assert int(page.evaluate("document.querySelector('.gallery').textContent").split()[0]) > 250
    assert page.evaluate("document.querySelector('.gallery canvas').width > 200")


def test_without_a_mouse_a_class_shows_its_examples(page: Page, together: Path) -> None:
    load(page, together)
    assert " examples: 3 × " in page.evaluate("choose(0, '3')")
    said = page.evaluate("choose(2, '0')")
    assert HOSTILE in said, "names are shown as they are"
    assert "test row" in said


def test_names_are_never_markup(page: Page, together: Path) -> None:
    load(page, together)
    assert page.evaluate("document.title").startswith("3 runs")
    assert page.evaluate("document.querySelectorAll('img[onerror], #main b:not(.lead b, .example b)').length") == 0
    assert (
        page.evaluate("[...document.querySelectorAll('.legend button')].map(e => e.textContent).join()").count(HOSTILE)
        == 1
    )


def test_what_is_not_there_is_said(page: Page, together: Path) -> None:
    load(page, together)
    told = page.evaluate("[...document.querySelectorAll('.missing')].map(e => e.textContent)")
    assert sum("Not a diffusion posterior" in text for text in told) == 2
    assert sum("1 dimensions, not two" in text for text in told) == 1
    assert "has no density" in page.evaluate("document.querySelector('#posterior').textContent")


def test_the_theme_can_be_chosen(page: Page, single: Path) -> None:
    load(page, single, scheme="dark")
    ink = "document.querySelector('.plot')._fullLayout.xaxis.tickfont.color"
    before = page.evaluate(ink)
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(ink) != before, "the plots follow"


def test_it_prints(page: Page, single: Path) -> None:
    load(page, single, scheme="dark")
    page.evaluate("addEventListener('beforeprint', () => (window.printed = paper()))")
    assert len(page.call("Page.printToPDF", printBackground=True)["data"]) > 50_000
    assert page.evaluate("window.printed") == "rgb(255, 255, 255)", "paper is white"
    assert page.evaluate("paper()") != "rgb(255, 255, 255)"
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    page.call("Emulation.setEmulatedMedia", media="")
