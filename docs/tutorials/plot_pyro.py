"""
A bent posterior in Pyro
========================

How much oxygen would the water of a river use up, and how fast? Six bottles can't tell the two apart well, and the
posterior is bent. ``ddvi.pyro.AutoDiffusion`` is a guide for it that takes the place of Pyro's own.
"""

from __future__ import annotations

import math

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
# Biochemical oxygen demand, in mg/l, of bottles that stood for some days (Marske, 1967; Bates and Watts, 1988).

days = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 7.0])
demand = torch.tensor([8.3, 10.3, 19.0, 16.0, 15.6, 19.8])

# %%
# The model
# ---------
#
# The demand approaches a limit at some rate, and is measured with an error. A small rate with a high limit explains six
# days as well as a large rate with a low one.

LIMIT, RATE, ERROR = (dist.LogNormal(math.log(typical), 1.0) for typical in (20.0, 0.5, 2.0))


def expected(limit: Tensor, rate: Tensor, time: Tensor) -> Tensor:
    """The demand after some days, (*, days), of parameters (*, 1)."""
    return limit * (1 - torch.exp(-rate * time))


def bottles() -> None:
    limit, rate, error = pyro.sample("limit", LIMIT), pyro.sample("rate", RATE), pyro.sample("error", ERROR)
    with pyro.plate("bottles", len(days)):
        pyro.sample("demand", dist.Normal(expected(limit, rate, days), error), obs=demand)


# %%
# Two guides
# ----------
#
# They differ in one line: one is a Gaussian with all correlations, the other a diffusion model. The loss is minus the
# bound on log p(x), averaged at the end over many draws.


def fit(guide: AutoGuide, steps: int = 800) -> float:
    """Train a guide, and return its bound."""
    optimizer = ClippedAdam({"lr": 0.01, "lrd": 0.02 ** (1 / steps)})
    svi = SVI(bottles, guide, optimizer, Trace_ELBO(num_particles=8, vectorize_particles=True))
    for _ in range(steps):
        svi.step()
    many = Trace_ELBO(num_particles=10_000, vectorize_particles=True)
    return -SVI(bottles, guide, optimizer, many).evaluate_loss()


def sample(guide: AutoGuide) -> dict[str, Tensor]:
    """2,000 draws of each parameter, (2000, 1)."""
    return Predictive(bottles, guide=guide, num_samples=2000, parallel=True)()


with ddvi.seeded(0):
    pyro.clear_param_store()
    guides = {
        "AutoMultivariateNormal": AutoMultivariateNormal(bottles),
        "AutoDiffusion": AutoDiffusion(bottles, steps=5),
    }
    bounds = {name: fit(guide) for name, guide in guides.items()}
    draws = {name: sample(guide) for name, guide in guides.items()}

# %%
# The exact posterior
# -------------------
#
# Three latents are few enough for a grid in their logarithms, which has the evidence and the posterior of two of them.


def axis(low: float, high: float, nodes: int) -> tuple[Tensor, float]:
    """Nodes evenly apart in the logarithm, and how far."""
    return torch.linspace(math.log(low), math.log(high), nodes).exp(), math.log(high / low) / (nodes - 1)


(limits, width), (rates, height), (errors, depth) = axis(8, 400, 200), axis(0.01, 15, 200), axis(0.6, 30, 60)
limit, rate, error = torch.meshgrid(limits, rates, errors, indexing="ij")
mean = expected(limit[..., :1, None], rate[..., :1, None], days)
log_joint = dist.Normal(mean, error.unsqueeze(-1)).log_prob(demand).sum(-1)
for prior, value in ((LIMIT, limit), (RATE, rate), (ERROR, error)):
    log_joint += prior.log_prob(value) + value.log()  # a density of the logarithm
evidence = log_joint.logsumexp((0, 1, 2)) + math.log(width * height * depth)
exact = (log_joint.logsumexp(2) + math.log(depth) - evidence).exp()

print(f"log p(x) {evidence:.2f} nats")
for name, bound in bounds.items():
    print(f"{name:<22} bound {bound:.2f}, gap {evidence - bound:.2f}")

# %%
# Limit and rate
# --------------
#
# Draws of both guides over the exact density, whose lines hold 50 and 95% of it. The Gaussian is one in the logarithms,
# and can't bend.

masses = exact.flatten().sort(descending=True).values
shares = masses.cumsum(0) * width * height
levels = [float(masses[(shares < share).sum()]) for share in (0.95, 0.5)]
figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharex=True, sharey=True)
for panel, (name, sites), colour in zip(panels, draws.items(), ("#D55E00", "#0072B2"), strict=True):
    panel.scatter(sites["limit"], sites["rate"], 3, color=colour, alpha=0.4, linewidth=0)
    panel.contour(limits, rates, exact.T, levels, colors="#333333", linewidths=1.2)
    panel.set(title=name, xlabel="limit, mg/l", xscale="log", yscale="log", xlim=(11, 50), ylim=(0.08, 3))
    panel.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("rate, a day")
plt.show()
