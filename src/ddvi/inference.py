"""A diffusion posterior, or any other, for a user's own model: a prior and a likelihood, or a simulator, and data.

What is trained is q(u | x) over unconstrained latents u, see `supports`; prior and likelihood are seen through the
bijection z(u). The posterior, its objective and the loop are those of every other model here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from ddvi import checkpoint
from ddvi.arrays import as_tensor
from ddvi.composition import make_objective
from ddvi.devices import make_fabric
from ddvi.errors import InputError
from ddvi.files import check_file
from ddvi.fitted import FittedPosterior
from ddvi.learning import learn
from ddvi.likelihoods import FixedLikelihood
from ddvi.model import LatentVariableModel
from ddvi.networks import check_encoder
from ddvi.objectives.base import Objective
from ddvi.objectives.sleep import Sleep
from ddvi.own import (
    ON_THE_EDGE,
    are_counts,
    bijection_of,
    build,
    check_given,
    check_latents,
    check_scored,
    default_encoder,
    filled,
    joint,
    pair,
    pairs,
    settings_of,
    split,
    stored,
    unconstrained,
)
from ddvi.posteriors.base import Posterior, PosteriorMaker
from ddvi.randomness import derive_seed, seeded
from ddvi.schedule import Phase, Schedule
from ddvi.settings import Settings, convert
from ddvi.supports import Bijection, section
from ddvi.training import Listener

_STEPS = 4000  # of training, unless epochs says otherwise


@final
class Inference:
    """Learns q(z | x) ≈ p(z | x) for a model p(z) p(x | z) of your own, amortised over x.

        inference = ddvi.Inference(prior, likelihood).fit(x)
        inference.posterior(x).sample((100,))

    Latents may live in any continuous support that torch has a bijection for, and observations have any shape.

    Args:
        prior: p(z): an object with `sample` and `log_prob`, such as a torch distribution, a `ddvi.Product` or a
            `ddvi.Prior`, a module that learns among them, of which no denoiser is made; None where `fit_simulations`
            gets pairs of the whole model.
        likelihood: p(x | z): a module or function from latents (*, *latent) to a torch distribution of batch shape (*),
            or to draws of x if there is no density; or an object with `log_prob(x, z)` and `sample(z)`.
        posterior: a method's name (`ddvi list`), a `Posterior` over unconstrained latents, or a function
            (encoder, D) to one, such as its class or a `functools.partial` of it.
        objective: its name or an `Objective`; by default the one that suits the method, and of a posterior that is none
            of ours, or a function to one, the ELBO.
        encoder: a module with `out_features`, from x (B, *event), in torch's default precision, to (B, out_features);
            by default dense layers on standardised entries, on their logarithms for counts.
        support: of the latents, a torch constraint; by default the prior's own `support`.
        train_likelihood: whether a likelihood with parameters learns too; else it is left as it is.
        seed: of everything random; the caller's random state is left as it is.
        device: "cpu", "cuda", "mps" or "auto". Modules are moved there; what a function closes over isn't.
        settings: any that the posterior and the objective take (`steps`, `samples`, …), `hidden_size`, `dropout`, and
            `graphs=True`: on CUDA many times as fast, where nothing changes by what Python does at each step. Long
            trainings there gain by `compile=True` too.

    Raises:
        InputError: a name, an object or a setting can't be used.

    Sources: Kingma and Welling, 2014, for amortised inference; Piriyakulkij et al., AAAI 2025, for the posterior;
    Kucukelbir et al., 2017, for constrained latents.

    Example:
        >>> from torch.distributions import Gamma, Poisson
        >>> inference = Inference(Gamma(2.0, 1.0), lambda rate: Poisson(rate), samples=4)
        >>> posterior = inference.fit(torch.tensor([0, 3, 5, 1]), epochs=2).posterior(torch.tensor([3]))
        >>> bool((posterior.sample((10,)) > 0).all())
        True
    """

    def __init__(
        self,
        prior: Any = None,
        likelihood: Any = None,
        posterior: str | Posterior | PosteriorMaker = "ddvi",
        objective: str | Objective = "auto",
        *,
        encoder: nn.Module | None = None,
        support: Constraint | None = None,
        train_likelihood: bool = True,
        seed: int = 0,
        device: str = "cpu",
        **settings: Any,
    ) -> None:
        if (prior is None) != (likelihood is None):
            given, lacking = ("a prior", "likelihood") if likelihood is None else ("a likelihood", "prior")
            raise InputError(f"{given} was given without a {lacking}; give both, or neither and use fit_simulations")
        if isinstance(prior, type):
            raise InputError(
                f"the prior is the class {prior.__name__} itself; give an object of it, with its parameters"
            )
        check_encoder(encoder)
        if isinstance(posterior, Posterior) and encoder is not None:
            raise InputError("an encoder was given beside a posterior that has its own; leave one out")
        self.prior = prior
        self.likelihood = likelihood
        self.encoder = encoder
        self.support = support
        self.train_likelihood = train_likelihood
        self._given = posterior
        self._objective = objective
        self.settings: Settings = settings_of(posterior, objective, {"seed": seed, "device": device, **settings})
        self._bijection = None if prior is None else bijection_of(prior, support)
        self._model: LatentVariableModel | None = None
        self._event_shape, self._counts = torch.Size(), False
        self.history: list[dict[str, Any]] = []
        """A row an epoch: each term of the loss, and the bound on held-out examples."""

    @property
    def model(self) -> LatentVariableModel:
        """The model over unconstrained latents, for whatever isn't here."""
        if self._model is None:
            raise InputError("nothing has been learnt yet; call fit, fit_simulations or Inference.load first")
        return self._model

    @property
    def bijection(self) -> Bijection:
        """From unconstrained latents u (*, D) to latents (*, *latent)."""
        if self._bijection is None:
            raise InputError("without a prior, latents are known from fit_simulations on; call it first")
        return self._bijection

    def fit(
        self,
        x: Any,
        *,
        validation: Any = 0,
        epochs: int | None = None,
        batch_size: int = 128,
        lr: float = 1e-3,
        listener: Listener | None = None,
    ) -> Self:
        """Learn from observations. Called again it goes on from where it stood, with fresh optimisers.

        Args:
            x: observations (N, *event), see `arrays.as_tensor`: a tensor, an array, a table, or batches of these, such
                as a `DataLoader`, which is read into memory. Of few examples a batch has copies.
            validation: how many of them to hold out for the history, or such observations.
            epochs: passes over the data; by default as many as make about 4,000 steps.
            batch_size: examples per step.
            lr: Adam's learning rate, which falls to 0 along a cosine.
            listener: who watches.

        Raises:
            InputError: data or settings can't be used; nothing has changed by then.
            Interrupted: Ctrl-C; what has been learnt by then stays.
            TrainingError: loss or gradient weren't finite three times in a row.
        """
        if self.prior is None:
            raise InputError("data alone can't be learnt from without a prior and a likelihood; use fit_simulations")
        how = _how(epochs, batch_size, lr)
        objective = self._objective if isinstance(self._objective, Objective) else make_objective(self.settings)
        with self._undone_unless_sound():
            with seeded(self.settings.seed, "data"):  # a loader draws its order from torch's state
                train, held_out, _, _ = split(as_tensor(x), None, validation, self.settings.seed)
            self._prepare(train)
            self._place()
            for part in (train, held_out):
                if part is not None:
                    check_scored(self.model, self.likelihood, part)
        return self._train(objective, train, held_out, how, listener)

    def fit_simulations(
        self,
        source: Callable[[int], tuple[Any, Any]] | tuple[Any, Any] | None = None,
        *,
        count: int = 10_000,
        validation: int = 0,
        epochs: int | None = None,
        batch_size: int = 128,
        lr: float = 1e-3,
        listener: Listener | None = None,
    ) -> Self:
        """Learn from pairs (z, x) of the model, by `Sleep`: neither prior nor likelihood needs a density.

        Args:
            source: pairs z (N, *latent) and x (N, *event) that are there; a function from a count to so many, called
                for fresh ones at each step; or None, which draws from prior and likelihood.
            count: of fresh pairs in an epoch.
            validation: how many pairs to hold out for the history.
            epochs: passes over the pairs; by default as many as make about 4,000 steps.
            batch_size: pairs per step.
            lr: as in `fit`.
            listener: who watches.

        Raises:
            InputError: pairs or settings can't be used; nothing has changed by then.
            Interrupted, TrainingError: as `fit`.

        Example:
            >>> def simulate(count):
            ...     z = torch.rand(count, 1)
            ...     return z, z + 0.1 * torch.randn(count, 3)
            >>> inference = Inference(support=torch.distributions.constraints.unit_interval)
            >>> posterior = inference.fit_simulations(simulate, count=256, epochs=2).posterior(torch.zeros(1, 3))
            >>> posterior.sample().shape
            torch.Size([1, 1])
        """
        objective = self._objective
        if not (objective == "auto" or isinstance(objective, Sleep)):
            raise InputError("simulations train by Sleep alone; leave objective out, or give a ddvi.Sleep")
        objective = objective if isinstance(objective, Sleep) else Sleep(self.settings.sleep_levels or None)
        if source is None and self.prior is None:
            raise InputError("there is nothing to simulate: give source, or a prior and a likelihood to Inference")
        how = _how(epochs, batch_size, lr)
        seed, fresh = self.settings.seed, source is None or callable(source)
        with seeded(seed, "simulations", len(self.history)):
            made = joint(self.prior, self.likelihood) if source is None else source
            z, x = pairs(made, count) if callable(made) else pair(made)
        with self._undone_unless_sound():
            self._bijection = self._bijection or bijection_of(None, self.support, z)
            u = unconstrained(z, self._bijection, 1.0 if source is None else ON_THE_EDGE)
            train, held_out, u, held_out_u = split(x, u, validation, seed)
            self._prepare(train)
        if callable(source):
            objective = dataclasses.replace(objective, simulate=lambda count: self._fresh(source, count))
        return self._train(objective, train, held_out, how, listener, None if fresh else u, held_out_u)

    def posterior(self, x: Any) -> FittedPosterior:
        """q(z | x) of observations (B, *event).

        Raises:
            InputError: nothing has been learnt, or x has another shape than what was learnt from.
        """
        model = self.model
        with seeded(self.settings.seed, "data"):
            raw = as_tensor(x)
        self._check_shape(raw)
        return FittedPosterior(model, self.bijection, raw.to(next(model.parameters()).device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and plain settings to a safetensors file; no data, nothing that would be unpickled.

        A likelihood that wasn't trained is left out, as are the prior and objects that were given.
        """
        facts = {
            "settings": stored(self.settings, self._given, self._objective),
            "objective": self._objective if isinstance(self._objective, str) else None,
            "event_shape": list(self._event_shape),
            "counts": self._counts,
            "latents": [list(section.shape) for section in self.bijection.parts],
            "given": self._objects,
            "history": self.history,
        }
        tensors = {f"model/{name}": value for name, value in self._learnt(self.model).items()}
        tensors |= {"location": self.bijection.location, "scale": self.bijection.scale}
        check_file(Path(path))
        checkpoint.save(Path(path), tensors, {"inference": facts})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        prior: Any = None,
        likelihood: Any = None,
        *,
        posterior: Posterior | PosteriorMaker | None = None,
        objective: Objective | None = None,
        encoder: nn.Module | None = None,
        support: Constraint | None = None,
        train_likelihood: bool = True,
        device: str = "cpu",
        graphs: bool = False,
        compile: bool = False,
    ) -> Self:
        """What `save` wrote. Objects that were given to `Inference` are given again.

        Raises:
            InputError: the file is missing, damaged or of something else, or an object is missing or doesn't fit.
        """
        path = Path(path)
        tensors, facts = checkpoint.load_saved(path, "inference", "Inference.save")
        there = _objects(prior, encoder, support, posterior, objective, train_likelihood)
        check_given(path, "Inference", facts["given"], there)
        named = facts["settings"]
        method, bound = named.pop("posterior"), named.pop("objective")
        parts = posterior or method, objective or bound
        options = {"encoder": encoder, "support": support, "train_likelihood": train_likelihood, "device": device}
        options |= {"graphs": graphs, "compile": compile}
        inference = cls(prior, likelihood, *parts, **options, **named)
        inference._objective = objective or facts.get("objective", bound)  # "auto" leaves simulations their choice
        latents = [torch.Size(shape) for shape in facts["latents"]]
        bijection = inference._bijection or Bijection([section(support, latents[0], "z")])
        if [part.shape for part in bijection.parts] != latents:
            raise InputError(f"{path} has latents of shapes {[tuple(shape) for shape in latents]}; give its own prior")
        bijection.location.copy_(tensors.pop("location"))
        bijection.scale.copy_(tensors.pop("scale"))
        inference._bijection = bijection
        inference._event_shape, inference._counts = torch.Size(facts["event_shape"]), facts["counts"]
        with seeded(inference.settings.seed, "inference"):
            model = inference._build(None)
        weights = {name.removeprefix("model/"): value for name, value in tensors.items()}
        resting = {name: w for name, w in model.state_dict().items() if name not in inference._learnt(model)}
        checkpoint.load_weights(model, resting | weights, path)
        inference._model, inference.history = model.eval(), facts["history"]
        inference._place()
        return inference

    @property
    def _objects(self) -> dict[str, bool]:
        posterior, objective = (None if isinstance(given, str) else given for given in (self._given, self._objective))
        return _objects(self.prior, self.encoder, self.support, posterior, objective, self.train_likelihood)

    @contextlib.contextmanager
    def _undone_unless_sound(self) -> Iterator[None]:
        """A block that makes ready for training; should it fail, all is as it was."""
        names = ("_model", "_bijection", "_event_shape", "_counts")
        before = {name: getattr(self, name) for name in names}
        try:
            yield
        except BaseException:
            vars(self).update(before)
            raise

    def _learnt(self, model: LatentVariableModel) -> dict[str, Tensor]:
        """The weights that belong into a file."""
        weights = model.state_dict().items()
        return {name: w for name, w in weights if self.train_likelihood or not name.startswith("likelihood.")}

    def _place(self) -> Any:
        """Put everything on the device; what the trainer needs to know of it."""
        fabric = make_fabric(self.settings)
        fabric.to_device(self.model)
        self.bijection.to(fabric.device)
        return fabric

    def _prepare(self, x: Tensor) -> None:
        """Build the model for data like x (N, *event), or check that x is like what it was built for."""
        if self._model is not None:
            self._check_shape(x)
            return
        self._event_shape, self._counts = x.shape[1:], are_counts(x)
        with seeded(self.settings.seed, "inference"):
            self._model = self._build(x)

    def _build(self, x: Tensor | None) -> LatentVariableModel:
        """A fresh model; its constants are those of x (N, *event), or will be loaded."""
        settings, shape = self.settings, self._event_shape
        learns = isinstance(self.prior, nn.Module) and any(p.requires_grad for p in self.prior.parameters())
        if self.prior is None or learns:  # a table of what it was at first would mislead
            settings = dataclasses.replace(settings, prior_denoiser=False)
        encoder = self.encoder or default_encoder(shape, self._counts, settings, x)
        model = build(self.prior, self.likelihood, self._given, encoder, self.bijection, shape, settings)
        if not self.train_likelihood:
            model.likelihood = FixedLikelihood(model.likelihood)
        return model

    def _check_shape(self, x: Tensor) -> None:
        if x.shape[1:] != self._event_shape:
            hint = "; one example is x[None]" if x.shape == self._event_shape else ""
            given = f"x has examples of shape {tuple(x.shape[1:])}"
            raise InputError(f"{given}, but {tuple(self._event_shape)} is what was learnt from{hint}")

    def _train(
        self,
        objective: Objective,
        x: Tensor,
        validation: Tensor | None,
        how: tuple[int | None, int, float],
        listener: Listener | None,
        z: Tensor | None = None,
        validation_z: Tensor | None = None,
    ) -> Self:
        epochs, batch_size, lr = how
        x, z = filled(x, batch_size), None if z is None else filled(z, batch_size)
        passes = epochs or math.ceil(_STEPS / math.ceil(len(x) / batch_size))
        frozen = frozenset[str]() if self.train_likelihood else frozenset({"likelihood"})
        before = len(self.history)
        seed = derive_seed(self.settings.seed, "fit", before) if before else self.settings.seed
        schedule = Schedule((Phase(passes, objective, frozen),), batch_size, lr, seed=seed)
        data: dict[str, Any] = {"validation_x": validation, "train_z": z, "validation_z": validation_z}
        where = self.history, self._place(), self.settings
        learn(self.model, schedule, x, *where, listener=listener, **data)
        return self

    def _fresh(self, source: Callable[[int], Any], count: int) -> tuple[Tensor, Tensor]:
        """Fresh pairs (u, x) for a step."""
        z, x = pairs(source, count)
        self._check_shape(x)
        # One on the edge of the support is infinite here, and its step is skipped, or as far out as torch goes.
        return self.bijection.inverse(check_latents(z, self.bijection).to(self.bijection.location)), x


def _how(epochs: int | None, batch_size: int, lr: float) -> tuple[int | None, int, float]:
    """How to train, found sound; epochs None leaves them to the data."""
    return None if epochs is None else convert("epochs", epochs), convert("batch_size", batch_size), convert("lr", lr)


def _objects(
    prior: Any, encoder: Any, support: Any, posterior: Any, objective: Any, train_likelihood: bool
) -> dict[str, bool]:
    """Which objects a file can't hold were given."""
    objects = {"prior": prior, "encoder": encoder, "support": support, "posterior": posterior, "objective": objective}
    return {name: given is not None for name, given in objects.items()} | {"train_likelihood": train_likelihood}
