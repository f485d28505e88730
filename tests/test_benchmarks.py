"""The benchmark counts what it says, and runs. Nothing here depends on how fast the machine is."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ddvi
from ddvi.errors import InputError
from ddvi.settings import resolve

BATCH, HIDDEN, PIXELS, LATENT = 8, 32, 784, 2
COMMON = {"prior": "pinwheel", "hidden_size": HIDDEN, "batch_size": BATCH, "device": "cpu"}
MODULES = ("floor", "rates", "report", "scaling", "semi_supervised", "targets", "throughput")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The modules of `benchmarks/`, which import each other as scripts in one folder do."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDVI_CACHE", str(tmp_path / "cache"))


def subject(bench: SimpleNamespace, method: str, **overrides: Any) -> Any:
    case = bench.rates.Case(method, method, {"preset": "paper"} | overrides)
    return bench.rates.Subject.build(case.settings(COMMON), bench.rates.Images.load(None, 64))


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_products_of_a_vae_are_those_of_its_layers(bench: SimpleNamespace) -> None:
    """An example costs 2·in·out a layer forward, and as much for each gradient; that of the data isn't needed.

    The log-likelihood's own product, 2 · 784 each way, may be arranged otherwise.
    """
    encoder = [(PIXELS, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 2 * LATENT)]
    decoder = [(LATENT, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, PIXELS)]
    forward = sum(2 * inputs * outputs for inputs, outputs in encoder + decoder)
    training = 3 * forward - 2 * PIXELS * HIDDEN
    built = subject(bench, "vae")
    work = bench.floor.training_work(built)
    assert training <= work.flops / BATCH <= training + 2 * 2 * PIXELS
    inferred = bench.floor.inference_work(built, 16)
    assert inferred.flops / 16 == sum(2 * inputs * outputs for inputs, outputs in encoder)
    assert inferred.optimiser_bytes == 0


def test_adam_moves_28_bytes_a_parameter_and_update(bench: SimpleNamespace) -> None:
    built = subject(bench, "vae")
    assert bench.floor.training_work(built).optimiser_bytes == 28 * size(built.model)


@pytest.mark.parametrize("sleep_steps", [0, 3])
def test_each_sleep_step_updates_the_posterior_alone(bench: SimpleNamespace, sleep_steps: int) -> None:
    built = subject(bench, "ddvi", steps=3, sleep_steps=sleep_steps)
    work = bench.floor.training_work(built)
    parameters = size(built.model.likelihood) + (1 + sleep_steps) * size(built.model.posterior)
    assert work.optimiser_bytes == 28 * parameters


def test_each_sleep_step_costs_the_same(bench: SimpleNamespace) -> None:
    none, one, three = (
        bench.floor.training_work(subject(bench, "ddvi", steps=3, sleep_steps=count)).flops for count in (0, 1, 3)
    )
    assert three - none == 3 * (one - none)
    encoding = 2 * BATCH * (2 * (PIXELS * HIDDEN + HIDDEN * HIDDEN) + HIDDEN * HIDDEN)
    decoding = 2 * BATCH * (LATENT * HIDDEN + HIDDEN * HIDDEN + HIDDEN * PIXELS)
    assert one - none > encoding + decoding


def test_the_floor_adds_products_and_bytes(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    work = bench.floor.training_work(subject(bench, "vae"))
    machine = bench.floor.Machine(torch.device("cpu"), 0.0)
    monkeypatch.setattr(machine, "bandwidth", lambda *parts: 1e9)
    machine.seconds.update({product: 1e-3 * rank for rank, product in enumerate(work.products, 1)})
    floor = machine.floor(work)
    products = sum(1e-3 * rank * count for rank, count in enumerate(work.products.values(), 1))
    assert floor.seconds_per_example == pytest.approx((products + work.optimiser_bytes / 1e9) / BATCH)
    assert floor.rate * floor.seconds_per_example == pytest.approx(1)


def test_a_product_is_timed_in_its_own_layout(bench: SimpleNamespace) -> None:
    x, weight = torch.randn(5, 3), torch.randn(4, 3)
    work = bench.floor.count(lambda: torch.nn.functional.linear(x, weight, torch.zeros(1).expand(4)), 5)
    ((product, count),) = work.products.items()
    layouts = [part for part in product.arguments if isinstance(part, bench.floor.Layout)]
    assert (count, product.flops) == (1, 2 * 5 * 3 * 4)
    assert [layout.stride for layout in layouts] == [(0,), (3, 1), (1, 3)]
    for layout in layouts:
        made = layout.tensor(torch.device("cpu"))
        assert (tuple(made.shape), made.stride()) == (layout.shape, layout.stride)
    machine = bench.floor.Machine(torch.device("cpu"), 0.0)
    assert machine.floor(work).product_seconds > 0
    assert machine.bandwidth(((4, 3), torch.float32)) > 0


def test_equal_products_are_one(bench: SimpleNamespace) -> None:
    x = torch.randn(4, 4)
    work = bench.floor.count(lambda: [x @ x, x @ x, x.T @ x], 1)
    assert sorted(work.products.values()) == [1, 2]


def test_work_is_counted_on_the_plain_path(bench: SimpleNamespace) -> None:
    built = subject(bench, "vae")
    with bench.floor.plain(built):
        pass
    posterior = built.model.posterior
    before = hasattr(posterior, "plain_gradient")
    posterior.plain_gradient = False
    with bench.floor.plain(built):
        assert posterior.plain_gradient
    assert not posterior.plain_gradient
    assert not before, "a posterior without other paths isn't given any"


def test_a_sweep_tells_linear_from_flat(bench: SimpleNamespace) -> None:
    Series, Sweep = bench.scaling.Series, bench.scaling.Sweep
    linear, flat = Series("linear", "training", [1.0, 2.0, 8.0]), Series("flat", "training", [5.0, 5.0, 5.0])
    for law, series, holds in ((2, [linear, flat], True), (1, [flat], True), (1, [linear, flat], False)):
        sweep = Sweep("", "cost", "quantity", law, (1, 2, 8), series)
        assert [sweep.doubling(each) for each in series] == [{"linear": 2.0, "flat": 1.0}[s.name] for s in series]
        assert (": yes;" in sweep.verdict()) == holds


def test_the_first_sweep_is_measured(bench: SimpleNamespace) -> None:
    case = bench.rates.Case("vae", "vae", {"preset": "paper"})
    images = bench.rates.Images.load(None, 2048)
    sweep = next(bench.scaling.Bench([case], COMMON, images, 1e-3, "highest", str).sweeps())
    assert [len(series.costs) for series in sweep.series] == [len(sweep.values)] * 2
    assert all(cost > 0 for series in sweep.series for cost in series.costs)


def test_it_prints_and_writes_what_it_measures(
    bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rates.json"
    sizes = ["--hidden-size", "16", "--batch-size", "8", "--seconds", "0.02", "--repeats", "2", "--threads", "1"]
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_rng_state()
    assert bench.throughput.main(["--methods", "vae", "vae_semi", *sizes, "--json", str(file)]) == 0
    assert before[:2] == (torch.get_num_threads(), torch.get_float32_matmul_precision())
    assert torch.equal(before[2], torch.get_rng_state())
    written = json.loads(file.read_text())
    single, semi = written["rows"]
    for row in (single, semi):
        for kind in ("training", "inference", "inference_large"):
            measured, floor = row[kind], row[kind]["floor"]
            assert measured["lowest"] <= measured["median"] <= measured["highest"]
            assert measured["reached"] == pytest.approx(measured["median"] * floor["seconds_per_example"])
            flops = sum(product["flops"] * product["count"] for product in measured["products"])
            assert flops == pytest.approx(floor["flops_per_example"] * floor["examples"])
    cost = single["training"]["median"] / semi["training"]["median"]
    assert written["semi_supervised_costs"] == {"vae_semi": pytest.approx(cost)}
    printed = capsys.readouterr().out
    assert all(len(line) <= bench.report.WIDTH for line in printed.splitlines())
    assert f"{single['training']['floor']['examples_per_second']:,.0f}" in printed
    assert sum(line.split()[:1] == ["vae_semi"] for line in printed.splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--methods vea", "did you mean 'vae'"),
        ("--prior gausian", "did you mean 'gaussian'"),
        ("--batch-size 0", "batch_size=0"),
        ("--repeats 0", "--repeats 0"),
        ("--seconds 0", "--seconds 0"),
        ("--json /nowhere/file", "/nowhere/file"),
        ("--pythae /nowhere/python", "pip install"),
        ("--data-root /nowhere", "/nowhere"),
    ],
)
def test_what_is_wrong_is_refused_in_one_sentence(bench: SimpleNamespace, words: str, named: str) -> None:
    with pytest.raises(InputError, match=named) as refusal:
        bench.throughput.main(words.split())
    assert "\n" not in str(refusal.value)


def test_fixed_targets_know_their_evidence(bench: SimpleNamespace) -> None:
    """The weighted mean of draws that cover each target is its Z, and what it says of its modes."""
    for name in ("mixture", "moons", "banana", "many_well_4"):
        known = bench.targets.TARGETS[name]()
        with ddvi.seeded(0, name):
            width = 1.5 * known.scale
            z = width * torch.randn(400_000, known.size)
            log_base = torch.distributions.Normal(0.0, width).log_prob(z).sum(-1)
        log_weight = known.log_joint(z) - log_base
        share = log_weight.softmax(0)
        effective = 1 / share.square().sum()
        assert effective > 500, name
        assert abs(log_weight.logsumexp(0) - math.log(len(z)) - known.log_evidence) < 5 / effective**0.5, name
        found = share @ known.modes(z).float()
        assert (found - known.weights).abs().max() < 5 * (0.25 / effective) ** 0.5, name
        assert abs(known.weights.sum() - 1) < 1e-4, name


def test_fixed_targets_are_measured(bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    bench.targets.main(["moons", "--by", "reweighted", "--steps", "2", "--json"])
    row = json.loads(capsys.readouterr().out)
    assert row["target"] == "moons"
    assert row["error"] == pytest.approx(row["log_evidence"] - row["exact"])
    assert 0 < row["effective_share"] <= 1
    assert len(row["weights"]) == row["modes"] == 2


def test_energy_distance_is_that_of_shifted_normals(bench: SimpleNamespace) -> None:
    """E|X − Y| of normals a apart is that of a folded normal; both samples alike have none."""
    pytest.importorskip("pyro")
    distance = importlib.import_module("pyro_guides").distance
    x, y = torch.randn(2, 4000, 1, generator=torch.Generator().manual_seed(0))
    shift, scale = 2.0, 2**0.5
    folded = scale * (2 / math.pi) ** 0.5 * math.exp(-((shift / scale) ** 2) / 2) + shift * math.erf(shift / 2)
    exact = math.sqrt(2 * folded - 2 * scale * (2 / math.pi) ** 0.5)
    assert distance(x, y + shift) == pytest.approx(exact, rel=0.05)
    assert distance(x, y) < 0.1


def test_guides_are_compared(bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyro")
    script = importlib.import_module("pyro_guides")
    script.main(["banana", "--steps", "3", "--particles", "4", "--nuts", "20", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["guide"] for row in rows] == ["NUTS", *script.GUIDES]
    assert all(math.isfinite(row["elbo"]) for row in rows[1:])


def test_few_labels_are_searched_and_measured(bench: SimpleNamespace, tmp_path: Path, capsys: Any) -> None:
    small = ["n_labels=40", "epochs=1", "hidden_size=16", "limit=200"]
    common = ["--dataset", "digits", "--priors", "pinwheel", "--seeds", "1"]
    bench.semi_supervised.main([*common, "--methods", "vae", "--search", "--held-out", "0.5", *small])
    assert "accuracy 0." in capsys.readouterr().out
    report = tmp_path / "table.md"
    runs = ["--runs", str(tmp_path / "runs"), "--report", str(report)]
    bench.semi_supervised.main([*common, "--methods", "labels_alone", "vae", *runs, *small])
    rows = [line for line in report.read_text().splitlines() if line.startswith(("|  | labels", "| pinwheel"))]
    assert [row.split("|")[2].strip() for row in rows] == ["labels_alone", "vae"]


def test_held_out_labels_are_none_that_are_learnt_from(bench: SimpleNamespace) -> None:
    settings = resolve("digits_semi", "vae_semi", "pinwheel", {"n_labels": "40"})
    examples = bench.semi_supervised.Examples.of(settings, 0.5)
    assert len(examples.labelled.label) == len(examples.held_out.label) == 20
    both = torch.cat([examples.labelled.x, examples.held_out.x]).flatten(1)
    assert len(both.unique(dim=0)) == 40
