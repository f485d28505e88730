"""What every approximate posterior q(z, a | x) can do.

A posterior is a module: `forward(x)` runs its encoder once and returns a `Conditional`, the distribution of the latent
variable z and of the auxiliary variables a, if it has any, given that batch. A conditional knows two things about
itself: how to draw (z, a) together with

    log_ratio = log q(z, a | x) − log r(a | z),

and how to score a (z, a) that it is given. From these follow every bound: the evidence lower bound averages
log p(x, z) − log_ratio over draws from q, and the average of log_ratio over a ~ r(a | z) is a lower bound on
log q(z | x). Without auxiliary variables r = 1 and log_ratio is log q(z | x) itself.

Shapes: a batch of B observations gives `batch_shape` (B,), with labels broadcast in front of it (labels, B); draws are
(*sample_shape, *batch_shape, D); a path stacks z and the auxiliary variables in front, (1 + auxiliaries, *…, D).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor, nn

from ddvi.errors import InputError

VARIANCE_FLOOR = 1e-6
LARGEST_LOG_VARIANCE = 20.0  # so that a wild output stays finite
ROWS_AT_ONCE = 50_000  # draws × latents or observations, which fit into memory


def portions(samples: int, rows: int) -> list[int]:
    """`samples` draws for each of so many rows, in portions of at most `ROWS_AT_ONCE` in all; [0] of none."""
    most = max(1, ROWS_AT_ONCE // max(1, rows))
    return [most] * (samples // most) + [samples % most] * (samples % most > 0) or [0]


class Draw(NamedTuple):
    """Draws from q(z, a | x).

    Example:
        >>> draw = model.posterior(x).draw((10,))  # a chain of 4 steps
        >>> draw.z.shape, draw.log_ratio.shape, draw.path.shape
        (torch.Size([10, 3, 2]), torch.Size([10, 3]), torch.Size([5, 10, 3, 2]))
    """

    z: Tensor
    """(*sample_shape, *batch_shape, D), reparameterised."""
    log_ratio: Tensor
    """log q(z, a | x) − log r(a | z), shape (*sample_shape, *batch_shape), nats."""
    path: Tensor
    """z and the auxiliary variables, (1 + auxiliaries, *sample_shape, *batch_shape, D)."""


class Conditional(abc.ABC):
    """q(z, a | x) for one batch of observations: draws, scores, and bounds on log q(z | x).

        log_ratio = log q(z, a | x) − log r(a | z),    E_r[ log_ratio ] ≤ log q(z | x)

    A `Posterior` gives it. What needs a density raises InputError where there is none.

    Source: Ranganath et al., Hierarchical Variational Models, 2016, for the reverse model r.

    Example:
        >>> conditional = model.posterior(x)
        >>> z = conditional.sample((10,))
        >>> conditional.log_bound(z).shape, conditional.log_prob(z, samples=20)[0].shape
        (torch.Size([10, 3]), torch.Size([10, 3]))
    """

    auxiliaries: int = 0
    """How many auxiliary variables of the latent's size there are."""

    @abc.abstractmethod
    def draw(self, sample_shape: tuple[int, ...] = ()) -> Draw:
        """Draw (z, a) and score them in one go."""

    @abc.abstractmethod
    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Draw z alone, (*sample_shape, *batch_shape, D), without its score."""

    @abc.abstractmethod
    def log_ratio(self, path: Tensor) -> Tensor:
        """Score a path (1 + auxiliaries, *sample_shape, *batch_shape, D): shape (*sample_shape, *batch_shape)."""

    @abc.abstractmethod
    def reverse_path(self, z: Tensor) -> Tensor:
        """The path that begins with z of shape (*, *batch_shape, D) and goes on with one draw a ~ r(a | z)."""

    @abc.abstractmethod
    def log_bound(self, z: Tensor, levels: int | None = None) -> Tensor:
        """An unbiased estimate of E_r(a|z)[ log_ratio ] ≤ log q(z | x), exact where there are no auxiliary variables.

        It is what sleep and simulator training maximise.

        Args:
            z: (*, *batch_shape, D).
            levels: how many of the terms of a chain are drawn; all of them if None. No effect without a chain.
        """

    def log_prob(self, z: Tensor, samples: int = 100) -> tuple[Tensor, Tensor]:
        """Importance-sampled log q(z | x) and its standard error.

            log q(z | x) ≈ log 1/K Σ_k exp( log q(z, a_k | x) − log r(a_k | z) ),   a_k ~ r(a | z)

        biased downwards, exact with standard error 0 where there are no auxiliary variables.

        Args:
            z: (*, *batch_shape, D).
            samples: K, at least 2 unless exact.

        Returns:
            Two tensors (*, *batch_shape), in nats; the standard error is that of the delta method.
        """
        if not self.auxiliaries:
            value = self.log_ratio(z[None])
            return value, torch.zeros_like(value)
        if samples < 2:
            raise InputError(f"importance sampling of log q(z|x) needs at least 2 samples, not {samples}")
        sizes = portions(samples, z[..., 0].numel())
        ratios = torch.cat([self.log_ratio(self.reverse_path(z.expand(size, *z.shape))) for size in sizes])
        value = ratios.logsumexp(0) - math.log(samples)
        return value, (ratios - value).exp().std(0) / math.sqrt(samples)


class Density(Protocol):
    """Anything that can draw and score, with batch shape (*batch_shape,) and event shape (D,)."""

    def draw(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Reparameterised z (*sample_shape, *batch_shape, D) and its log density, in nats."""
        ...

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of z (*, *batch_shape, D), in nats."""
        ...


@final
class ExplicitConditional(Conditional):
    """A density as q(z | x), without auxiliary variables."""

    def __init__(self, density: Density) -> None:
        self.density = density

    def draw(self, sample_shape: tuple[int, ...] = ()) -> Draw:
        z, log_prob = self.density.draw(sample_shape)
        return Draw(z, log_prob, z[None])

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.density.draw(sample_shape)[0]

    def log_ratio(self, path: Tensor) -> Tensor:
        return self.density.log_prob(path[0])

    def reverse_path(self, z: Tensor) -> Tensor:
        return z[None]

    def log_bound(self, z: Tensor, levels: int | None = None) -> Tensor:
        return self.density.log_prob(z)


class Posterior(nn.Module, abc.ABC):
    """q(z, a | x) as a function of x: encoder, label embedding and whatever a subclass builds from the features.

    `posterior(x)`, with x (B, *event), is a `Conditional` of batch shape (B,); with labels that broadcast to
    (*labels, B) it is q(z, a | x, l), of that batch shape. A subclass gives `condition`.

    Args:
        encoder: from observations (B, *event) to features (B, encoder.out_features).
        latent_size: D.
        labels: number of classes for q(z, a | x, label); 0 without labels.

    Raises:
        InputError: D is not positive; a label is given to a posterior without labels.

    Source: Kingma and Welling, 2014, for amortised inference.

    Example:
        >>> posterior = ddvi.GaussianPosterior(torch.nn.Linear(6, 8), latent_size=2, labels=3)
        >>> posterior(torch.ones(5, 6), torch.arange(3)[:, None]).sample().shape
        torch.Size([3, 5, 2])
    """

    has_density: bool = True

    def __init__(self, encoder: nn.Module, latent_size: int, labels: int = 0) -> None:
        super().__init__()
        if latent_size < 1:
            raise InputError(f"the latent size is at least 1, not {latent_size}")
        self.latent_size = latent_size
        self.encoder = encoder
        self.features: int = int(encoder.out_features)  # type: ignore[arg-type]
        self.label: nn.Embedding | None = nn.Embedding(labels, self.features) if labels else None

    def encode(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Features (*batch_shape, features) of x (B, *event), and of a label that broadcasts against (B,)."""
        features = self.encoder(x)
        return features if label is None else self.with_label(features, label)

    def with_label(self, features: Tensor, label: Tensor) -> Tensor:
        """Features (B, features) told a label (*labels, B): (*labels, B, features). The encoder needn't run again."""
        if self.label is None:
            raise InputError("a label was given to a posterior without labels; build it with labels=C")
        return features + self.label(label)

    @abc.abstractmethod
    def condition(self, features: Tensor) -> Conditional:
        """The conditional for features (*batch_shape, features)."""

    def without_context(self, features: Tensor) -> Conditional:
        """The simpler conditional that `WarmUp` trains, of features (*batch_shape, features).

        Only a diffusion posterior has one: its start depends on x, its steps denoise the prior alone.

        Raises:
            InputError: it has none.

        Source: Piriyakulkij et al., AAAI 2025.
        """
        raise InputError(
            f"warm-up trains the denoiser of a diffusion posterior, and {type(self).__name__} has none; use warmup=0"
        )

    def forward(self, x: Tensor, label: Tensor | None = None) -> Conditional:
        return self.condition(self.encode(x, label))

    def path_draw(
        self, features: Tensor, sample_shape: tuple[int, ...] = (), weigh: Callable[[Tensor], Tensor] | None = None
    ) -> Draw:
        """A draw scored with q's parameters held fixed, so that their gradient comes through the path alone.

        For path-gradient estimators (Roeder et al. 2017; Tucker et al. 2019), of a batch (*batch_shape, features).

        Args:
            features: what `encode` gives.
            sample_shape: as in `Conditional.draw`.
            weigh: what the gradient of the path becomes before it reaches q's parameters.
        """
        _, log_ratio, path = self.condition(features).draw(sample_shape)
        if weigh is not None:
            path = path.view_as(path)
            if path.requires_grad:
                path.register_hook(weigh)
        score = self._stopped_log_ratio(features, path)
        # A draw knows its score better than who finds it out from where it went.
        return Draw(path[0], score + (log_ratio - score).detach(), path)

    def _stopped_log_ratio(self, features: Tensor, path: Tensor) -> Tensor:
        scorer = _Scorer(self)
        fixed = {name: parameter.detach() for name, parameter in scorer.named_parameters()}
        return torch.func.functional_call(scorer, fixed, (features.detach(), path))


class _Scorer(nn.Module):
    """`functional_call` replaces parameters for the length of a `forward`: this makes scoring one."""

    def __init__(self, posterior: Posterior) -> None:
        super().__init__()
        self.posterior = posterior
        # A likelihood that guides is no part of the posterior, but of what is scored.
        guides = (getattr(module, "guidance", None) for module in posterior.modules())
        self.guides: nn.ModuleList = nn.ModuleList(guide.likelihood for guide in guides if guide is not None)

    def forward(self, features: Tensor, path: Tensor) -> Tensor:
        return self.posterior.condition(features).log_ratio(path)


PosteriorMaker = Callable[..., Posterior]
"""From an encoder, D and keywords to a posterior, such as its class."""
