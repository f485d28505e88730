"""The benchmark counts what it says, and runs. Nothing here depends on how fast the machine is."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import kstest
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal

import ddvi
from ddvi.errors import InputError, TrainingError
from ddvi.settings import resolve

BATCH, HIDDEN, PIXELS, LATENT = 8, 32, 784, 2
COMMON = {"prior": "pinwheel", "hidden_size": HIDDEN, "batch_size": BATCH, "device": "cpu"}
MODULES = (
    *(
        "amortisation",
        "calibration",
        "floor",
        "launches",
        "rates",
        "report",
        "scaling",
        "semi_supervised",
        "simulators",
    ),
    *("targets", "throughput"),
)


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


def test_what_a_step_on_a_gpu_waits_for_is_shown_in_milliseconds(bench: SimpleNamespace) -> None:
    built = subject(bench, "vae")
    machine = bench.floor.Machine(torch.device("cpu"), 0.0)
    measured = bench.report.Measured(bench.rates.Rate.of([1.0]), bench.floor.training_work(built), machine)
    case = bench.rates.Case("vae", "vae", {"preset": "paper"})
    on_cpu = bench.report.Row(case, built.settings, measured, measured, measured)
    on_gpu = replace(on_cpu, launches=bench.launches.Launches(5.874e-3, 1.2e-3, 2345.6, 7.5e-4))
    ((name, *values, products, adam),) = bench.report.launches_sheet([on_cpu, on_gpu]).rows
    assert (name, *values) == ("vae", "5.87", "1.20", "2,346", "0.75")
    floor = measured.floor
    assert [float(products), float(adam)] == pytest.approx(
        [1e3 * floor.product_seconds, 1e3 * floor.optimiser_seconds], abs=0.006
    )
    assert "launches" not in on_cpu.as_dict()
    assert on_gpu.as_dict()["launches"]["busy"] == 7.5e-4


def test_a_step_is_watched_once_it_is_recorded(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiler is a stand-in that counts steps, as there are no kernels here."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    event = SimpleNamespace(self_device_time_total=20.0, count=30)
    idle = SimpleNamespace(self_device_time_total=0.0, count=7)

    def stand_in(activities: Any) -> SimpleNamespace:
        return SimpleNamespace(
            start=lambda: calls.append("start"),
            stop=lambda: calls.append("stop"),
            key_averages=lambda: [event, idle],
        )

    monkeypatch.setattr(bench.launches, "profile", stand_in)
    built = replace(subject(bench, "vae"), images=bench.rates.Images.load(None, 9 * BATCH))
    found = bench.launches.Launches.of(built, 0.5, 0.02, 1)
    assert calls == ["start", "stop"]
    assert (found.recorded, found.kernels, found.busy) == (0.5, 30 / 5, pytest.approx(20e-6 / 5))
    assert found.one_by_one > 0


def test_what_was_measured_before_a_failure_is_shown(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = bench.throughput.measure

    def failing(case: Any, *rest: Any) -> Any:
        if case.method == "iaf_vae":
            raise TrainingError("the gradient is not finite")
        return measure(case, *rest)

    monkeypatch.setattr(bench.throughput, "measure", failing)
    file = tmp_path / "rates.json"
    sizes = ["--hidden-size", "16", "--batch-size", "8", "--seconds", "0.02", "--repeats", "1", "--threads", "1"]
    with pytest.raises(TrainingError, match="not finite"):
        bench.throughput.main(["--methods", "vae", "iaf_vae", *sizes, "--json", str(file)])
    assert [row["name"] for row in json.loads(file.read_text())["rows"]] == ["vae"]
    assert "vae" in capsys.readouterr().out


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


def test_guides_are_compared(
    bench: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyro")
    script = importlib.import_module("pyro_guides")
    monkeypatch.setattr(script, "DRAWS", 50)
    monkeypatch.setattr(script, "BOUND_DRAWS", 100)
    script.main(
        ["banana", "eight_schools", "--steps", "3", "--particles", "4", "--nuts", "20", "--seeds", "0", "--json"]
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["guide"] for row in rows] == ["exact", *script.GUIDES, "NUTS", *script.GUIDES]
    assert all(math.isfinite(value) for row in rows for value in row["distance"])
    assert all(math.isfinite(value) for row in rows if row["guide"] in script.GUIDES for value in row["elbo"])


def test_a_guide_begins_at_the_best_of_its_starts(bench: SimpleNamespace) -> None:
    pytest.importorskip("pyro")
    script = importlib.import_module("pyro_guides")

    def bound(starts: int, seed: int) -> float:
        case = replace(script.CASES["regression"], starts=starts)
        with ddvi.seeded(0, "guides"):
            guide = script.learn("AutoNormal", case, steps=1, particles=16, lr=0.0, warmup=0, seed=seed)
            return -script.Trace_ELBO(1000, vectorize_particles=True, max_plate_nesting=0).loss(case.model, guide)

    singles = sorted(bound(1, seed) for seed in range(12))
    assert singles[0] + 10 < singles[-2] < bound(12, 0) + 1


@pytest.mark.parametrize(("name", "x"), [("two_moons", (0.2, 1.35)), ("gaussian_mixture", (9.5, -3.0))])
def test_references_have_the_density_of_the_posterior(bench: SimpleNamespace, name: str, x: tuple[float, ...]) -> None:
    """Their shares of 64 cells of the plane are those of prior times likelihood; x is near the prior's edge."""

    def log_likelihood(z: torch.Tensor) -> torch.Tensor:
        first, second = z.unbind(-1)
        if name == "gaussian_mixture":
            wide, narrow = (Normal(z, scale).log_prob(torch.tensor(x)).sum(-1) for scale in (1.0, 0.1))
            return torch.logaddexp(wide, narrow)
        across = x[0] + (first + second).abs() / 2**0.5 - 0.25  # r cos a
        radius = torch.hypot(across, x[1] - (second - first) / 2**0.5)
        return torch.where(across > 0, Normal(0.1, 0.01).log_prob(radius) - radius.log(), -math.inf)

    simulator = bench.simulators.SIMULATORS[name]()
    with ddvi.seeded(0, name):
        draws = simulator.reference(torch.tensor(x), 100_000).double()
    assert simulator.prior.support.check(draws).all()
    low, high = draws.min(0).values, draws.max(0).values
    reach = simulator.prior.base_dist.high[0].double()
    low, high = (low - 0.1).clamp_min(-reach), (high + 0.1).clamp_max(reach)
    middles = (torch.arange(1600, dtype=torch.float64) + 0.5) / 1600
    z = torch.cartesian_prod(*(low[:, None] + (high - low)[:, None] * middles))
    weights = log_likelihood(z).softmax(0)

    def cells(points: torch.Tensor) -> torch.Tensor:
        columns, rows = (8 * (points - low) / (high - low)).long().clamp_max(7).unbind(-1)
        return 8 * columns + rows

    exact = torch.zeros(64, dtype=torch.float64).index_add_(0, cells(z), weights)
    found = cells(draws).bincount(minlength=64) / len(draws)
    error = (exact * (1 - exact) / len(draws)).sqrt()
    assert (exact > 0.02).sum() > 5
    assert ((found - exact).abs() < 4.5 * error + 2e-4).all()


def test_references_of_the_linear_model_are_those_of_bayes_rule(bench: SimpleNamespace) -> None:
    """N(m, S) with S = Σ − Σ (Σ + N)⁻¹ Σ and m = Σ (Σ + N)⁻¹ x, of prior covariance Σ and noise N, which is 0.1 I."""
    simulator = bench.simulators.SIMULATORS["gaussian_linear"]()
    prior = simulator.prior.base_dist.variance.diag()
    noise = 0.1 * torch.eye(10)
    with ddvi.seeded(0):
        z, x = simulator.pairs(100_000)
        draws = simulator.reference(x[0], 100_000)
    torch.testing.assert_close((x - z).T.cov(), noise, rtol=0.0, atol=3e-3)
    gain = prior @ torch.linalg.inv(prior + noise)
    torch.testing.assert_close(draws.mean(0), gain @ x[0], rtol=0.0, atol=4 * (0.05 / len(draws)) ** 0.5)
    torch.testing.assert_close(draws.T.cov(), prior - gain @ prior, rtol=0.0, atol=1.5e-3)


@pytest.mark.parametrize("name", ["two_moons", "gaussian_linear", "gaussian_mixture"])
def test_latents_are_spread_evenly_among_their_references(bench: SimpleNamespace, name: str) -> None:
    """Ranks of z among draws of p(z | x) are uniform for pairs (z, x) of the model: both are draws of it."""
    simulator = bench.simulators.SIMULATORS[name]()
    with ddvi.seeded(0, name):
        z, x = simulator.pairs(1000)
        ranks = torch.stack([(simulator.reference(one, 99) < own).sum(0) for own, one in zip(z, x, strict=True)])
    for each in ranks.T:
        assert kstest((each + 0.5) / 100, "uniform").pvalue > 1e-3


def test_diagnostics_pass_the_exact_posterior_alone(bench: SimpleNamespace) -> None:
    """Draws of it pass, and can't be told from others; those at twice the distance from its mean fail."""
    pytest.importorskip("sbi")
    simulator = bench.simulators.SIMULATORS["gaussian_linear"]()
    found = {}
    with ddvi.seeded(0):
        z, x = (values[:, :1] for values in simulator.pairs(200))
        noise = 0.05**0.5 * torch.randn(100, 200, 1)
        for factor in (1, 2):
            found[factor] = bench.calibration.calibration(z, x, x / 2 + factor * noise)
    exact, wide = found[1], found[2]
    assert exact["sbc"] > 0.05
    assert exact["coverage"] > 0.05
    assert wide["sbc"] < 1e-3
    assert wide["coverage"] < 1e-3
    assert wide["area"] > 0.05 > abs(exact["area"])


@pytest.mark.filterwarnings("ignore:Number of posterior samples for ranking")
def test_ranks_among_few_draws_pass_too(bench: SimpleNamespace) -> None:
    """Among ten draws there are eleven ranks, which aren't uniform between them."""
    pytest.importorskip("sbi")
    with ddvi.seeded(0):
        z, x = (values[:, :1] for values in bench.simulators.SIMULATORS["gaussian_linear"]().pairs(2000))
        draws = x / 2 + 0.05**0.5 * torch.randn(10, 2000, 1)
        assert bench.calibration.calibration(z, x, draws)["sbc"] > 0.05


def test_draws_like_the_references_are_not_told_from_them(bench: SimpleNamespace) -> None:
    pytest.importorskip("sbi")
    simulator = bench.simulators.SIMULATORS["gaussian_linear"]()
    told = {}
    with ddvi.seeded(0):
        _, x = simulator.pairs(1)
        for factor in (1, 2):
            draws = x / 2 + factor * 0.05**0.5 * torch.randn(200, 1, 10)
            told[factor] = bench.calibration.distinguished(simulator, x, lambda *_, draws=draws: draws, 200)
    assert told[1].keys() == bench.calibration.CLASSIFIERS.keys()
    for classifier in told[1]:
        assert told[1][classifier][0] < 0.58 < 0.7 < told[2][classifier][0]


@pytest.mark.slow
def test_posteriors_of_simulations_are_compared(bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sbi")
    small = ["--simulations", "200", "--epochs", "1", "--pairs", "100", "--observations", "1", "--draws", "100"]
    before = torch.get_rng_state()
    bench.calibration.main(["gaussian_mixture", "--methods", "ddvi", "npe", *small, "--json"])
    assert torch.equal(before, torch.get_rng_state())
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["method"] for row in rows] == ["ddvi", "npe"]
    for row in rows:
        assert 0 <= row["sbc"] <= 1
        assert row["each"] == {"c2st": [row["c2st"]]}
        assert row["c2st"] > 0.6, "a pass over 200 simulations isn't enough"


@pytest.mark.slow
def test_every_estimator_stays_within_the_prior(bench: SimpleNamespace) -> None:
    pytest.importorskip("sbi")
    simulator = bench.simulators.SIMULATORS["gaussian_mixture"]()
    with ddvi.seeded(0):
        z, x = simulator.pairs(200)
        for learn in bench.calibration.METHODS.values():
            draws = learn(simulator, z, x, 1, 0)(5, x[:2])
            assert draws.shape == (5, 2, 2)
            assert simulator.prior.support.check(draws).all()


def test_few_labels_are_searched_and_measured(
    bench: SimpleNamespace, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, brief: None
) -> None:
    monkeypatch.setitem(bench.semi_supervised.CLASSIFIER, "steps", 50.0)
    small = ["n_labels=40", "epochs=1", "hidden_size=16", "limit=200", "evaluation=quick", "report=false"]
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


# What amortisation costs


def test_the_best_gaussians_lose_what_is_known(bench: SimpleNamespace) -> None:
    """Of a Gaussian posterior of precision Λ the full one loses nothing, the diagonal ½ (Σ log Λ_dd − log det Λ)."""
    decoder, scale = torch.tensor([[1.0, 0.8], [0.3, 0.5], [0.5, 0.6]]), 0.4
    likelihood = ddvi.as_likelihood(lambda z: Independent(Normal(z @ decoder.T, scale), 1), torch.Size([3]))
    with ddvi.seeded(0, "amortisation"):
        posterior = ddvi.GaussianPosterior(nn.Linear(3, 4), latent_size=2)
        model = ddvi.LatentVariableModel(ddvi.StandardGaussian(2), likelihood, posterior).eval()
        x = torch.randn(8, 2) @ decoder.T + scale * torch.randn(8, 3)
        found = bench.amortisation.losses(model, x, steps=500)
    precision = torch.eye(2) + decoder.T @ decoder / scale**2
    diagonal = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    evidence = MultivariateNormal(torch.zeros(3), decoder @ decoder.T + scale**2 * torch.eye(3)).log_prob(x).mean()
    assert found.log_likelihood == pytest.approx(float(evidence), abs=0.02)
    assert found.full_gap == pytest.approx(0.0, abs=0.05)
    assert found.diagonal_gap == pytest.approx(float(diagonal), abs=0.1)
    assert found.gap > found.diagonal_gap
