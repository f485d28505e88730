"""What a posterior loses by being amortised, and what a Gaussian of each example's own would lose.

    python benchmarks/amortisation.py RUN [RUN …] [--examples 64] [--steps 1500] [--data-root FOLDER] [--json FILE]

Of a run folder's decoder and its first test examples x, all in nats:

    gap           log p(x) − E_q[log w] of the run's own posterior, whose encoder serves every x
    diagonal gap  the same of the best N(m, diag s²) for this x alone
    full gap      the same of the best N(m, L Lᵀ) for this x alone

The best are found by Adam on the bound of each example, without an encoder. Where a Gaussian loses little and the run
much, what is missing isn't flexibility but the encoder. log p(x) is an importance-weighted bound by draws of the best
full Gaussian, half of them of a wider one: near enough where the posterior has one mode.

Source: Cremer, Li, Duvenaud, Inference Suboptimality in Variational Autoencoders, 2018.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ddvi import data, runs
from ddvi.errors import InputError
from ddvi.evaluation import prepared
from ddvi.gaussians import standard_log_prob
from ddvi.model import LatentVariableModel
from ddvi.randomness import seeded

LEARNING_RATE = 5e-2
"""Of Adam, in units of the posterior's own spread at the start; falls to a hundredth."""
DRAWS = 4
"""Of each step's bound."""
JUDGED = 500
"""Draws of a bound that is reported."""
WEIGHED = 5000
"""Draws behind log p(x)."""
WIDER = 1.2


@dataclass(frozen=True)
class Losses:
    """Means over the examples, in nats, and standard errors of the three gaps."""

    run: str
    examples: int
    log_likelihood: float
    gap: float
    gap_error: float
    diagonal_gap: float
    diagonal_gap_error: float
    full_gap: float
    full_gap_error: float
    seconds: float


class Gaussians:
    """One N(m, L Lᵀ) for each of B examples, around where a posterior was: z = start + base (mean + L u).

    Args:
        draws: of that posterior, (K, B, D).
        full: whether L has entries below its diagonal.
    """

    def __init__(self, draws: Tensor, full: bool) -> None:
        self.start = draws.mean(0)
        around = draws - self.start
        spread = torch.einsum("kbi,kbj->bij", around, around) / len(draws)
        size = draws.shape[-1]
        if not full:
            spread = spread * torch.eye(size)
        self.base = torch.linalg.cholesky(spread + 1e-8 * torch.eye(size))
        self.full = full
        self.mean = torch.zeros_like(self.start).requires_grad_()
        self.log_scale = torch.zeros_like(self.start).requires_grad_()
        self.below = torch.zeros_like(self.base).requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        return [self.mean, self.log_scale, *[self.below] * self.full]

    def factor(self) -> Tensor:
        """That of z, (B, D, D)."""
        inner = torch.diag_embed(self.log_scale.exp())
        return self.base @ (inner + torch.tril(self.below, -1) if self.full else inner)

    def log_weights(self, model: LatentVariableModel, x: Tensor, samples: int, width: float = 1.0) -> Tensor:
        """log p(x, z) − log q(z) of draws of the Gaussians, or of ones so many times as wide: (samples, B)."""
        factor = self.factor() * width
        noise = torch.randn(samples, *self.start.shape)
        center = self.start + (self.base @ self.mean.unsqueeze(-1)).squeeze(-1)
        z = center + torch.einsum("bij,kbj->kbi", factor, noise)
        log_q = standard_log_prob(noise) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return model.likelihood.log_prob(x, z) + model.prior.log_prob(z) - log_q

    def learn(self, model: LatentVariableModel, x: Tensor, steps: int) -> None:
        """Climb every example's own bound."""
        optimizer = torch.optim.Adam(self.parameters, lr=LEARNING_RATE)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.01 ** (step / steps)
            optimizer.zero_grad()
            (-self.log_weights(model, x, DRAWS)).sum().backward()
            optimizer.step()


def losses(model: LatentVariableModel, x: Tensor, steps: int, run: str = "") -> Losses:
    """Of a model in evaluation mode on observations (B, *event), from torch's random state."""
    started = time.monotonic()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        elbo = model.log_weights(x, JUDGED).mean(0)
        draws = model.posterior(x).sample((max(JUDGED, 10 * model.posterior.latent_size),))
    best = {full: Gaussians(draws, full) for full in (False, True)}
    for gaussians in best.values():
        gaussians.learn(model, x, steps)
    with torch.no_grad():
        widths = [1.0, WIDER]
        parts = [best[True].log_weights(model, x, WEIGHED // 2, width) for width in widths]
        log_p = torch.cat(parts).logsumexp(0) - math.log(len(widths) * (WEIGHED // 2))
        gaps = [log_p - elbo, *(log_p - best[full].log_weights(model, x, JUDGED).mean(0) for full in (False, True))]
    numbers = [value for gap in gaps for value in (float(gap.mean()), float(gap.std() / math.sqrt(len(gap))))]
    return Losses(run, len(x), float(log_p.mean()), *numbers, time.monotonic() - started)


def of_run(folder: Path, examples: int, steps: int, data_root: str | None) -> Losses:
    """Of a run folder's model on its first test examples."""
    settings, _, model = runs.load_run(folder)
    if not model.posterior.has_density or model.classifier is not None:
        raise InputError(f"{folder} has no bound without labels; give a run of another method")
    with runs.arithmetic(settings):
        dataset = data.load(
            settings.dataset, data_root or settings.data_root or None, settings.seed, settings.limit or None
        )
        x = prepared(model.preprocessing, dataset.test_x[:examples])
        with seeded(0, "amortisation"):
            return losses(model, x, steps, str(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--data-root")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if min(arguments.examples - 1, arguments.steps) < 1:
        parser.error("--examples is at least 2, --steps at least 1")
    table = Table("run", "log p(x)", "gap", "diagonal gap", "full gap", "s")
    found: list[Losses] = []
    try:
        for folder in arguments.runs:
            found.append(one := of_run(folder, arguments.examples, arguments.steps, arguments.data_root))
            pairs = [(one.gap, one.gap_error), (one.diagonal_gap, one.diagonal_gap_error)]
            pairs.append((one.full_gap, one.full_gap_error))
            cells = [f"{value:.2f} ± {error:.2f}" for value, error in pairs]
            table.add_row(one.run, f"{one.log_likelihood:.2f}", *cells, f"{one.seconds:.0f}")
    except InputError as error:
        print(f"amortisation: {error}", file=sys.stderr)
        return 2
    Console(highlight=False, markup=False).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
