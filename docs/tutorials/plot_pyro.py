"""
A change point in Pyro
======================

Britain's coal mines saw fewer disasters from some year on. A model in Pyro asks when that was and by how much. Its
posterior has more than one mode, since some years are as good as others; ``ddvi.pyro.AutoDiffusion`` is a guide for it
that takes the place of Pyro's own.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal
from pyro.optim import ClippedAdam
from torch import Tensor

import ddvi
from ddvi.pyro import AutoDiffusion

# %%
# The data
# --------
#
# Disasters with ten or more deaths, year by year from 1851 on (Jarrett, 1979).

# fmt: off
disasters = torch.tensor([
    4, 5, 4, 1, 0, 4, 3, 4, 0, 6, 3, 3, 4, 0, 2, 6, 3, 3, 5, 4, 5, 3, 1, 4, 4, 1, 5, 5, 3, 4, 2, 5, 2, 2, 3, 4, 2, 1, 3,
    2, 2, 1, 1, 1, 1, 3, 0, 0, 1, 0, 1, 1, 0, 0, 3, 1, 0, 3, 2, 2, 0, 1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 2, 1, 0, 0, 0, 1, 1,
    0, 2, 3, 3, 1, 1, 2, 1, 1, 1, 1, 2, 4, 2, 0, 0, 0, 1, 4, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1,
]).float()
# fmt: on
years = 1851.0 + torch.arange(len(disasters))
print(f"{int(disasters.sum())} disasters in {len(years)} years")

# %%
# The model
# ---------
#
# A rate before, a rate after, and a year of change, which takes about as long as ``WIDTH`` says.

FIRST, LAST, WIDTH = float(years[0]), float(years[-1]), 0.3


def expected(before: Tensor, after: Tensor, change: Tensor) -> Tensor:
    """Disasters to expect in each year, (*, years)."""
    before, after, change = (value.unsqueeze(-1) for value in (before, after, change))
    return before + (after - before) * torch.sigmoid((years - change) / WIDTH)


def mines() -> None:
    before = pyro.sample("before", dist.Gamma(2.0, 1.0))
    after = pyro.sample("after", dist.Gamma(2.0, 1.0))
    change = pyro.sample("change", dist.Uniform(FIRST, LAST))
    with pyro.plate("years", len(years)):
        pyro.sample("disasters", dist.Poisson(expected(before, after, change)), obs=disasters)


# %%
# Two guides
# ----------
#
# They differ in one line: one is a Gaussian with all correlations, the other a diffusion model. The loss is minus the
# bound on log p(x), averaged here over many draws.


def fit(guide: AutoGuide, steps: int = 600) -> float:
    """Train a guide, and return its bound."""
    optimizer = ClippedAdam({"lr": 0.01, "lrd": 0.02 ** (1 / steps)})
    svi = SVI(mines, guide, optimizer, Trace_ELBO(num_particles=4))
    for _ in range(steps):
        svi.step()
    return -SVI(mines, guide, optimizer, Trace_ELBO(num_particles=300)).evaluate_loss()


with ddvi.seeded(0):
    pyro.clear_param_store()
    guides = {"AutoMultivariateNormal": AutoMultivariateNormal(mines), "AutoDiffusion": AutoDiffusion(mines, steps=5)}
    bounds = {name: fit(guide) for name, guide in guides.items()}
    draws = {name: Predictive(mines, guide=guide, num_samples=2000)() for name, guide in guides.items()}

# %%
# The exact posterior
# -------------------
#
# Three latents are few enough for a grid, which has the evidence and the posterior of the year.

grid = torch.linspace(2.0, 4.5, 40), torch.linspace(0.5, 1.5, 40), torch.linspace(1875, 1905, 151)
cell = torch.stack([axis[1] - axis[0] for axis in grid]).prod()
before, after, change = torch.meshgrid(*grid, indexing="ij")
log_joint = (
    dist.Gamma(2.0, 1.0).log_prob(before)
    + dist.Gamma(2.0, 1.0).log_prob(after)
    - torch.tensor(LAST - FIRST).log()
    + dist.Poisson(expected(before, after, change)).log_prob(disasters).sum(-1)
)
evidence = log_joint.logsumexp((0, 1, 2)) + cell.log()
exact = (log_joint - evidence).exp().sum((0, 1)) * cell / (grid[2][1] - grid[2][0])

print(f"log p(x) {evidence:.2f} nats")
for name, bound in bounds.items():
    print(f"{name:<22} bound {bound:.2f}, gap {evidence - bound:.2f}")

# %%
# When it was
# -----------
#
# A bound is about all latents at once; what a guide makes of the year alone, with its narrow dips between better years,
# is seen beside the exact density. Both guides were trained for as long.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=(1.2, 1))
found = draws["AutoDiffusion"]
rates = expected(found["before"].squeeze(-1), found["after"].squeeze(-1), found["change"].squeeze(-1))
rates = rates.reshape(-1, len(years))
low, middle, high = rates.quantile(torch.tensor([0.05, 0.5, 0.95]), 0)
left.bar(years, disasters, color="#BBBBBB", width=0.8)
left.fill_between(years, low, high, color="#0072B2", alpha=0.3, linewidth=0)
left.plot(years, middle, color="#0072B2", linewidth=2)
left.set(title="disasters, and their expected number (90%)", xlabel="year", ylabel="a year")

bins = torch.linspace(1875, 1905, 61)
for (name, sites), colour in zip(draws.items(), ("#D55E00", "#0072B2"), strict=True):
    right.hist(sites["change"].flatten(), bins, density=True, color=colour, alpha=0.45, label=name)
right.plot(grid[2], exact, color="#333333", linewidth=1.5, label="exact, by a grid")
right.set(title="the year of change", xlabel="year", ylabel="posterior density", xlim=(1880, 1900))
right.set_xticks(range(1880, 1901, 5))
right.legend(frameon=False, loc="upper left", fontsize=8)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()
