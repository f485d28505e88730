from ._version import __version__
from .data import Dataset, load, split_validation
from .errors import InputError, TrainingError
from .evaluation import evaluate, latents
from .evidence import Evidence, exact_log_likelihood
from .fitted import Estimate, FittedPosterior
from .inference import Inference
from .likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    DistributionLikelihood,
    ExponentialFamily,
    GaussianLikelihood,
    Likelihood,
    NegativeBinomialLikelihood,
    PoissonLikelihood,
    as_likelihood,
)
from .model import LatentVariableModel, Weights
from .noise import NoisingProcess
from .objectives import (
    ELBO,
    Adversarial,
    Batch,
    ImportanceWeighted,
    MarginalLikelihood,
    Objective,
    ReweightedWakeSleep,
    Sleep,
    Update,
    WakeSleep,
    WarmUp,
)
from .posteriors import (
    Conditional,
    DiffusionPosterior,
    Draw,
    FlowPosterior,
    GaussianPosterior,
    HierarchicalPosterior,
    ImplicitPosterior,
    Posterior,
    SplinePosterior,
)
from .priors import (
    DistributionPrior,
    GaussianMixture,
    LessNoisySquare,
    Pinwheel,
    Prior,
    StandardGaussian,
    SwissRoll,
    as_prior,
    make_prior,
)
from .randomness import seeded
from .schedule import Phase, Schedule
from .supports import Bijection, Product, Section
from .training import Interrupted, Trainer

__all__ = [
    "ELBO",
    "Adversarial",
    "Batch",
    "BernoulliLikelihood",
    "Bijection",
    "CategoricalLikelihood",
    "Conditional",
    "Dataset",
    "DiffusionPosterior",
    "DistributionLikelihood",
    "DistributionPrior",
    "Draw",
    "Estimate",
    "Evidence",
    "ExponentialFamily",
    "FittedPosterior",
    "FlowPosterior",
    "GaussianLikelihood",
    "GaussianMixture",
    "GaussianPosterior",
    "HierarchicalPosterior",
    "ImplicitPosterior",
    "ImportanceWeighted",
    "Inference",
    "InputError",
    "Interrupted",
    "LatentVariableModel",
    "LessNoisySquare",
    "Likelihood",
    "MarginalLikelihood",
    "NegativeBinomialLikelihood",
    "NoisingProcess",
    "Objective",
    "Phase",
    "Pinwheel",
    "PoissonLikelihood",
    "Posterior",
    "Prior",
    "Product",
    "ReweightedWakeSleep",
    "Schedule",
    "Section",
    "Sleep",
    "SplinePosterior",
    "StandardGaussian",
    "SwissRoll",
    "Trainer",
    "TrainingError",
    "Update",
    "WakeSleep",
    "WarmUp",
    "Weights",
    "__version__",
    "as_likelihood",
    "as_prior",
    "evaluate",
    "exact_log_likelihood",
    "latents",
    "load",
    "make_prior",
    "seeded",
    "split_validation",
]
