"""A fixed target: an unnormalised density γ(z) without data, its normaliser Z = ∫ γ(z) dz, and draws of γ/Z.

It is the model with a broad Gaussian base as its prior and γ over the base as its likelihood,

    p(u) = N(0, I),    log p(x | u) = log γ(z(u)) + log |det ∂z/∂u| − log p(u),    z(u) = T(s u + m),

of one observation x that says nothing, so that the evidence log p(x) is log Z and the posterior is γ/Z. Every
posterior, objective and bound is then that of every other model here. T is the bijection onto the support (`supports`).

Sources: Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015, for learning unnormalised densities;
those of `weighted` and of the objectives.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Self, final

import torch
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from ddvi import checkpoint
from ddvi.annealing import anneal
from ddvi.devices import make_fabric
from ddvi.drawn import unchecked
from ddvi.errors import InputError
from ddvi.files import check_file
from ddvi.learning import learn
from ddvi.likelihoods import Likelihood
from ddvi.model import LatentVariableModel
from ddvi.objectives.base import Objective
from ddvi.objectives.reweighted import Reweighted
from ddvi.objectives.sleep import Sleep
from ddvi.own import assembled, check_given, settings_of, stored
from ddvi.posteriors.base import Posterior, PosteriorMaker
from ddvi.posteriors.gaussian import begin_at
from ddvi.priors import Prior, StandardGaussian
from ddvi.randomness import derive_seed, seeded
from ddvi.schedule import Phase, Schedule
from ddvi.settings import Settings, convert
from ddvi.supports import Bijection, section
from ddvi.training import Listener
from ddvi.weighted import FittedTarget

_STEPS_PER_EPOCH = 100

Density = Callable[[Tensor], Tensor]
"""log γ: from z (N, *latent) to (N,)."""


@final
class Factor(Likelihood):
    """γ over the base as a likelihood, see the module: the same for every x.

    Args:
        log_joint: log γ.
        bijection: from u to z.
        base: p(u).
    """

    def __init__(self, log_joint: Density, bijection: Bijection, base: Prior) -> None:
        super().__init__()
        self.log_joint = log_joint
        self.bijection = bijection
        self.base = base
        self.event_shape: torch.Size = torch.Size([1])

    def forward(self, z: Tensor) -> NoReturn:
        hint = "use sample, an objective with sleep_weight=0, or a ddvi.Inference with data"
        raise InputError(f"a fixed target has no observations to draw; {hint}")

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        rows = z.reshape(-1, z.shape[-1])
        value = self.log_joint(self.bijection(rows)) + self.bijection.log_volume(rows) - self.base.log_prob(rows)
        return value.reshape(z.shape[:-1])

    def pairwise_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return self.log_prob(x, z).expand(len(x), -1)


@final
class Constant(nn.Module):
    """The encoder of what says nothing: x (B, *event) to ones (B, 1)."""

    out_features = 1

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x.flatten(1)[:, :1])


_IDLE = ("hidden_size", "dropout", "sleep_levels", "prior_denoiser", "guidance", "laplace")
"""Settings that a target has no use for: it has no encoder, no fantasies, no prior and no likelihood."""


@final
class Target:
    """Learns an unnormalised density γ(z): draws of γ/Z, and an estimate of log Z, where there are no data.

        target = ddvi.Target(log_joint, 2, scale=20.0).fit()
        target.posterior().log_evidence()

    Args:
        log_joint: log γ: a torch function, or a module, from z (N, *latent) to (N,); it may be −∞, and is
            differentiated by `ELBO` alone.
        shape: of one z: a number of dimensions, or a shape.
        posterior: a method's name (`ddvi list`), a `Posterior` over unconstrained latents of D entries whose encoder
            takes ones (B, 1), or a function (encoder, D) to one.
        objective: an `Objective`; by default `Reweighted()`. `ELBO(samples=256, path_gradient=True)` is the reverse
            Kullback–Leibler divergence, and `Tempered` anneals it.
        support: of z, a torch constraint; all real numbers by default.
        location: centre m of the base, in unconstrained space: a number, or one for each of D entries.
        scale: its standard deviation s, likewise. The base should cover all that counts: better too broad.
        seed: of everything random; the caller's random state is left as it is.
        device: "cpu", "cuda", "mps" or "auto".
        settings: any that the posterior takes (`steps`, `denoiser_size`, `flow_layers`, …).

    Raises:
        InputError: a name, an object or a setting can't be used, or log_joint isn't sound on draws of the base.

    Sources: that of the module; Piriyakulkij et al., AAAI 2025, for the posterior.

    Example:
        >>> from torch.distributions import Gamma, constraints
        >>> log_joint = lambda rate: 2.0 + Gamma(3.0, 1.0).log_prob(rate).sum(-1)
        >>> target = Target(log_joint, 1, support=constraints.positive, steps=2).fit(steps=100)
        >>> bool((target.posterior().log_evidence(1000, seed=1).value - 2.0).abs() < 0.2)
        True
    """

    def __init__(
        self,
        log_joint: Density,
        shape: int | tuple[int, ...],
        posterior: str | Posterior | PosteriorMaker = "ddvi",
        objective: Objective | None = None,
        *,
        support: Constraint | None = None,
        location: float | Tensor = 0.0,
        scale: float | Tensor = 1.0,
        seed: int = 0,
        device: str = "cpu",
        **settings: Any,
    ) -> None:
        self.objective: Objective = objective or Reweighted()
        if not callable(log_joint):
            hint = "its log_prob" if hasattr(log_joint, "log_prob") else "a function from z to (N,)"
            raise InputError(f"log_joint is a {type(log_joint).__name__}, which can't be called; give {hint}")
        for name in _IDLE:
            if name in settings:
                raise InputError(f"{name} has no effect on a fixed target; leave it out")
        self._given = posterior
        self._objects = _objects(*(None if isinstance(posterior, str) else posterior, objective, support))
        settings = {"seed": seed, "device": device, **settings}
        self.settings: Settings = settings_of(posterior, self.objective, settings, prior_denoiser=False)
        if isinstance(shape, numbers.Integral):
            shape = int(shape)
        if not isinstance(shape, (int, tuple, list)):
            raise InputError(f"shape={shape!r} is no shape of a z; give a number of dimensions, or a tuple of them")
        shape = torch.Size([shape] if isinstance(shape, int) else shape)
        self.bijection: Bijection = Bijection([section(support, shape, "z")])
        """From unconstrained u (*, D) to z (*, *latent)."""
        _place(self.bijection, location, scale)
        self.log_joint = log_joint
        self.history: list[dict[str, Any]] = []
        """A row for each 100 steps: the terms of the loss."""
        base = StandardGaussian(self.bijection.size)
        with seeded(seed, "target"):
            self.model: LatentVariableModel = self._build(base)
        """The model over u, for whatever isn't here."""
        self._fabric = make_fabric(self.settings)
        self._fabric.to_device(self.model)
        _check(self.model, log_joint, self.bijection, type(self.objective).__name__ * self.objective.through_draws)

    def _build(self, base: Prior) -> LatentVariableModel:
        factor = Factor(self.log_joint, self.bijection, base)
        model = assembled(base, factor, self._given, Constant(), self.settings)
        if not model.posterior.has_density:
            raise InputError("this posterior has no density, and a fixed target is nothing else; take another one")
        if not isinstance(self._given, Posterior):
            begin_at(model.posterior)
        return model

    def fit(self, steps: int = 4000, *, lr: float = 1e-3, listener: Listener | None = None) -> Self:
        """Learn. Called again it goes on from where it stood, with a fresh optimiser.

        Args:
            steps: updates; in hundreds, rounded up, from the first hundred on.
            lr: Adam's learning rate, which falls to 0 along a cosine.
            listener: who watches.

        Raises:
            InputError: an argument can't be used.
            Interrupted: Ctrl-C; what has been learnt by then stays.
            TrainingError: loss or gradient weren't finite three times in a row.
        """
        if steps < 1:
            raise InputError(f"steps={steps} is too few; give at least 1")
        lr = convert("lr", lr)
        rows = min(steps, _STEPS_PER_EPOCH)
        return self._train(self.objective, None, rows, math.ceil(steps / rows), 1, lr, listener)

    def fit_annealed(
        self,
        particles: int = 20_000,
        *,
        moves: int = 10,
        steps: int = 4000,
        batch_size: int = 256,
        lr: float = 1e-3,
        listener: Listener | None = None,
    ) -> Self:
        """Learn from particles that have been taken along a tempered path from the base: `annealing`, then `Sleep`.

        Finds what lies far apart in many dimensions, where weighted draws are too few; log_joint is differentiated.
        What the particles have wrong `fit` can put right afterwards.

        Args:
            particles: their number N, at least `batch_size`.
            moves: Langevin steps of each at every temperature.
            steps: updates, in whole passes over the particles.
            batch_size: particles per update.
            lr: as in `fit`.
            listener: who watches.

        Raises:
            InputError: an argument can't be used.
            Interrupted, TrainingError: as `fit`.
        """
        if steps < 1:
            raise InputError(f"steps={steps} is too few; give at least 1")
        if particles < 2:
            raise InputError(f"particles={particles} are too few; give 2 or more")
        if not 1 <= batch_size <= particles:
            raise InputError(f"batch_size={batch_size} doesn't fit {particles} particles; give 1 to {particles}")
        lr = convert("lr", lr)
        _check(self.model, self.log_joint, self.bijection, "annealing")
        with seeded(self.settings.seed, "anneal", len(self.history)), unchecked():
            drawn = anneal(self.model, self.bijection.location.new_zeros(1, 1), particles, moves)
        passes = math.ceil(steps / math.ceil(particles / batch_size))
        return self._train(Sleep(), drawn.z, particles, passes, batch_size, lr, listener)

    def _train(
        self,
        objective: Objective,
        z: Tensor | None,
        rows: int,
        passes: int,
        batch_size: int,
        lr: float,
        listener: Listener | None,
    ) -> Self:
        seed = derive_seed(self.settings.seed, "fit", len(self.history))
        phase = Phase(passes, objective, frozenset({"likelihood", "prior"}))
        schedule = Schedule((phase,), batch_size, lr, seed=seed)
        nothing = torch.zeros(rows, 1)  # observations that say nothing
        where = self.history, self._fabric, self.settings
        learn(self.model, schedule, nothing, *where, listener=listener, train_z=z)
        return self

    def posterior(self) -> FittedTarget:
        """q as it has been learnt by now; before `fit` it is the base."""
        return FittedTarget(self.model.eval(), self.bijection)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and plain settings to a safetensors file; nothing that would be unpickled."""
        facts = {
            "settings": stored(self.settings, self._given, self.objective),
            "latent": list(self.bijection.event_shape),
            "given": self._objects,
            "history": self.history,
        }
        tensors = {f"posterior/{name}": value for name, value in self.model.posterior.state_dict().items()}
        tensors |= {"location": self.bijection.location, "scale": self.bijection.scale}
        check_file(Path(path))
        checkpoint.save(Path(path), tensors, {"target": facts})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        log_joint: Density,
        *,
        posterior: Posterior | PosteriorMaker | None = None,
        objective: Objective | None = None,
        support: Constraint | None = None,
        device: str = "cpu",
        graphs: bool = False,
        compile: bool = False,
    ) -> Self:
        """What `save` wrote. Objects that were given to `Target` are given again.

        Raises:
            InputError: the file is missing, damaged or of something else, or an object is missing or doesn't fit.
        """
        path = Path(path)
        tensors, facts = checkpoint.load_saved(path, "target", "Target.save")
        check_given(path, "Target", facts["given"], _objects(posterior, objective, support))
        named = facts["settings"]
        method = named.pop("posterior")
        for name in ("objective", *_IDLE):
            named.pop(name, None)
        place = {"location": tensors.pop("location"), "scale": tensors.pop("scale")}
        options = {"support": support, "device": device, "graphs": graphs, "compile": compile, **place, **named}
        target = cls(log_joint, tuple(facts["latent"]), posterior or method, objective, **options)
        weights = {name.removeprefix("posterior/"): value for name, value in tensors.items()}
        checkpoint.load_weights(target.model.posterior, weights, path)
        target.history = facts["history"]
        return target


def _objects(posterior: Any, objective: Any, support: Any) -> dict[str, bool]:
    """Which objects a file can't hold were given."""
    return {"posterior": posterior is not None, "objective": objective is not None, "support": support is not None}


def _place(bijection: Bijection, location: float | Tensor, scale: float | Tensor) -> None:
    """Give the bijection the base's location and scale."""
    for name, given in (("location", location), ("scale", scale)):
        value = torch.as_tensor(given, dtype=bijection.location.dtype)
        if value.shape not in {torch.Size([]), bijection.location.shape}:
            raise InputError(
                f"{name} has shape {tuple(value.shape)}; give a number, or one for each of {bijection.size}"
            )
        if not value.isfinite().all() or (name == "scale" and (value <= 0).any()):
            raise InputError(f"{name} isn't {'positive and finite' if name == 'scale' else 'finite'}; correct it")
        getattr(bijection, name).copy_(value)


def _check(model: LatentVariableModel, log_joint: Density, bijection: Bijection, differentiates: str = "") -> None:
    """Refuse at once a log_joint that would fail in the first step, or teach nothing to what `differentiates` it."""
    with seeded(0, "check"), torch.no_grad():
        z = bijection(model.prior.sample((64,)))
    # Of a distribution torch would say so in its own words.
    with unchecked(), torch.set_grad_enabled(bool(differentiates)):
        value = log_joint(z.requires_grad_(bool(differentiates)))
    if not isinstance(value, Tensor) or value.shape != (64,):
        given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InputError(f"log_joint of z {tuple(z.shape)} gives {given}; make it a tensor, one number for each z")
    if bool(value.isnan().any() | (value == torch.inf).any()):
        raise InputError("log_joint is NaN or +∞ at draws of the base; make it finite, or −∞ where there is no mass")
    if not bool((value > -torch.inf).any()):
        raise InputError("log_joint is −∞ at all 64 draws of the base; move it by location= and scale=")
    if differentiates and bool((value != value[0]).any()):
        slope = torch.autograd.grad(value.sum(), z, allow_unused=True)[0] if value.requires_grad else None
        if slope is None:
            massless = bool((value == -torch.inf).any())
            needed = f"which {differentiates} needs; use ddvi.Reweighted" + " or ddvi.LogVariance" * (not massless)
            raise InputError(f"log_joint has no gradient in z, {needed}")
