"""Approximate posteriors q(z, a | x): one file each, one contract (`base`)."""

from ddvi.posteriors.base import Conditional, Draw, Posterior
from ddvi.posteriors.diffusion import DiffusionConditional, DiffusionPosterior
from ddvi.posteriors.flow import FlowConditional, FlowPosterior
from ddvi.posteriors.gaussian import GaussianConditional, GaussianPosterior
from ddvi.posteriors.hierarchical import HierarchicalConditional, HierarchicalPosterior
from ddvi.posteriors.implicit import ImplicitConditional, ImplicitPosterior

__all__ = [
    "Conditional",
    "DiffusionConditional",
    "DiffusionPosterior",
    "Draw",
    "FlowConditional",
    "FlowPosterior",
    "GaussianConditional",
    "GaussianPosterior",
    "HierarchicalConditional",
    "HierarchicalPosterior",
    "ImplicitConditional",
    "ImplicitPosterior",
    "Posterior",
]
