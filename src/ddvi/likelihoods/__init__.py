"""Likelihoods p_θ(x | z): what all share (`base`), the built-in families, and a user's own."""

from ddvi.likelihoods.base import ExponentialFamily, FixedLikelihood, Likelihood, means
from ddvi.likelihoods.families import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    GaussianLikelihood,
    NegativeBinomialLikelihood,
    PoissonLikelihood,
)
from ddvi.likelihoods.own import DistributionLikelihood, as_likelihood, is_scored_object

__all__ = [
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "DistributionLikelihood",
    "ExponentialFamily",
    "FixedLikelihood",
    "GaussianLikelihood",
    "Likelihood",
    "NegativeBinomialLikelihood",
    "PoissonLikelihood",
    "as_likelihood",
    "is_scored_object",
    "means",
]
