"""
Ancestry from genotypes
=======================

Three populations exchange migrants. From the genotypes of a few hundred of their members, without being told who comes
from where, a latent-variable model places everyone in a plane whose prior has three parts. The clusters found there
stand beside those of the usual way, k-means on principal components.
"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import msprime
import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn
from torch.distributions import Binomial, Distribution, Independent

import ddvi
from ddvi.networks import DenseDecoder, DenseEncoder

# %%
# The genotypes
# -------------
#
# One population splits into three, which exchange migrants ever since. Sites that lie far apart have genealogies of
# their own, so each is a simulation of its own, and of each one variant is kept that isn't rare. A genotype counts the
# derived alleles of a diploid: 0, 1 or 2.

POPULATIONS = ("A", "B", "C")
INDIVIDUALS, SITES = 100, 600  # in each population, and of all


def demography(size: float = 5_000, split: float = 300, migration: float = 5e-4) -> msprime.Demography:
    """Three populations of a common origin, `split` generations ago, and the share of migrants a generation."""
    model = msprime.Demography()
    for name in (*POPULATIONS, "origin"):
        model.add_population(name=name, initial_size=size)
    model.set_symmetric_migration_rate(POPULATIONS, migration)
    model.add_population_split(time=split, derived=POPULATIONS, ancestral="origin")
    return model


def simulate(seed: int, rarest: float = 0.05) -> np.ndarray:
    """Genotypes (individuals, SITES), population after population."""
    random = np.random.default_rng(seed)
    genealogies = msprime.sim_ancestry(
        dict.fromkeys(POPULATIONS, INDIVIDUALS),
        demography=demography(),
        sequence_length=2_000,
        num_replicates=2 * SITES,
        random_seed=seed,
    )
    kept = []
    for genealogy in genealogies:
        mutated = msprime.sim_mutations(genealogy, rate=2e-8, random_seed=int(random.integers(1, 2**31)))
        alleles = mutated.genotype_matrix()  # (variants, chromosomes)
        frequency = (alleles > 0).mean(1)
        common = (np.minimum(frequency, 1 - frequency) > rarest) & (alleles.max(1, initial=0) == 1)
        if common.any():
            kept.append(random.choice(alleles[common]))
        if len(kept) == SITES:
            break
    return np.stack(kept, 1).reshape(-1, 2, SITES).sum(1)


complete = simulate(seed=1)
population = np.repeat(np.arange(3), INDIVIDUALS)
print(f"{complete.shape[0]} individuals, {complete.shape[1]} sites")

# %%
# How far the populations are apart is said by their fixation index, the share of the variance of allele frequencies
# that lies between them (Hudson's estimator, as a ratio of sums over sites):


def fixation(first: np.ndarray, second: np.ndarray) -> float:
    """F_ST of two populations."""
    p, q, n, m = first.mean(0) / 2, second.mean(0) / 2, 2 * len(first), 2 * len(second)
    between = (p - q) ** 2 - p * (1 - p) / (n - 1) - q * (1 - q) / (m - 1)
    return float(between.sum() / (p * (1 - q) + q * (1 - p)).sum())


groups = [complete[population == number] for number in range(3)]
for i, j in ((0, 1), (0, 2), (1, 2)):
    print(f"F_ST of {POPULATIONS[i]} and {POPULATIONS[j]}: {fixation(groups[i], groups[j]):.3f}")

# %%
# A sequencer misses some calls. x holds −1 for these, so that all of x is whole numbers.

MISSING = -1
random = np.random.default_rng(1)
genotypes = np.where(random.random(complete.shape) < 0.04, MISSING, complete)
print(f"{(genotypes == MISSING).mean():.1%} of the calls are missing")

# %%
# The model
# ---------
#
# A decoder gives the frequency p_s(z) of the derived allele at each site s, and each of the two chromosomes has it with
# that probability. A missing call isn't counted::
#
#     log p(x | z) = Σ_s log Binomial(x_s; 2, p_s(z))    over sites that were called
#
# This is an exponential family, in T(x) = (x_s, 1) at called sites and 0 at the others, and
# η(z) = (logit p_s, 2 log(1 − p_s)), with A = 0. Said so, scores of many pairs are one matrix product.


class GenotypeLikelihood(ddvi.ExponentialFamily):
    """Binomial with two trials at each called site."""

    def forward(self, z: Tensor) -> Distribution:
        return Independent(Binomial(2, logits=self.decoder(z)), 1)

    def natural(self, z: Tensor) -> Tensor:
        logits = self.decoder(z)
        return torch.cat([logits, -2 * nn.functional.softplus(logits)], -1)

    def log_partition(self, parameters: Tensor) -> Tensor:
        return parameters.new_zeros(parameters.shape[:-1])

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        called = (x != MISSING).to(x.dtype)
        return torch.cat([x * called, called], -1), math.log(2) * (x == 1).sum(-1)


# %%
# The encoder, too, must know that −1 is no count. It sees genotypes standardised by the frequency of the allele, as is
# usual before principal components, and 0, the mean, where there is no call. Dropout keeps it from learning individuals
# by heart, since there are more sites than individuals.


class GenotypeEncoder(nn.Module):
    """Genotypes (B, sites) to features (B, out_features)."""

    def __init__(self, x: Tensor, hidden_size: int) -> None:
        super().__init__()
        self.layers = DenseEncoder(x.shape[1], hidden_size, dropout=0.5)
        self.out_features = self.layers.out_features
        called = x != MISSING
        frequency = (x * called).sum(0) / (2 * called.sum(0))
        self.register_buffer("mean", 2 * frequency)
        self.register_buffer("scale", (2 * frequency * (1 - frequency)).sqrt())

    def standardise(self, x: Tensor) -> Tensor:
        return torch.where(x == MISSING, 0.0, (x - self.mean) / self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.standardise(x))


# %%
# The prior is a mixture of three Gaussians in the plane, the posterior a diffusion model. No label is given to anyone.

x = torch.from_numpy(genotypes)
with ddvi.seeded(1):
    encoder = GenotypeEncoder(x, hidden_size=64)
    likelihood = GenotypeLikelihood(DenseDecoder(2, x.shape[1:], hidden_size=64), x.shape[1:])
prior = ddvi.GaussianMixture(parts=3)
inference = ddvi.Inference(prior, likelihood, "ddvi", encoder=encoder, steps=5, seed=1)
inference.fit(x, epochs=80, batch_size=100, lr=4e-3)

# %%
# Clusters
# --------
#
# Everyone's place is the posterior's mean, and the cluster the prior's most probable part there. Principal
# components are those of the same standardised genotypes, with 0 for a missing call; k-means is told that there are
# three clusters, as the prior is. ``nmi`` is the normalised mutual information of clusters and populations: 1 where
# they are the same, 0 where one says nothing of the other.

latents = inference.posterior(x).mean(500, seed=1)
parts = prior.log_prob(latents, torch.arange(3)[:, None]).argmax(0).numpy()
components = PCA(10, random_state=1).fit_transform(encoder.standardise(x).numpy())


def kmeans(points: np.ndarray) -> np.ndarray:
    """Three clusters."""
    return KMeans(3, n_init=10, random_state=1).fit_predict(points)


clusters = {
    "parts of the prior at the latents": parts,
    "k-means on the latents": kmeans(latents.numpy()),
    "k-means on 2 principal components": kmeans(components[:, :2]),
    "k-means on 10 principal components": kmeans(components),
}
for name, found in clusters.items():
    print(f"{name:<36} nmi {normalized_mutual_info_score(population, found):.3f}")

# %%
# To read these numbers it helps to know what a single individual in a wrong cluster takes away:

misplaced = population.copy()
misplaced[0] = 1
print(f"one individual misplaced: nmi {normalized_mutual_info_score(population, misplaced):.3f}")

# %%
# Populations that are this far apart are easily told apart, by either way. What the model has beside its clusters is a
# likelihood of what was observed: missing calls are left out of it rather than filled in, and every individual has a
# posterior, not a point alone.

# %%
# In a picture
# ------------
#
# Each mark is an individual, its colour and shape the population that the model wasn't told. The shading on the left
# is the prior. Places on the left can be compared as they are: distances there are in units of the prior. Those on the
# right are in units of the standardised genotypes.

line = torch.linspace(-2.6, 2.6, 200)
plane = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
density = prior.log_prob(plane).exp()

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
left.contourf(line, line, density, levels=np.linspace(0.02, 1.05 * density.max(), 8), cmap="Greys", alpha=0.35)
for axes, points in ((left, latents.numpy()), (right, components[:, :2])):
    for number, (marker, colour) in enumerate(zip("o^s", ("#0072B2", "#D55E00", "#009E73"), strict=True)):
        chosen = points[population == number]
        axes.scatter(*chosen.T, s=26, marker=marker, color=colour, alpha=0.75, linewidths=0, label=POPULATIONS[number])
    axes.spines[["top", "right"]].set_visible(False)
left.set(title="latents E[z | x], found without labels", xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
right.set(title="principal components", xlabel="first component", ylabel="second component")
right.legend(title="population", frameon=False)
plt.show()
