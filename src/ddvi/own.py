"""From a user's own prior, likelihood, posterior and settings to a model over unconstrained latents.

What `composition` is for names and settings, this is for objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn
from torch.distributions import Independent, constraints
from torch.distributions.constraints import Constraint

from ddvi.arrays import as_tensor
from ddvi.composition import assemble
from ddvi.drawn import unchecked
from ddvi.errors import InputError, check_name, is_whole
from ddvi.likelihoods import ExponentialFamily, Likelihood, as_likelihood, is_scored_object
from ddvi.methods import ALIASES, METHODS
from ddvi.model import LatentVariableModel
from ddvi.networks import DenseEncoder, TransformedEncoder
from ddvi.objectives.base import Objective
from ddvi.posteriors.base import Posterior, PosteriorMaker
from ddvi.preprocessing import Standardise
from ddvi.priors import Prior, as_prior
from ddvi.randomness import generator, seeded
from ddvi.settings import FIELDS, OBJECTIVE_SETTINGS, Settings, resolve
from ddvi.supports import Bijection, Unconstrained, section, sections

ON_THE_EDGE = 1e-3
"""Share of simulated latents that may lie on the edge of their support."""
_HIDDEN_SIZE = 128
_NETWORK = ("hidden_size", "dropout")
_OF_TRAINING = ("epochs", "batch_size", "lr")


def settings_of(
    posterior: str | Posterior | PosteriorMaker, objective: str | Objective, given: Mapping[str, Any], **usual: Any
) -> Settings:
    """The settings that posterior and objective take, found sound, with the defaults of the method.

    Args:
        posterior: a name, a posterior, or what makes one.
        objective: a name, or an objective.
        given: what a user set.
        usual: what differs from the method's defaults here.

    Raises:
        InputError: an unknown name, or a setting or value that posterior and objective don't take.
    """
    method = posterior if isinstance(posterior, str) else _method_of(posterior)
    method = ALIASES.get(check_name("posterior", method, [*METHODS, *ALIASES]), method)
    named = objective if isinstance(objective, str) else "auto"
    check_name("objective", named, ["auto", *METHODS[method].objectives], "a ddvi.Objective")
    chosen = METHODS[method].objective if named == "auto" else named
    allowed = {*_taken(method, chosen, posterior, objective), "device", "graphs", "compile"}
    for name in given:
        if name in FIELDS and name not in allowed:
            what = f"{method} by {chosen}" if isinstance(posterior, str) else "this posterior and objective"
            hint = "say it in training" if name in _OF_TRAINING else f"choose from {', '.join(sorted(allowed))}"
            raise InputError(f"{name} is a setting that {what} can't take here; {hint}")
        check_name("setting of this posterior and objective", name, sorted(allowed))
    # Draws of the prior help for a small D alone, which isn't known yet.
    options = {
        "hidden_size": _HIDDEN_SIZE,
        "prior_samples": 0,
        "variance_weight": 0.0,
        "graphs": False,
        **usual,
        **given,
        "objective": named,
    }
    return resolve("mnist", method, "gaussian", options)  # which has the general defaults


def _taken(method: str, chosen: str, posterior: Any, objective: Any) -> list[str]:
    """Names of settings that have an effect beside objects."""
    names = [*METHODS[method].reads] if isinstance(posterior, str) else []
    names += OBJECTIVE_SETTINGS[chosen] if isinstance(objective, str) else ["sleep_levels"]
    return ["seed", *_NETWORK, *names]


def stored(settings: Settings, posterior: Any, objective: Any) -> dict[str, Any]:
    """What a file must name, so that with the same objects it gives the same model again."""
    names = _taken(settings.method, settings.objective, posterior, objective)
    named = {"posterior": settings.method, "objective": settings.objective}
    return named | {name: getattr(settings, name) for name in names}


def check_given(path: Path, who: str, then: Mapping[str, bool], now: Mapping[str, bool]) -> None:
    """Refuse to load what was learnt by `who` with other objects, which a file can't hold, than are given now."""
    for name, there in now.items():
        if there != then[name]:
            raise InputError(
                f"{path} was learnt {'with' if then[name] else 'without'} {name}=; give load what {who} was given"
            )


def _method_of(posterior: Posterior | PosteriorMaker) -> str:
    """The method whose posterior this is or makes, as a class or a partial of one; else the first one."""
    if not isinstance(posterior, Posterior) and not callable(posterior):
        raise InputError(
            f"{type(posterior).__name__} is no posterior; give a name, a Posterior, or a function (encoder, D) to one"
        )
    kind = type(posterior) if isinstance(posterior, Posterior) else getattr(posterior, "func", posterior)
    return next((name for name, method in METHODS.items() if method.posterior_class() is kind), next(iter(METHODS)))


def bijection_of(prior: Any, support: Constraint | None, z: Tensor | None = None) -> Bijection:
    """From R^D to where latents live: those of a prior, or z (N, *latent) where there is none."""
    if prior is None:
        assert z is not None
        bijection = Bijection([section(support, z.shape[1:], "z")])
        unconstrained(z, bijection, ON_THE_EDGE)
        bijection.fit(z)
        return bijection
    if isinstance(prior, Prior) and support is None:
        return Bijection(sections(prior))
    return Bijection.of(prior, support)


def build(
    prior: Any,
    likelihood: Any,
    posterior: str | Posterior | PosteriorMaker,
    encoder: nn.Module,
    bijection: Bijection,
    event_shape: torch.Size,
    settings: Settings,
) -> LatentVariableModel:
    """A fresh model over u (B, D).

    Args:
        prior: p(z), or None.
        likelihood: p(x | z), or None.
        posterior: a name, a posterior, or what makes one.
        encoder: with `out_features`.
        bijection: from u to z.
        event_shape: of x.
        settings: from `settings_of`.

    Raises:
        InputError: objects that don't fit each other.
    """
    seen: Prior = UnknownPrior(bijection.size)
    score: Likelihood = UnknownLikelihood(event_shape)
    if prior is not None:
        plain = bijection.trivial
        seen = as_prior(prior if plain else Unconstrained(prior, bijection))
        score = as_likelihood(likelihood, event_shape, None if plain else bijection)
    return assembled(seen, score, posterior, encoder, settings)


def assembled(
    prior: Prior,
    likelihood: Likelihood,
    posterior: str | Posterior | PosteriorMaker,
    encoder: nn.Module,
    settings: Settings,
) -> LatentVariableModel:
    """A fresh model around a prior and a likelihood over u (B, D).

    Raises:
        InputError: the posterior isn't one, or has another D.
    """
    if isinstance(posterior, str):
        return assemble(settings, prior, likelihood, encoder)
    (size,) = prior.event_shape
    made = posterior if isinstance(posterior, Posterior) else posterior(encoder, size)
    if not isinstance(made, Posterior):
        raise InputError(f"posterior made a {type(made).__name__}; let it return a ddvi.Posterior")
    if made.latent_size != size:
        raise InputError(
            f"the posterior has latents of size {made.latent_size}, but those of the model have {size} once"
            " they are unconstrained; build it with that latent_size"
        )
    return LatentVariableModel(prior, likelihood, made)


def default_encoder(event_shape: torch.Size, counts: bool, settings: Settings, x: Tensor | None) -> nn.Module:
    """Dense layers on standardised entries; the constants are those of x (N, *event), or will be loaded."""
    inputs = Inputs(event_shape, counts)
    if x is not None:
        inputs.fit(x)
    return TransformedEncoder(inputs, DenseEncoder(event_shape.numel(), settings.hidden_size, settings.dropout))


def are_counts(x: Tensor) -> bool:
    """Whether all values are whole numbers from 0 on, and some above 1."""
    return bool(x.min() >= 0) and bool(x.max() > 1) and not (x.is_floating_point() and bool((x != x.round()).any()))


@final
class Inputs(nn.Module):
    """What the default encoder sees of x (B, *event): entries in a row (B, features), standardised.

    Args:
        event_shape: of x.
        counts: whether the logarithm log(1 + x) comes first.
    """

    def __init__(self, event_shape: torch.Size, counts: bool) -> None:
        super().__init__()
        self.counts = counts
        self.standardise: Standardise = Standardise(torch.Size([event_shape.numel()]))

    def fit(self, x: Tensor) -> None:
        """Take the constants from x (N, *event)."""
        self.standardise.fit(self._rows(x.to(torch.get_default_dtype())))

    def forward(self, x: Tensor) -> Tensor:
        return self.standardise(self._rows(x))

    def _rows(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(x), -1)
        # Where x of another kind is given later, numbers below 0 have a place too.
        return rows.abs().log1p() * rows.sign() if self.counts else rows


_SCORED = 1000  # examples of which a likelihood is asked before it is learnt from
_NO_DENSITY = "this was learnt from simulations alone, so there is no {} and no bound; give Inference both parts"


@final
class UnknownPrior(Prior):
    """Stands where pairs of the whole model are all that is known; what needs the prior is refused."""

    def __init__(self, latent_size: int) -> None:
        super().__init__(latent_size, None)

    def _draw(self, shape: torch.Size, label: Tensor | None, options: dict[str, Any]) -> NoReturn:
        raise InputError(_NO_DENSITY.format("prior"))

    def _log_density(self, z: Tensor, label: Tensor | None) -> NoReturn:
        raise InputError(_NO_DENSITY.format("prior"))


@final
class UnknownLikelihood(Likelihood):
    """The same for the likelihood."""

    def __init__(self, event_shape: torch.Size) -> None:
        super().__init__()
        self.event_shape = event_shape

    def forward(self, z: Tensor) -> NoReturn:
        raise InputError(_NO_DENSITY.format("likelihood"))

    def log_prob(self, x: Tensor, z: Tensor) -> NoReturn:
        raise InputError(_NO_DENSITY.format("likelihood"))

    def pairwise_log_prob(self, x: Tensor, z: Tensor) -> NoReturn:
        raise InputError(_NO_DENSITY.format("likelihood"))


def split(
    x: Tensor, u: Tensor | None, validation: Any, seed: int
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Training and held-out x, and the same of latents u (N, D) where there are any."""
    if not is_whole(validation):
        if u is not None:
            raise InputError("validation of simulations is how many pairs to hold out; give a whole number")
        held_out = as_tensor(validation, "validation")
        if held_out.shape[1:] != x.shape[1:]:
            raise InputError(f"validation has examples of shape {tuple(held_out.shape[1:])}; give those of x")
        return x, held_out, None, None
    if not 0 <= int(validation) < len(x):
        raise InputError(f"validation={validation} doesn't fit {len(x)} examples; give 0 to {len(x) - 1}")
    if not validation:
        return x, None, u, None
    order, validation = torch.randperm(len(x), generator=generator(seed, "validation")), int(validation)
    kept, out = order[validation:], order[:validation]
    return x[kept], x[out], None if u is None else u[kept], None if u is None else u[out]


def filled(values: Tensor, batch_size: int) -> Tensor:
    """Examples (N, …), with copies of few of them, since a step on few is noisier than it needs to be."""
    copies = math.ceil(batch_size / len(values))
    return values if copies == 1 else values.repeat(copies, *[1] * (values.dim() - 1))


def pair(given: Any) -> tuple[Tensor, Tensor]:
    """(z, x) as tensors of one length."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise InputError(f"simulations are pairs (z, x), latents first, not a {type(given).__name__}; give both")
    z, x = as_tensor(given[0], "z").to(torch.get_default_dtype()), as_tensor(given[1], "x")
    if len(z) != len(x):
        raise InputError(f"there are {len(z)} latents for {len(x)} observations; give one of each")
    return z, x


def pairs(source: Callable[[int], Any], count: int) -> tuple[Tensor, Tensor]:
    """So many pairs (z, x) from a simulator."""
    z, x = pair(source(count))
    if len(z) != count:
        raise InputError(f"simulate({count}) gave {len(z)} pairs; make it as many as it is asked for")
    return z, x


def joint(prior: Any, likelihood: Any) -> Callable[[int], tuple[Any, Any]]:
    """A simulator of (z, x) out of a user's prior and likelihood."""

    @torch.no_grad()
    def simulate(count: int) -> tuple[Any, Any]:
        z = prior.sample(torch.Size([count]))
        if is_scored_object(likelihood):
            return z, likelihood.sample(z)
        # An earlier training may have moved it.
        parameters = likelihood.parameters() if isinstance(likelihood, nn.Module) else iter(())
        made = likelihood(z.to(next((parameter.device for parameter in parameters), z.device)))
        return z, (made if isinstance(made, Tensor) else made.sample()).to(z.device)

    return simulate


@torch.no_grad()
def check_scored(model: LatentVariableModel, likelihood: Any, x: Tensor) -> None:
    """Refuse at once a likelihood that would fail in the first step, and x that a built-in one doesn't speak of."""
    if isinstance(likelihood, ExponentialFamily):
        likelihood.check(x)
    with seeded(0):
        z = model.prior.sample((max(2, min(len(x), _SCORED)),))
    rows = model.preprocessing(x[: len(z)].to(z.device)).to(z)
    rows = rows.expand(len(z), *rows.shape[1:])
    with unchecked():
        value = model.likelihood.log_prob(rows, z)
    if value.shape != z.shape[:1]:
        given = f"the likelihood's log_prob of {len(z)} examples has shape {tuple(value.shape)}"
        raise InputError(f"{given}; make it one number an example")
    missing = int(value.isnan().sum())
    if 2 * missing > len(z):  # a few are skipped in training
        given = f"at {missing} of {len(z)} draws of the prior the likelihood of x is NaN"
        raise InputError(f"{given}; {_refusal(model.likelihood, rows, z) or 'correct it'}")
    with unchecked():
        distribution = model.likelihood(z)
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    support = getattr(type(distribution), "support", None)
    # One that depends on z says nothing before the right z is known.
    if isinstance(support, Constraint) and not constraints.is_dependent(support) and not support.check(x).all():
        raise InputError(
            f"x lies outside of {support}, where the likelihood is; give other data, or another likelihood"
        )


def _refusal(likelihood: Likelihood, x: Tensor, z: Tensor) -> str:
    """What torch says of a distribution's parameters, without all of the values that follow."""
    try:
        likelihood.log_prob(x, z)
    except ValueError as error:
        return str(error).partition(", but found")[0].partition("\n")[0]
    return ""


def check_latents(z: Tensor, bijection: Bijection) -> Tensor:
    """Latents (N, *latent); an InputError for a wrong shape, and for those outside of where they are said to live."""
    if z.shape[1:] != bijection.event_shape:
        raise InputError(f"latents have shape {tuple(z.shape[1:])}, but {tuple(bijection.event_shape)} is needed")
    bijection.check(z)
    return z


def unconstrained(z: Tensor, bijection: Bijection, tolerated: float) -> Tensor:
    """u (N, D) of latents (N, *latent); an InputError as of `check_latents`, and for those on the edge, if too many."""
    return bijection.checked_inverse(check_latents(z, bijection), tolerated)
