from ._version import __version__
from .data import Dataset, load, split_validation
from .errors import InputError, TrainingError
from .evaluation import evaluate, latents
from .evidence import Evidence, exact_log_likelihood
from .likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    DistributionLikelihood,
    ExponentialFamily,
    GaussianLikelihood,
    Likelihood,
    PoissonLikelihood,
)
from .model import LatentVariableModel, Weights
from .noise import NoisingProcess
from .objectives import (
    ELBO,
    Adversarial,
    Batch,
    ImportanceWeighted,
    Objective,
    ReweightedWakeSleep,
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
from .training import Interrupted, Phase, Schedule, Trainer

__all__ = [
    "ELBO",
    "Adversarial",
    "Batch",
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "Conditional",
    "Dataset",
    "DiffusionPosterior",
    "DistributionLikelihood",
    "DistributionPrior",
    "Draw",
    "Evidence",
    "ExponentialFamily",
    "FlowPosterior",
    "GaussianLikelihood",
    "GaussianMixture",
    "GaussianPosterior",
    "HierarchicalPosterior",
    "ImplicitPosterior",
    "ImportanceWeighted",
    "InputError",
    "Interrupted",
    "LatentVariableModel",
    "LessNoisySquare",
    "Likelihood",
    "NoisingProcess",
    "Objective",
    "Phase",
    "Pinwheel",
    "PoissonLikelihood",
    "Posterior",
    "Prior",
    "ReweightedWakeSleep",
    "Schedule",
    "StandardGaussian",
    "SwissRoll",
    "Trainer",
    "TrainingError",
    "Update",
    "WakeSleep",
    "WarmUp",
    "Weights",
    "__version__",
    "as_prior",
    "evaluate",
    "exact_log_likelihood",
    "latents",
    "load",
    "make_prior",
    "seeded",
    "split_validation",
]
