"""
A model of one's own, end to end
================================

A drug is swallowed, absorbed into the blood and eliminated from it. Six blood samples of a patient are to say how fast
and in what volume. The model is a few lines of PyTorch; ``ddvi.Inference`` learns its posterior for all patients at
once, and this page checks it before anyone relies on it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.distributions import Independent, LogNormal

import ddvi

# %%
# The model
# ---------
#
# Its latents are the rates of absorption and elimination and the volume of distribution. All three are positive, and
# differ between patients. With s the slower rate and d the difference of the two, the concentration is ::
#
#     c(t) = (dose / V) k_a e^(−s t) (1 − e^(−d t)) / d
#
# measured with an error in proportion to it. A prior and a function to the distribution of x is all that is needed.

NAMES = ("absorption, 1/h", "elimination, 1/h", "volume, l")
HOURS = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 12.0])
DOSE, ERROR = 100.0, 0.15

prior = Independent(LogNormal(torch.tensor([1.0, 0.5, 20.0]).log(), torch.tensor([0.7, 0.7, 0.6])), 1)


def log_concentration(z: Tensor, hours: Tensor) -> Tensor:
    """log c in mg/l, (*, hours), of patients z (*, 3)."""
    absorption, elimination, volume = z.unsqueeze(-1).unbind(-2)
    slower, difference = torch.minimum(absorption, elimination), (absorption - elimination).abs() + 1e-4
    reached = -torch.expm1(-difference * hours) / difference
    return (DOSE / volume * absorption).log() - slower * hours + reached.log()


def samples(z: Tensor) -> Independent:
    """p(x | z)."""
    return Independent(LogNormal(log_concentration(z, HOURS), ERROR), 1)


# %%
# The data
# --------
#
# Patients of a study that wasn't made: they are drawn from the model, so that the truth about them is known.

with ddvi.seeded(0):
    truth = prior.sample((2200,))
    x = samples(truth).sample()
patients, held_out = x[:2000], x[2000:]

# %%
# Learning
# --------
#
# What is learnt is a network from samples to a posterior. ``validation`` patients are held out to watch the bound.

inference = ddvi.Inference(prior, samples, hidden_size=64, steps=5, seed=0)
inference.fit(patients, validation=200, epochs=30, lr=6e-3)
print({name: round(value, 2) for name, value in inference.history[-1].items() if isinstance(value, float)})

# %%
# One patient
# -----------
#
# Fast absorption with slow elimination and slow absorption with fast elimination give the same curve, where the
# volume goes along: (k_a, k_e, V) and (k_e, k_a, V k_e / k_a) can't be told apart by any number of
# samples. Pharmacologists know this as flip-flop kinetics. So the posterior has two modes, whose weights are the
# prior's, and where they are close a bent ridge joins them across the dotted line of equal rates.
#
# With three latents there is a slow way to check: many draws of the prior, resampled in proportion to p(x | z).

patient = samples(torch.tensor([[0.9, 0.5, 20.0]])).mean
posterior = inference.posterior(patient)
z = posterior.sample((1000,), seed=0)[:, 0]
with ddvi.seeded(1):
    many = prior.sample((200_000,))
    weights = samples(many).log_prob(patient).softmax(0)
    exact = many[weights.multinomial(1000, replacement=True)]
    again = posterior.predictive((1000,))[:, 0]

print(f"the prior's draws are worth {1 / weights.square().sum():.0f} of the posterior")
for name, draws in (("ddvi", z), ("exact", exact)):
    flipped = (draws[:, 0] < draws[:, 1]).float().mean()
    print(f"{name:<6} absorption is the slower one with probability {flipped:.2f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
hours = torch.linspace(0.05, 14, 100)
curves = log_concentration(z[:100], hours).exp()
left.plot(hours, curves.T, color="#0072B2", alpha=0.08, linewidth=1)
low, high = again.quantile(torch.tensor([0.05, 0.95]), 0)
left.vlines(HOURS, low, high, color="#0072B2", linewidth=3, alpha=0.5, label="new samples, 90%")
left.plot(HOURS, patient[0], "o", color="#D55E00", label="the patient")
left.set(title="concentration", xlabel="hours", ylabel="mg/l", ylim=(0, None))
left.legend(frameon=False)
right.scatter(*exact[:, :2].T, s=9, marker="s", color="#999999", alpha=0.6, linewidths=0, label="exact")
right.scatter(*z[:, :2].T, s=9, color="#0072B2", alpha=0.6, linewidths=0, label="ddvi")
right.axline((0.1, 0.1), (1.0, 1.0), color="#333333", linewidth=1, linestyle=":")
right.set(
    title="draws of the posterior",
    xlabel=NAMES[0],
    ylabel=NAMES[1],
    xscale="log",
    yscale="log",
    xlim=(0.3, 4),
    ylim=(0.3, 4),
)
for axis in (right.xaxis, right.yaxis):
    axis.set_ticks([0.3, 1, 3], ["0.3", "1", "3"])
    axis.set_ticks([], minor=True)
right.legend(frameon=False, markerscale=2)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
# All patients
# ------------
#
# The held-out patients' truth is known. If posteriors are right, the rank of the truth among draws of its posterior is
# uniform (Talts et al., 2018): a hump in the middle would mean that they are too wide, a hollow that they are too
# narrow, a slope that they lean. The grey band holds 95% of the heights that uniform ranks have.

checked = inference.posterior(held_out)
ranks = (checked.sample((99,), seed=0) < truth[2000:]).sum(0)  # (200, 3), 0 to 99
band = (
    torch.distributions.Binomial(len(held_out), torch.tensor(0.1))
    .sample((10_000,))
    .quantile(torch.tensor([0.025, 0.975]))
)
figure, row = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained", sharey=True)
for axes, name, rank in zip(row, NAMES, ranks.T, strict=True):
    axes.axhspan(*band.tolist(), color="#DDDDDD")
    axes.hist(rank, torch.linspace(0, 100, 11), color="#0072B2", alpha=0.7, rwidth=0.92)
    axes.set(title=name, xlabel="rank of the truth")
    axes.spines[["top", "right"]].set_visible(False)
row[0].set_ylabel("patients")
plt.show()

# %%
# The bounds say how much is left to gain: the importance-weighted one tends to log p(x), so that its distance to the
# evidence lower bound is about what the posterior misses. Its mean is far above its median, since late samples of fast
# elimination are very exact in the logarithm: a few stray draws, which hardly show in the ranks, cost such a patient
# many nats. Longer training makes them fewer; weighting draws by p(x, z) / q(z | x) takes them out.

missed = checked.importance_weighted_bound(1000, seed=0).value - checked.elbo(100, seed=0).value
print(f"missed per patient, in nats: median {missed.median():.2f}, mean {missed.mean():.2f}, most {missed.max():.2f}")

# %%
# Keeping it
# ----------
#
# The file holds weights and settings, no data. Model and prior are code, and are given again.

with tempfile.TemporaryDirectory() as folder:
    inference.save(Path(folder) / "patients.safetensors")
    loaded = ddvi.Inference.load(Path(folder) / "patients.safetensors", prior, samples)
print("the same draws:", torch.equal(loaded.posterior(patient).sample((5,), seed=0), posterior.sample((5,), seed=0)))
