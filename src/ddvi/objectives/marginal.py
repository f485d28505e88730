"""The log-likelihood itself, by draws of the prior: what any posterior is measured against where D is small.

    log p_θ(x) ≈ log 1/N Σ_n p_θ(x | z_n),    z_n ~ p(z)

The decoder, and a prior that learns, learn from this alone. The posterior learns from a z* that is resampled in
proportion to p_θ(x | z_n), in the limit of large N a draw from p_θ(z | x), by its bound of log q(z* | x). In a model
with labels the draws are shared out among them, a known label leaves those of its own, and the classifier learns the
label of z*.

Source: the importance-weighted bound (Burda et al. 2016) with the prior as its proposal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from ddvi.model import LatentVariableModel
from ddvi.objectives.base import DataObjective, check_least
from ddvi.objectives.prior_draws import PriorDraws
from ddvi.randomness import choose


@final
@dataclass(frozen=True)
class MarginalLikelihood(DataObjective):
    """log p_θ(x) itself, by N draws of the prior, the same for all of a batch.

        log p_θ(x) ≈ log 1/N Σ_n p_θ(x | z_n),    z_n ~ p(z)

    It trains the decoder without a posterior; the posterior learns from a z that is resampled among the draws.

    Args:
        samples: N. The estimate is biased downwards; narrow posteriors need many.
        levels: terms of the chain drawn per example; all if None.

    Raises:
        InputError: samples or levels is below 1; in training, the likelihood or the posterior has no density.

    Source: Burda et al., 2016, with the prior as the proposal.

    Example:
        >>> loss, terms = MarginalLikelihood(samples=100).loss(model, x)
        >>> loss.shape, sorted(terms)
        (torch.Size([3]), ['marginal', 'wake'])
    """

    samples: int = 2000
    levels: int | None = None

    def __post_init__(self) -> None:
        check_least(self, samples=1, levels=1)

    def loss(
        self, model: LatentVariableModel, x: Tensor, label: Tensor | None = None, progress: float | Tensor = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        draws = PriorDraws.of(model, x, self.samples)
        log_weight = draws.log_weight(label)
        marginal = log_weight.logsumexp(0)
        chosen = choose(log_weight.detach())
        view = model.view(x, draws.label[chosen] if draws.label is not None else None)
        wake = -model.posterior.condition(view.features).log_bound(draws.z[chosen], self.levels)
        loss, terms = wake - marginal, {"marginal": -marginal, "wake": wake}
        if view.log_label is not None:
            terms["classification"] = -view.log_label
            loss = loss + terms["classification"]
        return loss, terms
