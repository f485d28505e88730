"""The documentation's site: it builds without a warning, needs no network, and shows what the code holds."""

from __future__ import annotations

import html
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

import browser
import ddvi
from ddvi import catalogue, evaluation, measures, study
from ddvi.errors import InputError
from ddvi.methods import METHODS
from ddvi.settings import FIELDS, resolve

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("plot_*.py"))
PARTS = ("Generative process", "Posterior", "Objective", "Tasks", "Settings", "Source")

SHORTER = """
from ddvi.schedule import Schedule
whole = Schedule.epochs.fget
Schedule.epochs = property(lambda schedule: min(whole(schedule), 1))
try:
    from pyro.infer import SVI
except ImportError:
    pass
else:
    take, losses = SVI.step, []
    def step(svi, *arguments, **named):
        if len(losses) < 20:
            losses.append(take(svi, *arguments, **named))
        return losses[-1]
    SVI.step = step
"""
"""Tutorials run to their last line with short trainings: what they show then isn't looked at."""

pytest.importorskip("sphinx")
pytest.importorskip("furo")
pytest.importorskip("myst_parser")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The site, built as a reader would build it but for shorter trainings, once for all workers; a warning fails."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "site"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SHORTER)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "src")]), "OMP_NUM_THREADS": "1"}
    words = ["-q", "-W", "--keep-going", "-D", "sphinx_gallery_conf.run_stale_examples=True"]
    words += ["-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")]
    with FileLock(f"{folder}.lock"):
        if not (folder / "result").exists():
            result = subprocess.run(
                [sys.executable, "-m", "sphinx", *words], env=environment, capture_output=True, text=True, timeout=900
            )
            (folder / "result").write_text("" if result.returncode == 0 else result.stdout + result.stderr)
    assert not (folder / "result").read_text(), (folder / "result").read_text()
    return folder / "html"


def text(page: Path) -> str:
    """What a page says, without its tags."""
    found = re.search(r'<article role="main".*?</article>', page.read_text(), re.DOTALL)
    assert found, page
    return html.unescape(re.sub(r"<[^>]+>", "", found[0]))


@pytest.mark.slow
def test_no_page_asks_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        code = page.read_text()
        assert not re.search(r'<(script|img|iframe|source)[^>]*\ssrc="(https?:)?//', code), page
        assert not re.search(r'<link[^>]*rel="(stylesheet|preload|icon)"[^>]*href="(https?:)?//', code), page
    for style in (site / "_static").rglob("*.css"):
        assert not re.search(r"url\(['\"]?http|@import", style.read_text()), style


@pytest.mark.slow
def test_the_lists_of_the_pages_are_those_of_the_code(site: Path) -> None:
    settings = text(site / "settings.html")
    assert all(re.search(rf"^{name}$", settings, re.MULTILINE) for name in FIELDS if name not in _PLACES)
    assert all(name in text(site / "measures.html") for name in catalogue.MEASURES)
    assert all(name in text(site / "objectives.html") for name in catalogue.OBJECTIVES)
    assert all(name in text(site / "priors.html") for name in catalogue.PRIORS)
    assert all(name in text(site / "studies.html") for name in study.stored())
    assert (site / "architecture.html").read_text().count('class="flowchart"') == 2


_PLACES = ("dataset", "method", "prior", "semi_supervised")


@pytest.mark.slow
def test_every_public_name_has_its_place_in_the_reference(site: Path) -> None:
    pages = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    for name in ddvi.__all__:
        assert name == "__version__" or f'id="ddvi.{name}"' in pages, name
    assert 'id="ddvi.sklearn.DDVI"' in pages
    for sign in ("Args:", "Raises:", "Returns:", "Example:"):
        assert sign not in pages, "a docstring's section that wasn't recognised"


@pytest.mark.slow
@pytest.mark.parametrize("script", [path.stem for path in TUTORIALS])
def test_tutorials_are_run_and_show_their_pictures(site: Path, script: str) -> None:
    page = site / f"gallery/{script}.html"
    wanted = (DOCS / f"tutorials/{script}.py").read_text().count("plt.show()")
    pictures = re.findall(rf'src="(\.\./_images/sphx_glr_{script}_\d+\.png)"', page.read_text())
    assert len(set(pictures)) == wanted > 0
    assert all((page.parent / picture).stat().st_size > 10_000 for picture in pictures)
    assert "Traceback" not in text(page)


@pytest.mark.slow
def test_the_papers_54_commands_are_there_and_are_understood(site: Path) -> None:
    commands = re.findall(r"^\./run\.sh (\S+) (\S+) (\S+)$", text(site / "reproducing.html"), re.MULTILINE)
    assert len(set(commands)) == 54
    for names in commands:
        assert resolve(*names, {"preset": "paper"}).preset == "paper"


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_told_in_one_form(method: str) -> None:
    page = (DOCS / f"methods/{method}.md").read_text()
    headings = [heading for heading in re.findall(r"^## (.*)$", page, re.MULTILINE) if heading in PARTS]
    assert tuple(headings) == PARTS
    assert f"{{generated}} settings-of {method}\n" in page


def test_the_numbers_of_the_measures_are_those_of_the_code() -> None:
    page = " ".join((DOCS / "measures.md").read_text().split())
    full = evaluation.FULL
    *first, last = measures.KERNEL_BANDWIDTHS
    for words in (
        f"the mean over the test set, {full.elbo_draws} draws each",
        f"with K = {full.iw_draws:,}, on the first {full.iw_examples:,} test examples",
        f"with K = {full.stand_in_draws:,} on {full.stand_in_examples} examples",
        f"−mean over {full.prior_draws:,} draws of the prior",
        f"of bandwidths {', '.join(map(str, first))} and {last},",
        f"s = {', '.join(map(str, measures.MMD_SCALES))}.",
        f"their {evaluation.NEIGHBOURS} nearest training latents",
        f"by less than {inspect.signature(ddvi.exact_log_likelihood).parameters['tolerance'].default} nat",
    ):
        assert words in page, words


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md")))
def test_commands_of_the_pages_are_understood(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each `ddvi train …` and `./run.sh …` names and settings are right."""
    monkeypatch.chdir(tmp_path)
    for name in ("my.npz", "mine.npz", "counts.npz"):
        (tmp_path / name).touch()
    (tmp_path / "FOLDER").mkdir()
    code = "\n".join(re.findall(r"^```sh\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE))
    for line in re.findall(r"^(?:ddvi train|\./run\.sh) (\S+ \S+ \S+.*)$", code, re.MULTILINE):
        words = re.sub(r"\s+#.*", "", line).split()
        if words[0] in ("compare", "report", "study") or page == "docs/extending.md":
            continue
        resolve(*words[:3], dict(word.split("=", 1) for word in words[3:]))


def test_a_wrong_command_would_be_noticed() -> None:
    with pytest.raises(InputError, match="pinwheel"):
        resolve("mnist", "ddvi", "pinwhel")


@pytest.mark.slow
@pytest.mark.skipif(browser.program() is None, reason="no Chromium")
def test_pages_fit_a_phone(site: Path) -> None:
    with browser.browser() as tab:
        for name in ("index", "methods/ddvi", "architecture", "settings", "api/posteriors"):
            tab.open(site / f"{name}.html", width=390, height=844, touch=True, ready="true")
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390, name
        assert not tab.errors
        assert all(address.startswith(("file:", "data:")) for address in tab.addresses)
