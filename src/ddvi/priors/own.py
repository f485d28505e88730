"""A user's own prior: a torch distribution, or any object with `sample` and `log_prob`."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from ddvi.errors import InputError
from ddvi.priors.base import Prior
from ddvi.randomness import seeded


def check_source(source: Any, over: str) -> None:
    """Refuse what isn't one distribution over something that can be drawn and scored."""
    name = type(source).__name__
    if not all(callable(getattr(source, method, None)) for method in ("sample", "log_prob")):
        raise InputError(f"{name} has no sample and log_prob; give a prior, a torch distribution or such an object")
    if getattr(source, "batch_shape", ()):
        given = f"{name} is a batch of distributions, of batch_shape {tuple(source.batch_shape)}"
        raise InputError(f"{given}, not one over {over}; wrap it in torch.distributions.Independent(…, 1)")


@final
class DistributionPrior(Prior):
    """A torch distribution, or any object with `sample(sample_shape)` and `log_prob(z)`, as a prior.

    D is that of two draws, made and scored on the spot. An object with an integer `parts` takes `label=` in both.
    Draws are from torch's global state, which is seeded from the generator, if there is one, and put back. A module
    moves with this; anything else stays on its device, and z is taken there.

    Args:
        source: the distribution or object.

    Raises:
        InputError: it lacks a method or is a batch of distributions, or the two draws or scores are unsound.

    Example:
        >>> normal = torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))
        >>> DistributionPrior(normal).event_shape
        torch.Size([3])
    """

    def __init__(self, source: Any):
        check_source(source, "vectors")
        name, parts = type(source).__name__, getattr(source, "parts", None)
        labels = {} if parts is None else {"label": torch.tensor([0, parts - 1])}
        with seeded(0), torch.no_grad():
            draws = source.sample(torch.Size([2]), **labels)
            density = source.log_prob(draws, **labels)
        finite = "finite" if draws.isfinite().all() and density.isfinite().all() else "not finite"
        if finite != "finite" or draws.ndim != 2 or not draws.shape[:1] == density.shape == (2,):
            given = (
                f"two samples and their log_prob are {finite}, of shapes {tuple(draws.shape)}, {tuple(density.shape)}"
            )
            raise InputError(f"{name} is no prior, as {given}; make them finite, of shapes (2, latent size), (2,)")
        super().__init__(draws.shape[1], parts)
        self.source = source
        self._home = None if isinstance(source, nn.Module) else draws.device

    def _draw(self, shape: torch.Size, label: Tensor | None, options: dict[str, Any]) -> Tensor:
        labels, generator = {} if label is None else {"label": label.to(self._home)}, options["generator"]
        if generator is None:
            return self.source.sample(shape, **labels).to(self._anchor)
        with seeded(int(torch.randint(2**62, (), generator=generator, device=generator.device))):
            return self.source.sample(shape, **labels).to(self._anchor)

    def _log_density(self, z: Tensor, label: Tensor | None) -> Tensor:
        labels = {} if label is None else {"label": label.to(self._home)}
        return self.source.log_prob(z.to(self._home), **labels).to(z.device)


def as_prior(source: Any) -> Prior:
    """`source` itself if it is a `Prior`, else a `DistributionPrior` around it.

    Raises:
        InputError: as `DistributionPrior`.

    Example:
        >>> as_prior(torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))).sample((5,)).shape
        torch.Size([5, 3])
    """
    return source if isinstance(source, Prior) else DistributionPrior(source)
