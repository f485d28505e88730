"""Pyro's guides beside AutoDiffusion: the bound, and the distance of draws from those of the posterior.

    python benchmarks/pyro_guides.py                    # all models and guides, as a Markdown table
    python benchmarks/pyro_guides.py banana funnel --guides AutoIAFNormal --steps 24000 --json

Distances are energy distances, sqrt(2 E|X − Y| − E|X − X'| − E|Y − Y'|), of unconstrained latents in units of the
posterior's standard deviations. Its draws are a long NUTS run's, of the eight schools in non-centred form, where NUTS
moves freely; banana and funnel have no data, so that the model draws them itself. The regression's weights can change
places and signs without a change of the network, so that its distance is that of the network's values and the noise.
The first row of a model is the distance of a second reference from the first. All guides but AutoIAFNormal,
which can't be told, begin at the same place with the same width; all make as many steps, of as many particles, once for
each seed. Two rows take AutoDiffusion apart.

Sources: Rubin, 1981, for the eight schools; Haario et al., 1999, for the banana; Neal, 2003, for the funnel; Székely
and Rizzo, 2013, for the distance.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_median,
    init_to_sample,
)
from pyro.infer.reparam import LocScaleReparam
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.distributions import biject_to

import ddvi
from ddvi import GaussianPosterior, TransformedPosterior
from ddvi.pyro import AutoDiffusion
from ddvi.randomness import generator

DRAWS = 1000
BOUND_DRAWS = 20_000
PLACES = torch.linspace(-2, 2, 30)


def eight_schools() -> None:
    effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    spread = pyro.sample("spread", dist.HalfCauchy(5.0))
    effect = pyro.sample(
        "effect", dist.Normal(mean.unsqueeze(-1), spread.unsqueeze(-1)).expand([*mean.shape, 8]).to_event(1)
    )
    pyro.sample("y", dist.Normal(effect, errors).to_event(1), obs=effects)


def banana() -> None:
    first = pyro.sample("first", dist.Normal(0.0, 1.0))
    pyro.sample("second", dist.Normal(1.5 * first.square() - 1.5, 0.3))


def funnel() -> None:
    neck = pyro.sample("neck", dist.Normal(0.0, 3.0))
    width = (neck / 2).exp().unsqueeze(-1)
    pyro.sample("others", dist.Normal(0.0, width).expand([*neck.shape, 9]).to_event(1))


def regression() -> None:
    """y = sin 2x + noise at 30 places, by a network of 5 hidden units: 16 weights and the noise."""
    y = torch.sin(2 * PLACES) + 0.2 * torch.randn(30, generator=generator(0, "regression"))
    weights = pyro.sample("weights", dist.Normal(torch.zeros(16), 1.5).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    pyro.sample("y", dist.Normal(network(weights, PLACES), noise.unsqueeze(-1)).to_event(1), obs=y)


def network(weights: Tensor, x: Tensor) -> Tensor:
    """Its values (*, N) at x (N,), of weights (*, 16)."""
    inwards, bias, outwards, offset = weights.split([5, 5, 5, 1], -1)
    hidden = torch.tanh(x[:, None] * inwards.unsqueeze(-2) + bias.unsqueeze(-2))
    return (hidden * outwards.unsqueeze(-2)).sum(-1) + offset


def function(values: dict[str, Tensor]) -> Tensor:
    """What the regression's data can tell, (N, 31): the network at its places, and the logarithm of the noise."""
    return torch.cat([network(values["weights"], PLACES), values["noise"].log()[:, None]], -1)


@dataclass(frozen=True)
class Case:
    """A model, and what a comparison of its guides needs to know.

    Args:
        model: without arguments.
        has_data: whether anything is observed; if not, the model draws its posterior.
        compared: from sites (N, …) to what distances are of, (N, D); None is all of them, unconstrained.
        init_loc_fn: where all guides begin.
        init_scale: how wide those begin that can be told.
        starts: how many random starts are compared; each guide begins at that of the lowest loss.
    """

    model: Callable[[], None]
    has_data: bool = True
    compared: Callable[[dict[str, Tensor]], Tensor] | None = None
    init_loc_fn: Callable[..., Any] = init_to_median
    init_scale: float = 1.0
    starts: int = 1


CASES: dict[str, Case] = {
    "eight_schools": Case(eight_schools),
    "banana": Case(banana, has_data=False),
    "funnel": Case(funnel, has_data=False),
    # At its median, all weights 0, a network prefers no unit to another, and a wide guide takes the data for noise.
    # Of a single draw it is chance which mode is found, so the best of many is taken, as Pyro's tutorials do.
    "regression": Case(regression, compared=function, init_loc_fn=init_to_sample, init_scale=0.1, starts=100),
}
NON_CENTRED = {"effect": LocScaleReparam(centered=0.0, shape_params=[])}


def _flow(model: Callable[[], None], **start: Any) -> AutoIAFNormal:
    """Pyro's flow can't be told where to begin: it is a standard Gaussian."""
    return AutoIAFNormal(model, hidden_dim=[64], num_transforms=2)


GUIDES: dict[str, Callable[..., Any]] = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal": _flow,
    "AutoDiffusion": AutoDiffusion,
    "AutoDiffusion, layers alone": partial(
        AutoDiffusion, posterior=partial(TransformedPosterior, base=GaussianPosterior)
    ),
    "AutoDiffusion, chain alone": partial(AutoDiffusion, flow_layers=0),
}


def compared(case: Case, values: dict[str, Tensor]) -> Tensor:
    """What distances are of, (N, D), by sites of shapes (N, …)."""
    if case.compared is not None:
        return case.compared(values)
    packer = AutoContinuous(case.model, init_loc_fn=init_to_median)
    packer._setup_prototype()
    found = packer.prototype_trace.iter_stochastic_nodes()
    parts = [biject_to(site["fn"].support).inv(values[name]).reshape(len(values[name]), -1) for name, site in found]
    return torch.cat(parts, -1)


def reference(case: Case, draws: int, seed: int) -> Tensor:
    """What distances are of, (N, D), at draws of the posterior: exact ones, or a NUTS run thinned to `DRAWS`."""
    pyro.set_rng_seed(seed)
    if not case.has_data:
        return compared(case, Predictive(case.model, num_samples=DRAWS)())
    easier = pyro.poutine.reparam(case.model, config=NON_CENTRED)
    run = MCMC(NUTS(easier), num_samples=draws, warmup_steps=draws // 2, disable_progbar=True)
    run.run()
    drawn = run.get_samples()
    return compared(case, drawn | Predictive(easier, drawn)())[:: max(1, draws // DRAWS)][:DRAWS]


def distance(x: Tensor, y: Tensor) -> float:
    """The energy distance of two sets of draws (N, D)."""
    within = sum(torch.cdist(v, v).sum() / (len(v) * (len(v) - 1)) for v in (x, y))
    return math.sqrt(max(0.0, float(2 * torch.cdist(x, y).mean() - within)))


def learn(name: str, case: Case, steps: int, particles: int, lr: float, warmup: int, seed: int) -> Any:
    """A guide that has been trained, from the best of its starts.

    The rate rises over `warmup` steps and decays to a fiftieth over all of them.
    """

    def begin(start: int) -> tuple[Any, float]:
        """A new guide and its loss."""
        pyro.clear_param_store()
        pyro.set_rng_seed(start)
        guide = GUIDES[name](case.model, init_loc_fn=case.init_loc_fn, init_scale=case.init_scale)
        return guide, loss.loss(case.model, guide)

    loss = Trace_ELBO(particles, vectorize_particles=True, max_plate_nesting=0)
    starts = range(seed * case.starts, (seed + 1) * case.starts)
    guide, _ = begin(min(starts, key=lambda start: begin(start)[1]))

    def share(step: int) -> float:
        return min(1.0, (step + 1) / max(1, warmup)) * 0.02 ** (step / steps)

    optimizer = pyro.optim.LambdaLR({"optimizer": ClippedAdam, "optim_args": {"lr": lr}, "lr_lambda": share})
    svi = SVI(case.model, guide, optimizer, loss)
    for _ in range(steps):
        svi.step()
        optimizer.step()
    return guide


def measure(guide: Any, case: Case, known: Tensor) -> dict[str, float]:
    """Bound and distance of a trained guide."""
    scale = known.std(0)
    with torch.no_grad():
        each = Trace_ELBO(BOUND_DRAWS, vectorize_particles=True, max_plate_nesting=0)
        bound = -each.loss(case.model, guide)
        drawn = [guide() for _ in range(len(known))]
    values = {name: torch.stack([draw[name] for draw in drawn]) for name in drawn[0]}
    return {"elbo": bound, "distance": distance(compared(case, values) / scale, known / scale)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(CASES))
    parser.add_argument("--guides", nargs="+", choices=GUIDES, default=list(GUIDES), metavar="GUIDE")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--warmup", type=int, default=0, metavar="STEPS", help="in which the rate rises")
    parser.add_argument("--nuts", type=int, default=4000, help="draws of a NUTS run, after half as many to warm up")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="a training for each")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each row")
    options = parser.parse_args(arguments)
    for name in options.models:
        if name not in CASES:
            parser.error(f"unknown model {name}; choose from {', '.join(CASES)}")
    if not options.json:
        print("| model | guide | ELBO | distance | s |\n|---|---|---|---|---|")
    with ddvi.seeded(0, "guides"):
        for model_name in options.models or CASES:
            case = CASES[model_name]
            first, second = (reference(case, options.nuts, seed) for seed in (0, 1))
            apart = distance(first / first.std(0), second / first.std(0))
            kind = "NUTS" if case.has_data else "exact"
            _print({"model": model_name, "guide": kind, "distance": [apart]}, options.json)
            for name in options.guides:
                started = time.monotonic()
                found = []
                for seed in options.seeds:
                    guide = learn(name, case, options.steps, options.particles, options.lr, options.warmup, seed)
                    found.append(measure(guide, case, first))
                row = {key: [values[key] for values in found] for key in found[0]}
                row |= {"model": model_name, "guide": name, "seconds": (time.monotonic() - started) / len(found)}
                _print(row, options.json)


def _print(row: dict[str, Any], as_json: bool) -> None:
    values = ("  ".join(f"{value:.3f}" for value in row.get(name, [])) for name in ("elbo", "distance"))
    cells = [row["model"], row["guide"], *values, f"{row['seconds']:.0f}" if "seconds" in row else ""]
    print(json.dumps(row) if as_json else f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
