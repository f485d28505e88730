"""
What the inference gap means
============================

Variational inference replaces a posterior that can't be computed by one that can. What that costs is the inference gap.
In two dimensions everything about it can be seen: the exact posterior is known on a grid, and what a Gaussian, a flow
and a diffusion model make of it is drawn beside it.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

import ddvi

# %%
# A model
# -------
#
# A source z lies somewhere in the plane, near the origin by a standard Gaussian prior. Two sensors measure how far
# it is from them, with an error. Nothing is learnt here but posteriors, so all of them face the same p(z | x).

SENSORS = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
prior = ddvi.StandardGaussian()


def distances(z: Tensor) -> Independent:
    """From the source (*, 2) to the distribution of two measurements."""
    return Independent(Normal((z.unsqueeze(-2) - SENSORS).norm(dim=-1), 0.15), 1)


with ddvi.seeded(0):
    x = distances(prior.sample((2000,))).sample()
    fresh = distances(prior.sample((100,))).sample()

# %%
# Three posteriors
# ----------------
#
# Each is learnt from the same measurements, by the objective that suits it.

METHODS = {"vae": "a Gaussian", "nsf_vae": "a spline flow", "ddvi": "a diffusion model"}
SETTINGS = {"ddvi": {"steps": 5, "prior_samples": 256}}
fits = {
    method: ddvi.Inference(prior, distances, method, hidden_size=64, **SETTINGS.get(method, {})).fit(
        x, epochs=30, lr=6e-3
    )
    for method in METHODS
}

# %%
# What is missed
# --------------
#
# For any q, the evidence of an observation falls into two parts:
#
# ::
#
#     log p(x) = E_q[ log p(x, z) − log q(z | x) ]  +  KL( q(z | x) ‖ p(z | x) )
#                the ELBO                              the inference gap
#
# The second part is never negative, and 0 only where q is the posterior. So the ELBO is a lower bound, and the gap says
# in nats how far q is from the truth. It can't be seen from the ELBO alone; it takes log p(x), which
# ``exact_log_likelihood`` has by quadrature in two dimensions.

shown = torch.tensor([[1.5, 1.5], [0.5, 2.1]])  # as far from both sensors; near to the left one
model = fits["ddvi"].model
evidence = ddvi.exact_log_likelihood(model.prior, model.likelihood, shown).log_likelihood

line = torch.linspace(-2.6, 2.6, 161)
plane = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
figure, rows = plt.subplots(2, 3, figsize=(10, 7), layout="constrained", sharex=True, sharey=True)
for row, measured, log_evidence in zip(rows, shown, evidence, strict=True):
    exact = (prior.log_prob(plane) + distances(plane).log_prob(measured) - log_evidence).exp()
    for axes, (method, name) in zip(row, METHODS.items(), strict=True):
        posterior = fits[method].posterior(measured[None])
        z = posterior.sample((600,), seed=0)[:, 0]
        gap = log_evidence - posterior.elbo(2000, seed=0).value[0]
        axes.scatter(*z.T, s=5, color="#0072B2", alpha=0.45, linewidths=0)
        axes.contour(line, line, exact, levels=exact.max() * torch.tensor([0.03, 0.2, 0.6]), colors="#333333")
        axes.plot(*SENSORS.T, "^", color="#D55E00", markersize=8)
        axes.set(title=f"{name}: gap {gap:.2f} nats", aspect="equal", xlim=(-2.6, 2.6), ylim=(-2.2, 2.2))
        axes.spines[["top", "right"]].set_visible(False)
    row[0].set_ylabel(f"measured {measured[0]:.1f} and {measured[1]:.1f}")
plt.show()

# %%
# Contours are the exact posterior, dots draws of q, triangles the sensors. As far from both sensors, the source may be
# above or below the line between them. Gaussian and flow maximise the ELBO, which is to minimise KL(q ‖ p): such a q
# avoids places where p is nearly 0, and may settle on one of two modes and say nothing of the other. That costs it
# log 2, since half of the posterior is missing, and more where it doesn't fit the mode's shape.
#
# The diffusion model is trained by reweighted wake-sleep, which goes the other way and minimises KL(p ‖ q): it is the
# missing of a mode that is dear. It keeps both, but is left with a few draws between them, where p is nearly 0, and
# the ELBO counts each of these with many nats. So the gap alone doesn't say which posterior to prefer; the two kinds of
# failure may have the same price.

print(f"log 2 = {torch.tensor(2.0).log():.2f} nats")

# %%
# A diffusion posterior has a gap of two parts. Its bound is over whole paths, q(z, a | x) against p(z | x) r(a |
# z), and the gap of the paths is never below that of z alone:
#
# ::
#
#     KL( q(z, a | x) ‖ p(z | x) r(a | z) ) = KL( q(z | x) ‖ p(z | x) ) + E_q KL( q(a | z, x) ‖ r(a | z) )
#
# The first part, the marginal gap, is what the draws show; the second is lost in the bound alone. Both are averaged
# here over measurements that no posterior was trained on. log q(z | x) is estimated over the path, so that the
# marginal gap of the diffusion model has an error of that estimate too, which makes it seem smaller than it is.

log_evidence = ddvi.exact_log_likelihood(model.prior, model.likelihood, fresh).log_likelihood
DRAWS, gaps = 50, {}
for method, fit in fits.items():
    posterior = fit.posterior(fresh)
    z = posterior.sample((DRAWS,), seed=0)
    log_q = posterior.log_prob(z, samples=50, seed=0).value
    marginal = (log_evidence - (prior.log_prob(z) + distances(z).log_prob(fresh) - log_q).mean(0)).mean()
    gap = log_evidence - posterior.elbo(DRAWS, seed=0).value
    gaps[method] = gap.mean(), marginal
    error = gap.std() / len(gap) ** 0.5
    print(f"{METHODS[method]:<18} gap {gap.mean():.2f} ± {error:.2f} nats, marginal gap {marginal:.2f}")

# %%
# Importance weighting tells the two apart. The bound of K weighted draws is the ELBO for K = 1 and tends to log p(x).
# Stray draws get no weight, so where q covers the posterior the bound closes soon; a mode that q never draws stays
# missing, however many draws there are.

counts = [2, 5, 20, 100, 500]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for place, (method, (colour, marker)) in enumerate(
    zip(METHODS, (("#D55E00", "o"), ("#009E73", "s"), ("#0072B2", "^")), strict=True)
):
    gap, marginal = gaps[method]
    left.barh(place, marginal, color=colour, height=0.6)
    left.barh(place, gap - marginal, left=marginal, color=colour, height=0.6, alpha=0.35)
    left.annotate(f" {gap:.2f}", (float(max(gap, marginal)), place), va="center")
    posterior = fits[method].posterior(fresh)
    bounds = [posterior.importance_weighted_bound(count, seed=0).value for count in counts]
    missing = [float((log_evidence - bound).mean()) for bound in bounds]
    right.plot([1, *counts], [float(gap), *missing], marker=marker, color=colour, label=METHODS[method])
left.barh([0], [0], color="#777777", label="marginal gap")
left.barh([0], [0], color="#777777", alpha=0.35, label="of the path")
left.set(title="mean inference gap", xlabel="nats")
left.legend(frameon=False)
left.set_yticks(range(3), list(METHODS.values()))
left.invert_yaxis()
right.set(title="importance weighting", xlabel="draws K", ylabel="log p(x) − bound, nats", xscale="log")
right.axhline(0, color="#999999", linewidth=1)
right.legend(frameon=False)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
# The model here is fixed. A decoder that is learnt by the bound bends towards what its posterior can do, so that gaps
# compare posteriors on one decoder only.
