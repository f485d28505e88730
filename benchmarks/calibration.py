"""Whether posteriors learnt from simulations are calibrated, by sbi's diagnostics, and how sbi's own fare beside ours.

    python benchmarks/calibration.py                    # all simulators and methods, as a Markdown table: hours
    python benchmarks/calibration.py two_moons --methods ddvi npe --simulations 10000 --json

All methods learn from the same simulations: `ddvi` by `Inference.fit_simulations`, `npe` and `npse` are sbi's neural
posterior and score estimation at sbi's settings. `exact` is the posterior itself, on the same observations: a test that
fails it fails by chance. It needs `pip install 'ddvi[sbi]'`.

| column | what | if exact |
|---|---|---|
| SBC | p-value of uniform ranks of z among draws of q(z|x): the least, times the number of latents | passes from 0.05 |
| prior | accuracy at which z and a draw of q(z|x) are told apart, a latent at a time: the largest | 0.5 |
| coverage | p-value of expected coverage, of balls around random points, being what is claimed | passes from 0.05 |
| area | between the two, above a half; positive where q is too wide | 0 |
| C2ST | accuracy at which draws of q(z|x) are told from those of p(z|x), the mean over observations | 0.5 |
| mlp | with `--mlp`, the same by another classifier, a network instead of a random forest | 0.5 |
| fails | what of SBC, coverage and C2ST is worse than it may be; of C2ST, than the goal | – |
| s, CPU | seconds of learning, and those of the processor, which a busy machine doesn't lengthen | |

Sources: Talts et al., Validating Bayesian Inference Algorithms with Simulation-Based Calibration, 2018; Lemos et al.,
Sampling-Based Accuracy Testing of Posterior Estimators, 2023, for coverage; Lopez-Paz and Oquab, Revisiting Classifier
Two-Sample Tests, 2017; Greenberg et al., 2019, and Sharrock et al., 2024, for sbi's estimators.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from simulators import SIMULATORS, Simulator
from torch import Tensor

import ddvi
from ddvi.arithmetic import arithmetic

GOALS = {"two_moons": 0.60, "gaussian_linear": 0.55, "gaussian_mixture": 0.55}
"""C2ST at most, from 100,000 simulations."""
LEVEL = 0.05
"""A test passes from this p-value on, and fails an exact posterior so often."""
CLASSIFIERS = {"c2st": "rf", "c2st_mlp": "mlp"}
"""Of the two-sample test: sbi's default, and that of the benchmark."""
PASSES = 60
"""Of `ddvi`, and of `npse`, over the simulations."""
MOST_DRAWS = 100_000
"""That sbi makes at once, by its own limit."""
MOST_ROUNDS = 1000

Drawer = Callable[[int, Tensor], Tensor]
"""A count and observations x (N, event) to draws of q(z | x), (count, N, D)."""


def know_exact(simulator: Simulator, z: Tensor, x: Tensor, epochs: int | None, seed: int) -> Drawer:
    """The posterior itself, which learns nothing: what tests say of it they say by chance."""
    return lambda count, given: torch.stack([simulator.reference(one, count) for one in given], 1)


def learn_ddvi(simulator: Simulator, z: Tensor, x: Tensor, epochs: int | None, seed: int) -> Drawer:
    """The diffusion posterior, by the sleep term alone; a latent's support is the prior's."""
    inference = ddvi.Inference(support=simulator.prior.support, seed=seed, steps=20, sleep_levels=4)
    batch_size = min(512, len(x))
    inference.fit_simulations((z, x), epochs=epochs or PASSES, batch_size=batch_size, lr=3e-3)
    return lambda count, given: inference.posterior(given).sample((count,))


def learn_npe(simulator: Simulator, z: Tensor, x: Tensor, epochs: int | None, seed: int) -> Drawer:
    """sbi's neural posterior estimation."""
    from sbi.inference import NPE

    return _learn_by_sbi(NPE, simulator, z, x, epochs, seed)


def learn_npse(simulator: Simulator, z: Tensor, x: Tensor, epochs: int | None, seed: int) -> Drawer:
    """sbi's neural posterior score estimation, a diffusion in continuous time, for as many passes as ours.

    By itself it stops when 200 passes have brought nothing. Draws outside of the prior are drawn again, of those
    observations that lack some: sbi's own loop goes on with all of them until the last has enough.
    """
    from sbi.inference import NPSE
    from sbi.utils.sbiutils import within_support

    free = _learn_by_sbi(NPSE, simulator, z, x, epochs or PASSES, seed, reject_outside_prior=False)

    def draw(count: int, given: Tensor) -> Tensor:
        kept: list[list[Tensor]] = [[] for _ in given]
        lacking = torch.arange(len(given))
        for _ in range(MOST_ROUNDS):
            if not len(lacking):
                break
            drawn = torch.cat([free(count, given[some]) for some in lacking.split(max(1, MOST_DRAWS // count))], 1)
            inside = within_support(simulator.prior, drawn.flatten(0, 1)).view(drawn.shape[:2])
            for place, one in enumerate(lacking.tolist()):
                kept[one].append(drawn[inside[:, place], place])
            lacking = torch.tensor([i for i, parts in enumerate(kept) if sum(map(len, parts)) < count])
        if len(lacking):
            raise RuntimeError(f"npse: hardly a draw lies within the prior given x = {given[lacking[0]].tolist()}")
        return torch.stack([torch.cat(parts)[:count] for parts in kept], 1)

    return draw


METHODS: dict[str, Callable[[Simulator, Tensor, Tensor, int | None, int], Drawer]] = {
    "exact": know_exact,
    "ddvi": learn_ddvi,
    "npe": learn_npe,
    "npse": learn_npse,
}


def _learn_by_sbi(
    kind: Any, simulator: Simulator, z: Tensor, x: Tensor, epochs: int | None, seed: int, **options: Any
) -> Drawer:
    """An estimator of sbi's; options are for how draws are made."""
    with ddvi.seeded(seed, "sbi"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of reaching the number of epochs
        inference = kind(prior=simulator.prior, show_progress_bars=False, tracker=_Silent())
        limits = {} if epochs is None else {"max_num_epochs": epochs}
        inference.append_simulations(z, x).train(**limits)
        posterior = inference.build_posterior()

    def draw(count: int, given: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the size of portions
            return posterior.sample_batched((count,), x=given, show_progress_bars=False, **options).detach()

    return draw


class _Silent:
    """A tracker of sbi's that keeps nothing; by default logs go into the working folder."""

    log_dir: str | None = None

    def log_metric(self, name: str, value: float, step: int | None = None) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    def log_params(self, params: dict[str, Any]) -> None: ...

    def add_figure(self, name: str, figure: Any, step: int | None = None) -> None: ...

    def flush(self) -> None: ...


@dataclass(frozen=True)
class _Drawn:
    """Draws (count, N, D) in the place of a posterior of sbi's, so that its diagnostics share them."""

    draws: Tensor

    def sample_batched(self, sample_shape: tuple[int, ...], x: Tensor, **options: Any) -> Tensor:
        return self.draws


def calibration(z: Tensor, x: Tensor, draws: Tensor) -> dict[str, float]:
    """Simulation-based calibration and expected coverage.

    Args:
        z: latents (N, D) of the model, not learnt from.
        x: observations (N, event) of theirs.
        draws: of q(z | x), (count, N, D).
    """
    from sbi.diagnostics import check_sbc, check_tarp, run_sbc, run_tarp

    options: dict[str, Any] = {"num_posterior_samples": len(draws), "show_progress_bar": False}
    ranks, averaged = run_sbc(z, x, _Drawn(draws), **options)
    # Whole ranks would be tested against a continuous law, and an exact posterior fail more often than the level says.
    ranks = (ranks + torch.rand_like(ranks)) * len(draws) / (len(draws) + 1)
    checked = check_sbc(ranks, z, averaged, len(draws))
    area, coverage = check_tarp(*run_tarp(z, x, _Drawn(draws), num_bins=len(z), **options))
    return {
        "sbc": min(1.0, float(checked["ks_pvals"].min()) * z.shape[1]),
        "averaged": float(checked["c2st_dap"].max()),
        "area": area,
        "coverage": float(coverage),
    }


def distinguished(
    simulator: Simulator, x: Tensor, drawer: Drawer, count: int, classifiers: Iterable[str] = CLASSIFIERS
) -> dict[str, list[float]]:
    """C2ST of each observation x (N, event), by each classifier: at a half, draws are like those of p(z | x)."""
    from sbi.utils.metrics import c2st

    both = [(simulator.reference(one, count), drawer(count, one[None])[:, 0]) for one in x]
    return {name: [float(c2st(*two, classifier=CLASSIFIERS[name])) for two in both] for name in classifiers}


def measure(name: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a method's posterior of a simulator is worth, and how long it took to learn."""
    simulator, seed = SIMULATORS[name](), options.seed
    with ddvi.seeded(seed, name, "simulations"):
        z, x = simulator.pairs(options.simulations)
    started = time.monotonic(), time.process_time()
    drawer = METHODS[method](simulator, z, x, options.epochs, seed)
    seconds = {"seconds": time.monotonic() - started[0], "seconds_of_processor": time.process_time() - started[1]}
    with ddvi.seeded(seed, name, "calibration"):
        z, x = simulator.pairs(options.pairs)
        found: dict[str, Any] = calibration(z, x, drawer(options.ranks, x))
    with ddvi.seeded(seed, name, "observations"):
        _, x = simulator.pairs(options.observations)
        each = distinguished(simulator, x, drawer, options.draws, CLASSIFIERS if options.mlp else ["c2st"])
    found |= {kind: sum(values) / len(values) for kind, values in each.items()} | {"goal": GOALS[name], "each": each}
    fails = {"SBC": found["sbc"] < LEVEL, "coverage": found["coverage"] < LEVEL, "C2ST": found["c2st"] > GOALS[name]}
    return found | {"fails": [test for test, failed in fails.items() if failed]} | seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("simulators", nargs="*", metavar="SIMULATOR", help=", ".join(SIMULATORS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--simulations", type=int, default=100_000)
    parser.add_argument(
        "--epochs", type=int, help=f"passes of ddvi ({PASSES}), at most so many of npse ({PASSES}) and npe"
    )
    parser.add_argument("--pairs", type=int, default=500, help="(z, x) for ranks and coverage")
    parser.add_argument("--ranks", type=int, default=200, help="draws for each of these")
    parser.add_argument("--observations", type=int, default=10, help="for the two-sample test")
    parser.add_argument("--draws", type=int, default=10_000, help="of either kind for each of these")
    parser.add_argument("--mlp", action="store_true", help="the other classifier too, which takes the most time by far")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each simulator and method")
    options = parser.parse_args(arguments)
    for name in options.simulators:
        if name not in SIMULATORS:
            parser.error(f"unknown simulator {name}; choose from {', '.join(SIMULATORS)}")
    if not importlib.util.find_spec("sbi"):
        parser.error("the diagnostics are those of sbi; pip install 'ddvi[sbi]'")
    if not options.json:
        print("| simulator | method | SBC | prior | coverage | area | C2ST | mlp | goal | fails | s | CPU |")
        print(12 * "|---" + "|")
    with arithmetic(threads=options.threads):
        for name in options.simulators or SIMULATORS:
            for method in options.methods:
                row = {"simulator": name, "method": method, **measure(name, method, options)}
                print(json.dumps(row) if options.json else _line(row), flush=True)


def _line(row: dict[str, Any]) -> str:
    cells = [
        row["simulator"],
        row["method"],
        f"{row['sbc']:.2f}",
        f"{row['averaged']:.2f}",
        f"{row['coverage']:.2f}",
        f"{row['area']:+.3f}",
        f"{row['c2st']:.3f}",
        f"{row['c2st_mlp']:.3f}" if "c2st_mlp" in row else "–",
        f"{row['goal']:.2f}",
        ", ".join(row["fails"]) or "–",
        f"{row['seconds']:.0f}",
        f"{row['seconds_of_processor']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
