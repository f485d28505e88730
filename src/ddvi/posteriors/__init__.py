"""Approximate posteriors q(z, a | x): one file each, one contract (`base`)."""

from ddvi.posteriors.affine import AffineConditional, AffinePosterior
from ddvi.posteriors.base import Conditional, Density, Draw, ExplicitConditional, Posterior
from ddvi.posteriors.diffusion import DiffusionConditional, DiffusionPosterior
from ddvi.posteriors.flow import FlowPosterior
from ddvi.posteriors.gaussian import GaussianPosterior
from ddvi.posteriors.hierarchical import HierarchicalConditional, HierarchicalPosterior
from ddvi.posteriors.implicit import ImplicitConditional, ImplicitPosterior
from ddvi.posteriors.laplace import LaplacePosterior
from ddvi.posteriors.scaled import ScaledPosterior
from ddvi.posteriors.spline import SplinePosterior
from ddvi.posteriors.transformed import TransformedConditional, TransformedPosterior

__all__ = [
    "AffineConditional",
    "AffinePosterior",
    "Conditional",
    "Density",
    "DiffusionConditional",
    "DiffusionPosterior",
    "Draw",
    "ExplicitConditional",
    "FlowPosterior",
    "GaussianPosterior",
    "HierarchicalConditional",
    "HierarchicalPosterior",
    "ImplicitConditional",
    "ImplicitPosterior",
    "LaplacePosterior",
    "Posterior",
    "ScaledPosterior",
    "SplinePosterior",
    "TransformedConditional",
    "TransformedPosterior",
]
