"""The methods: method = posterior × objective × prior × likelihood.

A line here names a posterior, what it takes beside an encoder, and the objective that suits it; every other objective
that its density allows can be chosen by a setting. Nothing here imports torch: a posterior is named by where it stands.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ddvi.catalogue import OBJECTIVES

if TYPE_CHECKING:
    from ddvi.posteriors.base import Posterior


@dataclass(frozen=True)
class Method:
    """One composition.

    Args:
        description: one line for `ddvi list`.
        posterior: the class, as module:name.
        takes: names of settings that its constructor takes as keywords (`prior_denoiser`: the prior, `guidance`: one of
            the likelihood; None where they are switched off).
        objectives: those that it can be trained by, its own first.
        warms_up: whether there is a simpler model that training can start with, see `ddvi.objectives.warm_up`.
        defaults: settings that differ from the general defaults.
        objective_defaults: those that differ once more for an objective, by its name.
        learning_rates: `lr` by objective, each the best of three on validation examples of MNIST (the stored study
            mnist_learning_rates); other objectives take that of the method's own.
        semi: settings that differ where labels are learnt too.
        semi_for: those that differ once more for a prior or a data set, by its name.
        paper: settings of the paper's code that differ from `PAPER`, weights in units of a mean over pixels.
        paper_semi: those that differ once more where it learns from labels.
    """

    description: str
    posterior: str
    takes: tuple[str, ...] = ()
    objectives: tuple[str, ...] = tuple(name for name in OBJECTIVES if name != "adversarial")
    warms_up: bool = False
    defaults: Mapping[str, object] = field(default_factory=dict)
    objective_defaults: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    semi: Mapping[str, object] = field(default_factory=lambda: _LABELS)
    semi_for: Mapping[str, Mapping[str, object]] = field(default_factory=lambda: _LABELS_FOR)
    paper: Mapping[str, object] = field(default_factory=dict)
    paper_semi: Mapping[str, object] = field(default_factory=dict)

    @property
    def objective(self) -> str:
        """The objective that suits the method."""
        return self.objectives[0]

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of settings that are the posterior's: what it takes, and what is put around any that has a density."""
        return self.takes if self.objectives == ("adversarial",) else (*self.takes, *_AROUND)

    def posterior_class(self) -> type[Posterior]:
        """The class that `posterior` names."""
        return pkgutil.resolve_name(self.posterior)


_AROUND = ("laplace",)
_FLOW = ("flow_layers", "context_size")
_SEVERAL_DRAWS: Mapping[str, float] = {"reweighted_wake_sleep": 8e-3, "importance_weighted": 8e-3}
"""Learning rates of objectives that weigh several draws: for every posterior the best of 2e-3, 4e-3 and 8e-3 by
log p(x) of validation examples (`ddvi study mnist_learning_rates`), the edge of the three."""
_PAPER_SEMI = {"epochs": 50, "kl_weight": 0.01, "prior_weight": 1.0, "classifier_weight": 0.01}
_PAPER_FLOW = {"kl_weight": 0.01, "kl_rise": 0.8, "context_size": 10}
_DIFFUSION = (
    "steps",
    "noise",
    "denoiser_size",
    "denoiser_layers",
    "covariance",
    "prior_denoiser",
    "level_weights",
    "guidance",
)

_LABELS: Mapping[str, object] = {
    "lr": 3e-3,
    "classifier_weight": 20.0,
    "agreement_weight": 20.0,
    "information_weight": 5.0,
    "label_rate": 0.01,
}
"""Chosen by short runs on held-out labels of one seed, for DDVI and the VAE; see `benchmarks/semi_supervised.py`."""
_LABELS_FOR: Mapping[str, Mapping[str, object]] = {
    "cifar": {"classifier_weight": 2000.0, "agreement_weight": 200.0, "information_weight": 50.0}
}
"""A hundred times those of binary images, which ended below a classifier that sees the labels alone; none between."""
_ADVERSARIAL_LABELS = {**_LABELS, "lr": 4e-3, "label_temperature": 20.0}
"""Chosen in the same way, under the pinwheel; `semi_for` has what was chosen under another prior."""

METHODS: dict[str, Method] = {
    "vae": Method(
        "diagonal Gaussian posterior",
        "ddvi.posteriors.gaussian:GaussianPosterior",
        learning_rates={"elbo": 8e-3, **_SEVERAL_DRAWS},
        paper={"kl_weight": 0.01, "kl_rise": 0.8, "prior_weight": 5.0},
        paper_semi=_PAPER_SEMI,
    ),
    "iaf_vae": Method(
        "inverse autoregressive flow",
        "ddvi.posteriors.flow:FlowPosterior",
        _FLOW,
        learning_rates={"elbo": 4e-3, **_SEVERAL_DRAWS},
        paper=_PAPER_FLOW,
        paper_semi=_PAPER_SEMI,
    ),
    "nsf_vae": Method(
        "neural spline flow",
        "ddvi.posteriors.spline:SplinePosterior",
        (*_FLOW, "spline_bins"),
        learning_rates={"elbo": 4e-3, **_SEVERAL_DRAWS},
        paper=_PAPER_FLOW,
        paper_semi=_PAPER_SEMI,
    ),
    "h_iaf_vae": Method(
        "flow of an auxiliary variable",
        "ddvi.posteriors.hierarchical:HierarchicalPosterior",
        _FLOW,
        learning_rates={"elbo": 2e-3, **_SEVERAL_DRAWS},
        paper={"kl_weight": 0.005, "kl_rise": 0.8, "prior_weight": 0.5, "context_size": 10},
        paper_semi=_PAPER_SEMI,
    ),
    "aae": Method(
        "adversarial encoder",
        "ddvi.posteriors.implicit:ImplicitPosterior",
        objectives=("adversarial",),
        learning_rates={"adversarial": 4e-3},
        semi=_ADVERSARIAL_LABELS,
        semi_for={**_LABELS_FOR, "swiss_roll": {"label_temperature": 50.0, "classifier_weight": 50.0}},
        paper={"lr": 2e-4, "adversarial_weight": 6.0},
        paper_semi={"classifier_weight": 0.0},
    ),
    "ddvi": Method(
        "diffusion posterior, the method of the project",
        "ddvi.posteriors.diffusion:DiffusionPosterior",
        _DIFFUSION,
        ("reweighted_wake_sleep", "wake_sleep", "elbo", "importance_weighted", "marginal_likelihood"),
        warms_up=True,
        # Flows can't score draws that went far astray, and their runs ended in numbers that aren't finite.
        objective_defaults={"reweighted_wake_sleep": {"variance_weight": 0.25}},
        # Through the chain's gradient 8e-3 ends in numbers that aren't finite.
        learning_rates={"reweighted_wake_sleep": 8e-3, "importance_weighted": 4e-3, "elbo": 4e-3},
        paper={
            "objective": "wake_sleep",
            "steps": 40,
            "noise": "linear_beta",
            "denoiser_layers": 4,
            "covariance": "diagonal",
            "prior_denoiser": False,
            "kl_weight": 0.003,
            "sleep_steps": 3,
            "sleep_weight": 1.0,
            "warmup": 100,
            "warmup_kl_weight": 0.01,
            "freeze_decoder": 30,
        },
        paper_semi={
            "batch_size": 1024,
            "epochs": 100,
            "warmup": 50,
            "freeze_decoder": 0,
            "kl_weight": 0.1,
            "classifier_weight": 0.01,
            "steps": 100,
            "sleep_steps": 30,
        },
    ),
}

ALIASES = {"diff_vae_warmup": "ddvi"}
"""Names that the paper's commands use."""

PAPER: Mapping[str, object] = {
    "hidden_size": 1000,
    "batch_size": 128,
    "lr": 1e-4,
    "schedule": "constant",
    "epochs": 200,
    "clip_norm": 0.0,
    "dropout": 0.2,
}
"""Settings of the paper's code that all methods share."""
