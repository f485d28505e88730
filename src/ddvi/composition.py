"""From settings to a model and its training: the one place where names become objects."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddvi import likelihoods, networks, preprocessing
from ddvi.data import Dataset
from ddvi.errors import InputError
from ddvi.methods import METHODS
from ddvi.model import LatentVariableModel
from ddvi.objectives.adversarial import Adversarial
from ddvi.objectives.base import Objective
from ddvi.objectives.elbo import ELBO, ImportanceWeighted
from ddvi.objectives.marginal import MarginalLikelihood
from ddvi.objectives.semi_supervised import SemiSupervised
from ddvi.objectives.wake_sleep import ReweightedWakeSleep, WakeSleep
from ddvi.objectives.warm_up import WarmUp
from ddvi.posteriors.guidance import Guidance
from ddvi.posteriors.laplace import LaplacePosterior
from ddvi.posteriors.scaled import ScaledPosterior
from ddvi.priors import Prior, make_prior
from ddvi.priors.base import moments
from ddvi.schedule import Phase, Schedule
from ddvi.settings import OBJECTIVE_SETTINGS, Settings

_IMAGE_SCALE = 0.25  # about the standard deviation of pixels in [0, 1], where a learned scale starts
_MOST_OUTPUTS = 1_000_000  # of a decoder, whose last layer has 2 GB then at width 500
_UNEVEN = 2.0  # ratio of the prior's spreads from which on the posterior works in units of them


@dataclass(frozen=True)
class Observations:
    """What a model must know of its data; kept beside the weights, so that they load without the data."""

    event_shape: tuple[int, ...]
    likelihood: str
    preprocessing: str
    parts: int
    maximum: float = 1.0
    categories: int = 0
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return dataclasses.asdict(self)


def observe(dataset: Dataset, settings: Settings) -> Observations:
    """Look at the data and choose likelihood and preprocessing, or check the user's choice.

    Raises:
        InputError: the data can't have the likelihood that the user wants.
    """
    x = dataset.train_x
    both = torch.stack([torch.stack([part.min(), part.max()]).double() for part in (x, dataset.test_x)])
    low, high = both[:, 0].min().item(), both[:, 1].max().item()
    integers = not x.is_floating_point()
    image = dataset.maximum is not None
    top = dataset.maximum or 1.0
    colour = image and x.dim() == 4 and x.shape[1] > 1
    binary = all(bool(((part == 0) | (part == 1)).all()) for part in (x, dataset.test_x))
    facts: dict[str, Any] = {"event_shape": tuple(x.shape[1:]), "parts": len(dataset.classes) or settings.parts}
    name = settings.likelihood
    if name == "auto":
        if binary:
            name, reason = "bernoulli", "all values are 0 or 1"
        elif image and not colour:
            name, reason = "bernoulli", "grey images, binarised afresh at each pass"
        elif colour:
            name, reason = "gaussian", "colour images"
        elif integers and low >= 0:
            name, reason = "poisson", "whole numbers from 0 on"
        else:
            name, reason = "gaussian", "real numbers, standardised per feature"
    else:
        reason = "as set"
    span = f"values of {dataset.name} lie between {low:g} and {high:g}"
    if name == "bernoulli":
        if binary:
            return Observations(**facts, likelihood=name, preprocessing="as_is", reason=reason)
        if low < 0 or high > top:
            raise InputError(f"likelihood=bernoulli needs values in [0, 1], but {span}; use likelihood=auto")
        return Observations(**facts, likelihood=name, preprocessing="binarise", maximum=top, reason=reason)
    if name == "gaussian":
        if image and integers:
            return Observations(**facts, likelihood=name, preprocessing="dequantise", maximum=top, reason=reason)
        return Observations(**facts, likelihood=name, preprocessing="standardise", reason=reason)
    if low < 0:
        raise InputError(f"likelihood={name} needs whole numbers from 0 on, but {span}; use likelihood=auto")
    if not integers:
        whole = all(bool((part == part.round()).all()) for part in (x, dataset.test_x))
        held = "whole ones as floating-point numbers" if whole else "others"
        advice = "store them as integers, by x.astype('int64')" if whole else "use likelihood=auto"
        raise InputError(f"likelihood={name} needs whole numbers, but {dataset.name} holds {held}; {advice}")
    categories = int(high) + 1 if name == "categorical" else 0
    if (outputs := x[0].numel() * categories) > _MOST_OUTPUTS:
        raise InputError(
            f"likelihood=categorical would take {outputs:,} outputs, a category of an entry each, as {span}, and"
            f" at most {_MOST_OUTPUTS:,} are allowed; use likelihood=poisson, or number the categories 0, 1, 2, …"
        )
    return Observations(**facts, likelihood=name, preprocessing="as_is", categories=categories, reason=reason)


def build_model(settings: Settings, observations: Observations, train_x: Tensor | None = None) -> LatentVariableModel:
    """A fresh model; parameters are drawn from torch's global state.

    Args:
        settings: the run's settings.
        observations: from `observe`.
        train_x: training data (N, *event), for constants that come from it; None where they will be loaded.

    Raises:
        InputError: settings that don't fit each other or the data.
    """
    prior = make_prior(settings.prior, settings.latent_size, observations.parts, settings.width or None)
    event_shape = torch.Size(observations.event_shape)
    kind = settings.network
    if kind == "auto":
        kind = "convolutional" if _suits_convolutions(event_shape) else "dense"
    encoder, decoder = _networks(kind, settings, observations)
    prepare = _preprocessing(observations)
    if isinstance(prepare, preprocessing.Standardise) and train_x is not None:
        prepare.fit(train_x)
    labels = observations.parts if settings.semi_supervised else 0
    return assemble(settings, prior, _likelihood(decoder, observations), encoder, prepare, labels, _units(prior))


def assemble(
    settings: Settings,
    prior: Prior,
    likelihood: likelihoods.Likelihood,
    encoder: nn.Module,
    prepare: preprocessing.Preprocessing | None = None,
    labels: int = 0,
    units: Tensor | None = None,
) -> LatentVariableModel:
    """A model with the posterior that the settings name, and what else their method needs, around given parts.

    Args:
        settings: method, and what its posterior takes.
        prior: p(z); its size is the latent size.
        likelihood: p(x | z).
        encoder: with `out_features`.
        prepare: from data as stored to observations.
        labels: number of classes where labels are learnt too.
        units: of each latent for the posterior, (D,); None for those of z.
    """
    method, (latent_size,) = METHODS[settings.method], prior.event_shape
    available = settings.as_dict() | {
        "prior_denoiser": prior if settings.prior_denoiser and not settings.laplace else None,
        "guidance": Guidance(likelihood, settings.guidance, units) if settings.guidance else None,
    }
    options: dict[str, Any] = {name: available[name] for name in method.takes}
    posterior_class = method.posterior_class()
    if not posterior_class.has_density:
        posterior = posterior_class(encoder, latent_size, **options)
        seen = latent_size + (labels + 1 if labels else 0)
        size = settings.hidden_size
        judge = nn.Sequential(networks.mlp(seen, (size, size), 1), nn.Flatten(-2))
        extra: dict[str, nn.Module] = {"discriminator": judge}
    else:
        posterior = posterior_class(encoder, latent_size, labels, **options)
        extra = {"classifier": nn.Linear(posterior.features, labels)} if labels else {}
    if settings.laplace:
        posterior = LaplacePosterior(posterior, likelihood, prior, settings.laplace)
    elif units is not None:
        posterior = ScaledPosterior(posterior, units)
    return LatentVariableModel(prior, likelihood, posterior, prepare, **extra)


def make_objective(settings: Settings) -> Objective:
    """The objective that the settings describe."""
    named = {name: getattr(settings, name) for name in OBJECTIVE_SETTINGS[settings.objective]}
    levels = named.pop("sleep_levels", 0) or None
    match settings.objective:
        case "elbo":
            return ELBO(levels=levels, **named)
        case "importance_weighted":
            return ImportanceWeighted(levels=levels, **named)
        case "wake_sleep":
            asleep = {name: named.pop(name) for name in ("sleep_steps", "sleep_weight", "fantasies")}
            return WakeSleep(ELBO(**named), levels=levels, **asleep)
        case "reweighted_wake_sleep":
            return ReweightedWakeSleep(levels=levels, **named)
        case "marginal_likelihood":
            return MarginalLikelihood(levels=levels, **named)
        case "adversarial":
            return Adversarial(settings.adversarial_weight)
        case other:
            raise InputError(f"unknown objective '{other}'")


def make_phases(settings: Settings) -> list[Phase]:
    """Training from its first to its last epoch: warm-up, a frozen decoder, then everything."""
    first: Objective = WarmUp(settings.warmup_kl_weight, label_rate=settings.label_rate)
    objective = make_objective(settings)
    if settings.semi_supervised:
        names = ("classifier_weight", "agreement_weight", "agreement_radius", "information_weight")
        learning = {name: getattr(settings, name) for name in names} | {"temperature": settings.label_temperature}
        first, objective = (SemiSupervised(each, **learning) for each in (first, objective))
    warm, frozen = settings.warmup, settings.freeze_decoder
    rests = frozenset({"likelihood"})
    always = rests if settings.decoder else frozenset()
    phases = [
        Phase(warm, first, always),
        Phase(frozen, objective, rests),
        Phase(settings.epochs - warm - frozen, objective, always),
    ]
    return [phase for phase in phases if phase.epochs > 0]


def make_schedule(settings: Settings) -> Schedule:
    """How training proceeds."""
    return Schedule(
        tuple(make_phases(settings)),
        settings.batch_size,
        settings.lr,
        settings.schedule,
        settings.clip_norm,
        settings.seed,
    )


def _units(prior: Prior) -> Tensor | None:
    """Units for the posterior's latents, (D,): a named prior's standard deviations where they are far from even.

    None elsewhere, and in the plane, where the chain is shown the prior's own denoiser.
    """
    if prior.event_shape[0] <= 2:
        return None
    _, spread = moments(prior)
    return spread if spread.max() > _UNEVEN * spread.min() else None


def _suits_convolutions(event_shape: torch.Size) -> bool:
    return len(event_shape) == 3 and event_shape[0] > 1 and not event_shape[1] % 8 and not event_shape[2] % 8


def _networks(kind: str, settings: Settings, observations: Observations) -> tuple[nn.Module, nn.Module]:
    event_shape, size = torch.Size(observations.event_shape), settings.hidden_size
    categories = observations.categories
    if kind == "convolutional":
        if categories:
            raise InputError("likelihood=categorical has no convolutional network; use network=dense")
        encoder: nn.Module = networks.ConvolutionalEncoder(event_shape, size)
        decoder: nn.Module = networks.ConvolutionalDecoder(settings.latent_size, event_shape, size)
    else:
        shape = torch.Size((*event_shape, categories)) if categories else event_shape
        encoder = networks.DenseEncoder(math.prod(shape), size, settings.dropout)
        decoder = networks.DenseDecoder(settings.latent_size, shape, size, settings.dropout)
    if categories:
        encoder = networks.TransformedEncoder(networks.OneHot(categories), encoder)
    elif observations.likelihood in ("poisson", "negative_binomial"):
        encoder = networks.TransformedEncoder(networks.Logarithm(), encoder)
    return encoder, decoder


def _likelihood(decoder: nn.Module, observations: Observations) -> likelihoods.Likelihood:
    event_shape = torch.Size(observations.event_shape)
    match observations.likelihood:
        case "bernoulli":
            return likelihoods.BernoulliLikelihood(decoder, event_shape)
        case "gaussian":
            shape = (event_shape[0], *[1] * (len(event_shape) - 1))
            scale = _IMAGE_SCALE if observations.preprocessing == "dequantise" else 1.0
            return likelihoods.GaussianLikelihood(decoder, event_shape, torch.full(shape, scale))
        case "poisson":
            return likelihoods.PoissonLikelihood(decoder, event_shape)
        case "negative_binomial":
            return likelihoods.NegativeBinomialLikelihood(decoder, event_shape)
        case "categorical":
            return likelihoods.CategoricalLikelihood(decoder, event_shape, observations.categories)
        case other:
            raise InputError(f"unknown likelihood '{other}'")


def _preprocessing(observations: Observations) -> preprocessing.Preprocessing:
    match observations.preprocessing:
        case "binarise":
            return preprocessing.Binarise(observations.maximum)
        case "dequantise":
            return preprocessing.Dequantise(observations.maximum)
        case "standardise":
            return preprocessing.Standardise(torch.Size(observations.event_shape))
        case _:
            return preprocessing.AsIs()
