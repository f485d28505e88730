"""A posterior of ours as a guide of Pyro (extra `pyro`), by default a diffusion pushed through a flow.

All latent sites of a model, unconstrained and side by side, are one vector u. The guide draws it together with its
auxiliary variables a, and the site that Pyro scores carries the whole of

    log q(u, a) − log r(a | u),

so that `Trace_ELBO` of model and guide is the bound of every other model here,
E_q[ log p(x, u) + log r(a | u) − log q(u, a) ] ≤ log p(x).

Sources: Kucukelbir et al., Automatic Differentiation Variational Inference, 2017; Piriyakulkij et al., AAAI 2025, for
the posterior; Bingham et al., Pyro, 2019; Roeder et al., Sticking the Landing, 2017, for the path gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from ddvi.errors import InputError, check_name
from ddvi.networks import Given, check_encoder
from ddvi.posteriors.base import Conditional, Draw, Posterior, PosteriorMaker
from ddvi.posteriors.diffusion import DiffusionPosterior
from ddvi.posteriors.gaussian import begin_at
from ddvi.posteriors.transformed import TransformedPosterior
from ddvi.randomness import seeded

try:
    from pyro.distributions import TorchDistribution
    from pyro.infer.autoguide import AutoContinuous
    from pyro.infer.autoguide.initialization import init_to_median
except ImportError as _error:
    raise ImportError("ddvi.pyro needs Pyro; pip install 'ddvi[pyro]'") from _error

_SCORING_DRAWS = 100


def _check_settings(maker: type, settings: Mapping[str, Any]) -> None:
    """Refuse a keyword that a class of posteriors neither takes behind encoder and D nor hands on."""
    parameters = list(inspect.signature(maker).parameters.values())[2:]
    if issubclass(maker, TransformedPosterior):  # which hands on to its base
        parameters += list(inspect.signature(settings.get("base", DiffusionPosterior)).parameters.values())[2:]
        parameters = [each for each in parameters if each.name != "settings"]
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        for name in settings:
            check_name(f"setting of {maker.__name__}", name, [each.name for each in parameters])


@final
class PathDistribution(TorchDistribution):
    """u ~ q, whose score is that of the path it was drawn with.

    `log_prob` of the very tensor that `rsample` gave last is log q(u, a) − log r(a | u) with the a of that draw, as a
    bound needs it. Of any other it is log q(u), by importance sampling over a.

    Args:
        conditional: q(u, a), of batch shape (1,).
        size: D.
        batch_shape: of independent draws.
        location: m of the unconstrained values m + u that are drawn.
        draw: what draws in the place of the conditional while there is a gradient, see `Posterior.path_draw`.
    """

    has_rsample = True

    def __init__(
        self,
        conditional: Conditional,
        size: int,
        location: Tensor,
        batch_shape: Sequence[int] = (),
        draw: Callable[[tuple[int, ...]], Draw] | None = None,
    ) -> None:
        self.conditional = conditional
        self.location = location
        self.draw = draw
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(torch.Size(batch_shape), torch.Size([size]), validate_args=False)

    @property
    def arg_constraints(self) -> dict[str, Any]:
        """There are no parameters to check."""
        return {}

    @property
    def support(self) -> Any:
        """R^D."""
        return constraints.real_vector

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> PathDistribution:
        (size,) = self.event_shape
        return PathDistribution(self.conditional, size, self.location, batch_shape, self.draw)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """(*sample_shape, *batch_shape, D)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        draw = self.draw if self.draw is not None and torch.is_grad_enabled() else self.conditional.draw
        z, log_ratio, _ = draw((shape.numel(),))
        value = (self.location + z[:, 0]).reshape(*shape, -1)
        self._last = value, log_ratio[:, 0].reshape(shape)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """(*sample_shape, *batch_shape), in nats."""
        if self._last is not None and value is self._last[0]:
            return self._last[1]
        rows = (value - self.location).reshape(-1, 1, self.event_shape[0])
        scored, _ = self.conditional.log_prob(rows, _SCORING_DRAWS)
        return scored[:, 0].reshape(value.shape[:-1])


@final
class AutoDiffusion(AutoContinuous):
    """A guide whose latent vector is drawn by one of our posteriors, see the module.

        guide = AutoDiffusion(model)
        svi = SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO())

    It is used as Pyro's other guides are, with `Trace_ELBO` and without jit. Parameters are there once the guide has
    been called, or `setup` has. Before the first step it is a diagonal Gaussian around `init_loc_fn`'s values.

    Args:
        model: a Pyro model with continuous latent sites.
        posterior: a function (encoder, D) to a `Posterior` with a density, such as a class of ours; by default
            `TransformedPosterior`, the diffusion posterior pushed through autoregressive layers.
        encoder: a module, called as the model is, that gives features (out_features,) of the observations, for an
            amortised guide; its `out_features` says how many. Without it the guide doesn't look at the arguments.
        init_loc_fn: Pyro's function for initial values of sites.
        init_scale: standard deviation of the unconstrained values at the start.
        draws: behind `median` and `quantiles`.
        path_gradient: score draws with parameters held fixed, so that the gradient of the bound comes through the draws
            alone: the same on average, and of less variance. `TransformedPosterior` does so for its base alone. Only
            `Trace_ELBO` allows it; other losses need False.
        settings: keywords for the posterior (`steps`, `flow_layers`, …).

    Raises:
        InputError: an encoder without out_features, an init_scale that isn't positive, or settings that the posterior
            doesn't take.

    Sources: those of the module.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(0.0, scale), obs=torch.tensor(0.5))
        >>> guide = AutoDiffusion(model, steps=2)
        >>> sorted(guide()), bool(guide.median()["scale"] > 0)
        (['scale'], True)
    """

    location: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        posterior: PosteriorMaker | None = None,
        *,
        encoder: nn.Module | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        draws: int = 1000,
        path_gradient: bool = True,
        **settings: Any,
    ) -> None:
        check_encoder(encoder)
        if not init_scale > 0:
            raise InputError(f"init_scale={init_scale} isn't positive; give a standard deviation")
        if not (posterior is None or callable(posterior)):
            raise InputError(f"posterior={posterior!r} can't be called; give a class of posteriors, or a function")
        maker = posterior or TransformedPosterior
        if isinstance(maker, type):
            _check_settings(maker, settings)
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.init_scale: float = float(init_scale)
        self.draws = draws
        self.path_gradient = path_gradient
        self._maker = (maker, settings)
        self.encoder = encoder

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Make the parameters, for the arguments of the model; later calls do nothing."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        location = self._init_loc()
        self.register_buffer("location", location)
        maker, settings = self._maker
        size: Any = 1 if self.encoder is None else self.encoder.out_features
        made = maker(Given(size), self.latent_dim, **settings)
        if not made.has_density:
            raise InputError(f"{type(made).__name__} has no density, which a guide needs; take another posterior")
        begin_at(made, self.init_scale)
        self.posterior: Posterior = made.to(location)

    def get_posterior(self, *args: Any, **kwargs: Any) -> PathDistribution:
        """q of the unconstrained latent vector (latent_dim,), given the model's arguments."""
        self.setup(*args, **kwargs)
        seen = self.location.new_ones(1, 1)
        if self.encoder is not None:
            seen = self.encoder(*args, **kwargs).reshape(1, -1)
        features = self.posterior.encode(seen)
        draw = partial(self.posterior.path_draw, features) if self.path_gradient else None
        return PathDistribution(self.posterior.condition(features), self.latent_dim, self.location, draw=draw)

    @torch.no_grad()
    def _drawn(self, *args: Any, **kwargs: Any) -> Tensor:
        """Unconstrained draws (draws, latent_dim), the same at every call."""
        with seeded(0, "quantiles"):
            return self.get_posterior(*args, **kwargs).sample(torch.Size([self.draws]))

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[Any, Tensor]:
        """The posterior median of every site, by draws of the unconstrained values."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior quantiles of every site, (quantiles, *site): those of the unconstrained values, made constrained.

        Args:
            quantiles: numbers in [0, 1].
            args: the model's.
            kwargs: the model's.
        """
        drawn = self._drawn(*args, **kwargs)
        levels = torch.as_tensor(quantiles, dtype=drawn.dtype, device=drawn.device)
        found: dict[str, list[Tensor]] = {}
        for latent, mirrored in zip(drawn.quantile(levels, 0), drawn.quantile(1 - levels, 0), strict=True):
            site: Any
            for (site, value), (_, other) in zip(
                self._unpack_latent(latent), self._unpack_latent(mirrored), strict=True
            ):
                bijection = biject_to(site["fn"].support)
                constrained = bijection(other if _falls(bijection) else value)
                found.setdefault(site["name"], []).append(constrained)
        return {name: torch.stack(values) for name, values in found.items()}


def _falls(bijection: Any) -> bool:
    """Whether an elementwise bijection is a decreasing one, as onto numbers below a bound."""
    try:
        return bool(torch.as_tensor(bijection.sign < 0).all())
    except NotImplementedError:  # it ties entries together
        return False
