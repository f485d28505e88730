"""Fixed targets with known truth: log Z, and the weight of every mode, beside what is learnt.

    python benchmarks/targets.py                        # all, by annealed particles
    python benchmarks/targets.py mixture moons --by reweighted --steps 2000 --posterior nsf_vae --json

| target | D | log γ |
|---|---|---|
| mixture | 2 | 40 Gaussians of unit variance and equal weight, centres uniform in [−40, 40]² |
| moons | 2 | −½ ((|z| − 2)/0.2)² + log Σ_± exp(−½ ((z₁ ± 2)/0.3)²) |
| banana | 2 | N(z₁; 0, 10²) N(z₂; 3 − 0.03 z₁², 1) |
| funnel | 10 | N(z₁; 0, 3²) Π_i N(z_i; 0, exp z₁) (Neal, Slice Sampling, 2003) |
| many_well_4, many_well_32 | 4, 32 | Σ over pairs of −z₁⁴ + 6 z₁² + ½ z₁ − ½ z₂² (Noé et al., 2019) |
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.integrate import quad
from torch import Tensor
from torch.distributions import Normal

import ddvi
from ddvi.randomness import generator

DRAWS = 100_000
LOST = 0.1
"""A mode with less than this share of its true weight is lost."""


@dataclass(frozen=True)
class Known:
    """A target and the truth about it."""

    log_joint: Callable[[Tensor], Tensor]
    size: int
    """D."""
    scale: float
    """Of the base."""
    log_evidence: float
    tolerance: float
    """Goal: |Δ log Z| at most."""
    modes: Callable[[Tensor], Tensor]
    """z (N, D) to which parts it belongs to, indicators (N, modes)."""
    weights: Tensor
    """Of the modes, (modes,)."""
    steps: int
    particles: int = 30_000
    moves: int = 10


def mixture() -> Known:
    centres = torch.rand(40, 2, generator=generator(0, "centres")) * 80 - 40

    def log_joint(z: Tensor) -> Tensor:
        squares = (z.unsqueeze(-2) - centres.to(z)).square().sum(-1)
        return (-0.5 * squares).logsumexp(-1) - math.log(2 * math.pi * len(centres))

    def modes(z: Tensor) -> Tensor:
        return torch.cdist(z, centres.to(z)).argmin(-1, keepdim=True) == torch.arange(len(centres))

    weights = _on_grid(log_joint, modes, 46.0)[1]
    return Known(log_joint, 2, 25.0, 0.0, 0.1, modes, weights, 8000)


def moons() -> Known:
    def log_joint(z: Tensor) -> Tensor:
        sides = torch.stack([z[..., 0] - 2, z[..., 0] + 2], -1)
        ring = (z.norm(dim=-1) - 2) / 0.2
        return -0.5 * ring.square() + (-0.5 * (sides / 0.3).square()).logsumexp(-1)

    log_evidence, weights = _on_grid(log_joint, _signs, 5.0)
    return Known(log_joint, 2, 2.0, log_evidence, 0.1, _signs, weights, 3000)


def banana() -> Known:
    def log_joint(z: Tensor) -> Tensor:
        first, second = z.unbind(-1)
        return Normal(0.0, 10.0).log_prob(first) + Normal(3 - 0.03 * first.square(), 1.0).log_prob(second)

    return Known(log_joint, 2, 15.0, 0.0, 0.1, _signs, torch.tensor([0.5, 0.5]), 3000)


def funnel() -> Known:
    def log_joint(z: Tensor) -> Tensor:
        neck, others = z[..., :1], z[..., 1:]
        return Normal(0.0, 3.0).log_prob(neck)[..., 0] + Normal(0.0, (neck / 2).exp()).log_prob(others).sum(-1)

    return Known(log_joint, 10, 5.0, 0.0, 0.3, _signs, torch.tensor([0.5, 0.5]), 4000, 50_000, 40)


def many_well(size: int) -> Known:
    def log_joint(z: Tensor) -> Tensor:
        first, second = z.unflatten(-1, (-1, 2)).unbind(-1)
        return (-first.pow(4) + 6 * first.square() + 0.5 * first - 0.5 * second.square()).sum(-1)

    def mass(low: float, high: float) -> float:
        return quad(lambda v: math.exp(-(v**4) + 6 * v**2 + 0.5 * v), low, high, epsabs=0, epsrel=1e-12)[0]

    left, right = mass(-4, 0), mass(0, 4)
    log_evidence = size / 2 * (math.log(left + right) + 0.5 * math.log(2 * math.pi))
    single = torch.tensor([left, right]) / (left + right)
    if size == 4:

        def modes(z: Tensor) -> Tensor:
            return 2 * (z[:, :1] > 0) + (z[:, 2:3] > 0) == torch.arange(4)

        weights = (single[:, None] * single).flatten()
        return Known(log_joint, size, 1.5, log_evidence, 0.3, modes, weights, 4000)

    def wells(z: Tensor) -> Tensor:
        return torch.cat([z[:, ::2] < 0, z[:, ::2] > 0], -1)

    weights = single.repeat_interleave(size // 2)
    return Known(log_joint, size, 1.5, log_evidence, 0.3, wells, weights, 5000, 100_000, 30)


def _signs(z: Tensor) -> Tensor:
    return torch.stack([z[:, 0] < 0, z[:, 0] >= 0], -1)


def _on_grid(
    log_joint: Callable[[Tensor], Tensor], modes: Callable[[Tensor], Tensor], reach: float, count: int = 1200
) -> tuple[float, Tensor]:
    """log Z and the modes' weights in the plane, by the trapezium rule, in double precision."""
    line = torch.linspace(-reach, reach, count, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    density = torch.cat([log_joint(part) for part in z.split(200_000)]).exp()
    masses = torch.cat([modes(part) for part in z.split(200_000)]).double().T @ density
    return math.log(float(density.sum())) + 2 * math.log(2 * reach / (count - 1)), (masses / density.sum()).float()


TARGETS: dict[str, Callable[[], Known]] = {
    "mixture": mixture,
    "moons": moons,
    "banana": banana,
    "funnel": funnel,
    "many_well_4": lambda: many_well(4),
    "many_well_32": lambda: many_well(32),
}


TRAININGS: dict[str, ddvi.Objective | None] = {
    "annealed": None,
    "reweighted": ddvi.Reweighted(),
    "log_variance": ddvi.LogVariance(),
    "reverse_kl": ddvi.ELBO(256, path_gradient=True),
    "tempered": ddvi.Tempered(ddvi.ELBO(256, path_gradient=True)),
}


def learn(known: Known, posterior: str, by: str, steps: int | None, lr: float, seed: int) -> ddvi.Target:
    """A target that has been trained."""
    steps = steps or known.steps
    target = ddvi.Target(known.log_joint, known.size, posterior, TRAININGS[by], scale=known.scale, seed=seed)
    if by == "annealed":
        return target.fit_annealed(known.particles, moves=known.moves, steps=steps, lr=lr)
    return target.fit(steps, lr=lr)


def measure(known: Known, target: ddvi.Target, seed: int = 0) -> dict[str, Any]:
    """What was found, beside the truth."""
    fitted = target.posterior()
    draws = fitted.weighted(DRAWS, seed=seed)
    estimate, elbo = draws.log_evidence, draws.log_weight.mean()
    found = known.modes(draws.z).float().mean(0)
    ratios = found / known.weights
    return {
        "log_evidence": float(estimate.value),
        "standard_error": float(estimate.standard_error),
        "exact": known.log_evidence,
        "error": float(estimate.value) - known.log_evidence,
        "goal": known.tolerance,
        "elbo": float(elbo),
        "effective_share": draws.effective_samples / DRAWS,
        "modes": len(ratios),
        "modes_lost": int((ratios < LOST).sum()),
        "largest_error_of_a_weight": float((ratios - 1).abs().max()),
        "weights": found.tolist(),
        "exact_weights": known.weights.tolist(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--posterior", default="ddvi", help="a method's name")
    parser.add_argument("--by", default="annealed", choices=TRAININGS, help="how it is trained")
    parser.add_argument("--steps", type=int, help="instead of each target's own number")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each target, with every weight")
    options = parser.parse_args(arguments)
    for name in options.targets:
        if name not in TARGETS:
            parser.error(f"unknown target {name}; choose from {', '.join(TARGETS)}")
    if not options.json:
        print("| target | log Z | exact | Δ | goal | ELBO − log Z | effective | lost | worst weight | s |")
        print("|---|---|---|---|---|---|---|---|---|---|")
    for name in options.targets or TARGETS:
        known, started = TARGETS[name](), time.monotonic()
        target = learn(known, options.posterior, options.by, options.steps, options.lr, options.seed)
        row = {"target": name, **measure(known, target), "seconds": time.monotonic() - started}
        print(json.dumps(row) if options.json else _line(row), flush=True)


def _line(row: dict[str, Any]) -> str:
    cells = [
        row["target"],
        f"{row['log_evidence']:.3f} ± {row['standard_error']:.3f}",
        f"{row['exact']:.3f}",
        f"{row['error']:+.3f}",
        f"{row['goal']}",
        f"{row['elbo'] - row['exact']:.2f}",
        f"{row['effective_share']:.0%}",
        f"{row['modes_lost']} of {row['modes']}",
        f"{row['largest_error_of_a_weight']:.0%}",
        f"{row['seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
