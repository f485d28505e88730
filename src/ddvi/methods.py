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
        takes: names of settings (or "prior") that its constructor takes as keywords.
        objectives: those that it can be trained by, its own first.
        defaults: settings that differ from the general defaults.
    """

    description: str
    posterior: str
    takes: tuple[str, ...] = ()
    objectives: tuple[str, ...] = tuple(name for name in OBJECTIVES if name != "adversarial")
    defaults: Mapping[str, object] = field(default_factory=dict)

    @property
    def objective(self) -> str:
        """The objective that suits the method."""
        return self.objectives[0]

    def posterior_class(self) -> type[Posterior]:
        """The class that `posterior` names."""
        return pkgutil.resolve_name(self.posterior)


_FLOW = ("flow_layers", "context_size")
_DIFFUSION = ("steps", "noise", "denoiser_size", "denoiser_layers", "covariance", "prior")

METHODS: dict[str, Method] = {
    "vae": Method("diagonal Gaussian posterior", "ddvi.posteriors.gaussian:GaussianPosterior"),
    "iaf_vae": Method("inverse autoregressive flow", "ddvi.posteriors.flow:FlowPosterior", _FLOW),
    "h_iaf_vae": Method("flow of an auxiliary variable", "ddvi.posteriors.hierarchical:HierarchicalPosterior", _FLOW),
    "aae": Method("adversarial encoder", "ddvi.posteriors.implicit:ImplicitPosterior", objectives=("adversarial",)),
    "ddvi": Method(
        "diffusion posterior, the method of the project",
        "ddvi.posteriors.diffusion:DiffusionPosterior",
        _DIFFUSION,
        ("reweighted_wake_sleep", "wake_sleep", "elbo", "importance_weighted"),
    ),
}

ALIASES = {"diff_vae_warmup": "ddvi"}
"""Names that the paper's commands use."""
