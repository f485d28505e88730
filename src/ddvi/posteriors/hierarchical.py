"""The hierarchical posterior: an auxiliary variable of the latent's size, both drawn by flows.

    a ~ q(a | x),    z ~ q(z | x, a),    r(a | z) = N(0, I)

Source: Ranganath et al., Hierarchical Variational Models, 2016; Maaløe et al., Auxiliary Deep Generative Models, 2016.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from ddvi import gaussians
from ddvi.posteriors.base import Conditional, Draw, Posterior
from ddvi.posteriors.flow import ConditionalFlow, FlowDensity


@final
class HierarchicalConditional(Conditional):
    """q(a | x) q(z | x, a) against r(a) = N(0, I)."""

    auxiliaries = 1

    def __init__(self, posterior: HierarchicalPosterior, context: Tensor) -> None:
        self.posterior = posterior
        self.context = context
        self.auxiliary: FlowDensity = posterior.auxiliary_flow(context)

    def draw(self, sample_shape: tuple[int, ...] = ()) -> Draw:
        a, log_auxiliary = self.auxiliary.draw(sample_shape)
        z, log_latent = self.latent_given(a).draw()
        return Draw(z, log_auxiliary + log_latent - gaussians.standard_log_prob(a), torch.stack([z, a]))

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        a, _ = self.auxiliary.draw(sample_shape)
        return self.latent_given(a).draw()[0]

    def log_ratio(self, path: Tensor) -> Tensor:
        z, a = path
        log_auxiliary = self.auxiliary.log_prob(a) - gaussians.standard_log_prob(a)
        return log_auxiliary + self.latent_given(a).log_prob(z)

    def reverse_path(self, z: Tensor) -> Tensor:
        return torch.stack([z, gaussians.normal(z)])

    def log_bound(self, z: Tensor, levels: int | None = None) -> Tensor:
        return self.log_ratio(self.reverse_path(z))

    def latent_given(self, a: Tensor) -> FlowDensity:
        """q(z | x, a) for a of shape (*, *batch_shape, D)."""
        return self.posterior.latent_flow(torch.nn.functional.silu(self.context + self.posterior.entrance(a)))


@final
class HierarchicalPosterior(Posterior):
    """A flow given an auxiliary variable that is itself drawn by a flow.

        a ~ q(a | x),    z ~ q(z | x, a),    r(a | z) = N(0, I)

    Args:
        encoder: from observations (B, *event) to features (B, encoder.out_features).
        latent_size: D.
        labels: number of classes for q(z | x, label); 0 without labels.
        flow_layers: number of layers of each of the two flows.
        context_size: size of the projection of the features that conditions them.

    Raises:
        InputError: D is not positive.

    Sources: Ranganath et al., Hierarchical Variational Models, 2016; Maaløe et al., 2016.

    Example:
        >>> posterior = HierarchicalPosterior(nn.Linear(6, 8), latent_size=2, flow_layers=2)
        >>> posterior(torch.ones(3, 6)).draw((10,)).path.shape  # z and a
        torch.Size([2, 10, 3, 2])
    """

    def __init__(
        self, encoder: nn.Module, latent_size: int, labels: int = 0, flow_layers: int = 4, context_size: int = 64
    ) -> None:
        super().__init__(encoder, latent_size, labels)
        self.context: nn.Linear = nn.Linear(self.features, context_size)
        self.auxiliary_flow: ConditionalFlow = ConditionalFlow(context_size, latent_size, flow_layers)
        self.entrance: nn.Linear = nn.Linear(latent_size, context_size)
        self.latent_flow: ConditionalFlow = ConditionalFlow(context_size, latent_size, flow_layers)

    def condition(self, features: Tensor) -> HierarchicalConditional:
        return HierarchicalConditional(self, self.context(features))
