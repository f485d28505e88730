"""Priors p(z) over the latent space: one contract (`base`), those of the paper (`structured`), a user's own (`own`)."""

import pkgutil

from ddvi.catalogue import PRIORS
from ddvi.errors import check_name
from ddvi.priors.base import Prior
from ddvi.priors.own import DistributionPrior, as_prior
from ddvi.priors.structured import GaussianMixture, LessNoisySquare, Pinwheel, StandardGaussian, SwissRoll

__all__ = [
    "DistributionPrior",
    "GaussianMixture",
    "LessNoisySquare",
    "Pinwheel",
    "Prior",
    "StandardGaussian",
    "SwissRoll",
    "as_prior",
    "make_prior",
]


def make_prior(name: str, latent_size: int = 2, parts: int = 10, width: float | None = None) -> Prior:
    """The prior called `name` in `ddvi.catalogue.PRIORS`.

    Args:
        name: as `ddvi list` shows it.
        latent_size: D, at least 2 (1 for the Gaussian).
        parts: the number C of label parts.
        width: standard deviation of the noise, 1e-4 or more; None is the prior's own, for the Gaussians no noise.

    Raises:
        InputError: no prior is called so, or an argument is out of its range.

    Example:
        >>> make_prior("swiss_roll").sample((5,)).shape
        torch.Size([5, 2])
    """
    build = pkgutil.resolve_name(PRIORS[check_name("prior", name, PRIORS)].source)
    return build(latent_size, parts, width)
