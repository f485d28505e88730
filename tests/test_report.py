"""The report: what is gathered of every kind of run is true, and the page holds it as text that can't act."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import briefly, set_linear
from ddvi import comparison, folders, runs
from ddvi.composition import build_model, observe
from ddvi.data import Dataset
from ddvi.errors import InputError
from ddvi.evidence import exact_log_likelihood
from ddvi.model import LatentVariableModel
from ddvi.posteriors.gaussian import GaussianPosterior
from ddvi.posteriors.scaled import ScaledPosterior
from ddvi.preprocessing import Standardise
from ddvi.randomness import random_state, seeded
from ddvi.report import gathering, posterior
from ddvi.report.pictures import packed, sprite
from ddvi.settings import Settings, resolve
from test_figures import KINDS, PRIORS, TINY, dataset

HOSTILE = "</script><script>alert('1')</script>"
SMALL = {"epochs": 1, "hidden_size": 16, "limit": 200, "evaluation": "quick", "threads": 1}


def composed(
    kind: str = "images", method: str = "ddvi", size: int = 2
) -> tuple[LatentVariableModel, Dataset, Settings]:
    """An untrained model of data of a kind."""
    data = dataset(kind)
    likelihood = "categorical" if kind == "categories" else "auto"
    suffix = "_semi" * method.endswith("_semi")
    given = TINY | {"latent_size": size, "likelihood": likelihood}
    settings = resolve("digits" + suffix, method, PRIORS[size], given)
    with seeded(0, "model"):
        model = build_model(settings, observe(data, settings), data.train_x).eval()
    return model, data, settings


def array(text: str, kind: str = "float32") -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.dtype(kind).newbyteorder("<"))


def image(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def content(page: Path) -> dict[str, Any]:
    """The data that a page's scripts read."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(found)


# What is gathered


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data(kind: str) -> None:
    model, data, settings = composed(kind)
    found = gathering.gather(model, data, settings)
    json.dumps(found, allow_nan=False)
    assert found["data"]["image"] == (data.test_x.dim() == 4)
    assert found["data"]["sprite"]["count"] == len(data.test_x) == 15
    assert array(found["data"]["labels"], "int16").tolist() == data.test_y.tolist()
    assert array(found["latents"]["z"]).reshape(15, 2).std() > 0
    assert ("mosaic" in found["decoded"]) == found["data"]["image"]


@pytest.mark.parametrize("method", ["vae", "iaf_vae", "h_iaf_vae", "aae", "ddvi", "ddvi_semi", "aae_semi"])
def test_every_method(method: str) -> None:
    model, data, settings = composed(method=method)
    found = gathering.gather(model, data, settings)
    assert (found["path"] is not None) == method.startswith("ddvi")
    assert found["has_density"] == ("aae" not in method)
    for entry in found["posterior"]:
        assert ("gap" in entry) == ("aae" not in method)
        assert ("point" in entry) == ("aae" in method)
    assert ("guess" in found) == method.endswith("_semi")
    assert found["samples"]["names"] == (["cat", "dog", "fox"] if method.endswith("_semi") else [])


@pytest.mark.parametrize("size", [1, 3])
def test_other_dimensions_have_no_exact_posterior(size: int) -> None:
    model, data, settings = composed(size=size)
    found = gathering.gather(model, data, settings)
    assert found["posterior"] is None
    assert found["latents"]["size"] == size
    assert array(found["latents"]["prior"]["draws"]).reshape(-1, 2).shape == (1500, 2)
    with pytest.raises(InputError, match="2 dimensions"):
        posterior.side_by_side(model, data.test_x[:1].float())


def test_the_path_ends_in_the_posterior_and_begins_in_its_start() -> None:
    model, data, _ = composed()
    x = model.preprocessing(data.test_x[:1]).expand(4000, -1, -1, -1)
    with seeded(0, "path"), torch.no_grad():
        found = posterior.paths(model, x, 2)
        conditional = model.posterior(x[:1])
        z = model.latent(x)
    assert found is not None
    z_t = array(found["z"]).reshape(found["steps"] + 1, found["count"], 2)
    assert np.allclose(z_t[0].mean(0), z.mean(0), atol=4 * z_t[0].std(0) / math.sqrt(found["count"]) * 1.5)
    assert np.allclose(z_t[-1].mean(0), conditional.start.mean[0], atol=0.06)


def test_a_chain_in_units_of_the_prior_is_a_chain() -> None:
    model, data, _ = composed(size=3)
    assert isinstance(model.posterior, ScaledPosterior)
    found = posterior.paths(model, model.preprocessing(data.test_x[:5]), 3)
    assert found is not None
    assert array(found["z"]).size == (found["steps"] + 1) * found["count"] * 2


def test_nothing_random_is_touched_and_it_is_the_same_each_time() -> None:
    model, data, settings = composed()
    torch.manual_seed(1)
    before = random_state()["cpu"]
    first = gathering.gather(model, data, settings)
    assert torch.equal(random_state()["cpu"], before)
    torch.manual_seed(2)
    assert gathering.gather(model, data, settings) == first


def test_the_pictured_posteriors_are_densities_and_the_gap_is_the_known_one(correlated: Any) -> None:
    """Of a linear-Gaussian model whose posterior is known: the grid holds it, and the best diagonal Gaussian's gap."""
    gaussian = GaussianPosterior(correlated.encoder(), 2)
    deviation = correlated.precision.diagonal().rsqrt()
    weight = torch.cat([correlated.gain, torch.zeros(2, 3)])
    set_linear(gaussian.head, weight, torch.cat([-correlated.gain @ correlated.offset, 2 * deviation.log()]))
    model = correlated.model(gaussian)
    _, x = correlated.simulate(3)
    with torch.no_grad():
        draws = model.posterior(x).sample((4000,))
        assert torch.allclose(draws.std(0), deviation.expand(3, 2), rtol=0.05), "the head is as supposed"
        entries = posterior.side_by_side(model, x)
    for entry, one in zip(entries, x, strict=True):
        x0, x1, y0, y1 = entry["window"]
        area = (x1 - x0) * (y1 - y0) / entry["side"] ** 2
        exact = array(entry["exact"]).reshape(entry["side"], entry["side"])
        assert exact.sum() * area == pytest.approx(1, abs=0.02)
        steps = (np.arange(entry["side"]) + 0.5) / entry["side"]
        mean = correlated.posterior(one).mean
        assert (exact.sum(0) * (x0 + (x1 - x0) * steps)).sum() * area == pytest.approx(float(mean[0]), abs=0.02)
        assert (exact.sum(1) * (y0 + (y1 - y0) * steps)).sum() * area == pytest.approx(float(mean[1]), abs=0.02)
        assert array(entry["approximate"]).sum() * area == pytest.approx(1, abs=0.05)
        assert entry["log_likelihood"] == pytest.approx(float(correlated.evidence().log_prob(one)), abs=0.02)
        assert abs(entry["gap"] - correlated.diagonal_gap) < 4 * entry["gap_error"] + 0.02


def test_a_smoothed_density_is_that_of_its_draws(float64: None) -> None:
    """Two modes far apart stay as narrow as they are, and the whole integrates to 1."""
    draws = torch.cat([0.05 * torch.randn(1000, 2) - 2, 0.2 * torch.randn(1000, 2) + 2])
    for centre, scale in ((-2, 0.05), (2, 0.2)):
        steps = torch.linspace(-6 * scale, 6 * scale, 61)
        offsets = torch.cartesian_prod(steps, steps)
        mass = posterior.smoothed(draws, centre + offsets) * (steps[1] - steps[0]) ** 2
        assert float(mass.sum()) == pytest.approx(0.5, abs=0.02)
        spread = (offsets.square() * mass[:, None]).sum(0) / mass.sum()
        assert spread.sqrt().tolist() == pytest.approx([scale, scale], rel=0.2)


def test_sprites_hold_every_tile_where_it_is_looked_for() -> None:
    pixels = torch.rand(7, 1, 3, 4)
    found = sprite(pixels)
    whole = image(found["url"])
    for i in range(7):
        top, left = i // found["columns"] * 3, i % found["columns"] * 4
        assert np.allclose(whole[top : top + 3, left : left + 4], pixels[i, 0] * 255, atol=0.51)
    assert array(packed(pixels)).tolist() == pixels.flatten().tolist()


def test_large_images_make_fewer_and_smaller_tiles() -> None:
    model, data, _ = composed("colour images")
    tiles = gathering.Tiles.of(model.preprocessing, data.test_x, 255.0)
    large = torch.zeros(1, 3, 200, 100, dtype=torch.uint8)
    assert tiles.raw(large).shape == (1, 3, 48, 24)
    assert tiles.most(torch.zeros(1, 3, 32, 32)) == 8_000_000 // 3072
    assert tiles.most(torch.zeros(1, 1, 28, 28)) == 8_000_000 // 784


# The page


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose data set and labels are called what a page mustn't run."""
    root = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 300)
    names = np.array([HOSTILE, "<b>bold</b> & ${x}", "a \"quoted\" 'name' $data"])
    path = root / "<img src=x onerror=alert(2)>.npz"
    np.savez(path, x=random.normal(size=(300, 6)) + y[:, None], y=names[y])
    settings = resolve(str(path), "ddvi_semi", "gaussian", SMALL | {"n_labels": 30, "out": root / "run"})
    with briefly():
        runs.train(settings)
    return root / "run"


def test_what_a_user_has_named_is_text(hostile: Path) -> None:
    page = (hostile / "report.html").read_text()
    outside = re.sub(r'<script type="application/json" id="data">.*?</script>', "", page, flags=re.DOTALL)
    for text in (HOSTILE, "<b>bold", "<img"):
        assert text not in page
    assert "&lt;img src=x onerror=alert(2)&gt;" in outside
    (data,) = content(hostile / "report.html")["data"].values()
    assert HOSTILE in data["classes"]
    assert page.count("<script") == page.count("</script>") == 3


def test_a_page_needs_no_network(hostile: Path) -> None:
    page = (hostile / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page)
    assert not re.findall(r"@import|url\((?!data:)", page.partition("</style>")[0])


def test_the_command_on_the_page_makes_the_same_run(hostile: Path) -> None:
    run = comparison.run_of(hostile)
    words = shlex.split(comparison.command(run))
    assert words[:2] == ["ddvi", "train"]
    given = dict(word.split("=", 1) for word in words[5:])
    again = resolve(*words[2:5], given | {"out": str(hostile), "threads": "1"})
    assert again == run.settings


def test_several_runs_share_their_examples_and_the_library(hostile: Path, tmp_path: Path) -> None:
    digits = []
    for method in ("vae", "aae"):
        settings = resolve("digits", method, "pinwheel", SMALL | {"out": tmp_path / method, "report": False})
        with briefly():
            runs.train(settings)
        assert not (tmp_path / method / "report.html").exists()
        digits.append(tmp_path / method)
    page = runs.report([*digits, hostile], tmp_path / "page.html")
    found = content(page)
    assert [run["name"].split()[0] for run in found["runs"]] == ["vae", "aae", "ddvi_semi"]
    assert len(found["data"]) == 2
    assert found["runs"][0]["data"] == found["runs"][1]["data"]
    assert page.stat().st_size < 1_500_000 + 2_000_000
    assert runs.report(digits) == tmp_path / "report.html"


def test_the_histories_gaps_and_infinities_are_left_out(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddvi.report import page

    rows = [{"epoch": "1", "loss": "", "kl": "inf", "seconds": "3"}, {"epoch": "2", "loss": "4.5", "kl": "1"}]
    monkeypatch.setattr(folders, "read_history", lambda _: rows)
    assert page._history(comparison.run_of(hostile)) == {"epoch": [1, 2], "loss": [None, 4.5], "kl": [None, 1]}


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["nowhere"], "there is no run folder"),
        ([""], "holds no config.yaml"),
        (["run", "run"], "named twice"),
    ],
)
def test_what_is_no_run_is_refused(names: list[str], sentence: str, hostile: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        runs.report([hostile.parent / name for name in names])


def test_nothing_is_drawn_of_other_data_than_was_trained_on(tmp_path: Path, brief: None) -> None:
    from ddvi import tables

    random, path = np.random.default_rng(0), tmp_path / "own.npz"
    np.savez(path, x=random.normal(size=(60, 4)))
    runs.train(resolve(str(path), "vae", "gaussian", SMALL | {"out": tmp_path / "run", "report": False}))
    np.savez(path, x=random.normal(size=(60, 4)))
    for draw in (lambda: runs.report([tmp_path / "run"]), lambda: tables.draw(tmp_path)):
        with pytest.raises(InputError, match="SHA-256 differs"):
            draw()
    assert not list(tmp_path.rglob("own.png"))


def test_an_output_that_cannot_be_written_is_refused_before_the_work(hostile: Path, tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "missing/page.html"):
        with pytest.raises(InputError, match="give the file's own path"):
            runs.report([hostile], output)


@pytest.mark.parametrize("kind", ["images", "table"])
def test_the_exact_evidence_of_a_page_is_that_of_the_measures(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the data's own units, where the model's are others."""
    model, data, settings = composed(kind, method="vae")
    volume = float(data.train_x.double().std(0, correction=0).log().sum()) if kind == "table" else 0.0
    entry = gathering.gather(model, data, settings)["posterior"][0]
    from ddvi.evaluation import prepared

    x = prepared(model.preprocessing, data.test_x)[entry["row"]][None]
    exact = exact_log_likelihood(model.prior, model.likelihood, x).log_likelihood
    assert entry["log_likelihood"] == pytest.approx(float(exact) - volume, abs=0.05)
    monkeypatch.setattr(Standardise, "log_volume", 0.0)
    unscaled = gathering.gather(model, data, settings)["posterior"][0]
    assert unscaled["bound"] - entry["bound"] == pytest.approx(volume, abs=1e-3)
