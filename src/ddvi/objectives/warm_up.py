"""The simpler model that the paper's training of a diffusion posterior starts from.

Source: Piriyakulkij et al., AAAI 2025.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ddvi.model import LatentVariableModel
from ddvi.objectives.base import Batch, DataObjective, Update, check_least
from ddvi.objectives.elbo import bound_terms, negative_elbo
from ddvi.randomness import draw


@final
@dataclass(frozen=True)
class WarmUp(DataObjective):
    """The simpler model that the paper starts from: an encoder of z_T, and a denoiser that knows the prior alone.

        data:   log p_θ(x|z) + kl_weight ( log p(z) + log r(z_1:T|z) − log q(z_T|x) − Σ_t log q(z_{t-1}|z_t) )
        prior:  E_p(z) E_r[ Σ_t log q(z_{t-1}|z_t) ]

    The bound through the unconditional chain trains encoder and decoder; the denoiser learns from draws of the prior.
    Losses are (B,).

    Args:
        kl_weight: as in `ELBO`.
        sleep_steps: denoising steps per step on data.
        levels: terms of the chain drawn per prior draw; all if None.
        label_rate: as in `ELBO`.

    Raises:
        InputError: a number is out of range; in training, the posterior isn't a diffusion.

    Source: Piriyakulkij et al., AAAI 2025.

    Example:
        >>> [update.children for update in WarmUp().updates(model, Batch(x))][1:]
        [('posterior',)]
    """

    kl_weight: float = 1.0
    sleep_steps: int = 1
    levels: int | None = 1
    label_rate: float = 1.0

    def __post_init__(self) -> None:
        check_least(self, sleep_steps=0, levels=1)

    def loss(
        self, model: LatentVariableModel, x: Tensor, label: Tensor | None = None, progress: float | Tensor = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        view = model.view(x, label)
        weights = model.weigh(x, model.posterior.without_context(view.features).draw((1,)), view.label)
        return negative_elbo(view, weights, self.kl_weight, label_rate=self.label_rate), bound_terms(view, weights)

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        posterior = model.posterior
        yield from super().updates(model, batch)
        for _ in range(self.sleep_steps):
            with torch.no_grad():
                z = draw(model.prior.sample, (len(batch.x),), 0)
                # These draws have nothing to do with the data: the start, which depends on x, must not learn from them.
                conditional = posterior.without_context(posterior.encode(batch.x))
            loss = -conditional.log_bound(z, self.levels)
            yield Update(("posterior",), loss, {"sleep": loss})
