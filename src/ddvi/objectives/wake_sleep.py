"""Wake-sleep: learning the posterior from fantasies of the model as well as from data.

The sleep term draws z ~ p(z), x ~ p_θ(x|z) and raises log q(z|x), or for posteriors with auxiliary variables the bound
E_r[ log q(z,a|x) − log r(a|z) ] on it, so that q covers all of the posterior where the ELBO settles for a part.

Sources: Hinton et al., The Wake-Sleep Algorithm, 1995; Bornschein & Bengio, Reweighted Wake-Sleep, 2015; Le et al.,
Revisiting Reweighted Wake-Sleep, 2019; Piriyakulkij et al., AAAI 2025, for the alternation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from ddvi.model import LatentVariableModel
from ddvi.objectives.base import Batch, Objective, Update
from ddvi.objectives.elbo import ELBO, bound_terms


def sleep_loss(model: LatentVariableModel, count: int, levels: int | None) -> Tensor:
    """−E_r[ log q(z,a|x) − log r(a|z) ] on `count` fantasies (count,); `levels` as in `Conditional.log_bound`."""
    z, x = model.fantasise(count)
    return -model.posterior(x).log_bound(z, levels)


@final
@dataclass(frozen=True)
class WakeSleep(Objective):
    """The paper's alternation: one ELBO step on data, then `sleep_steps` steps on fantasies.

    Args:
        wake: the bound and its weights.
        sleep_steps: steps on a batch of fantasies each.
        sleep_weight: weight of the sleep term.
        levels: terms of the chain drawn per fantasy; all if None.
    """

    wake: ELBO = field(default_factory=ELBO)
    sleep_steps: int = 3
    sleep_weight: float = 1.0
    levels: int | None = 1

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        yield from self.wake.updates(model, batch)
        for _ in range(self.sleep_steps):
            loss = sleep_loss(model, len(batch.x), self.levels)
            yield Update(("posterior",), self.sleep_weight * loss, {"sleep": loss})


@final
@dataclass(frozen=True)
class ReweightedWakeSleep(Objective):
    """Reweighted wake-sleep: no gradient through the draws.

    K draws (z_k, a_k) ~ q(z, a | x) are weighted by p_θ(x, z) r(a|z) / q(z, a|x) and one z* is resampled: in the limit
    of large K a draw from p_θ(z|x). The decoder is trained on log p_θ(x|z*), the posterior on its bound of log q(z*|x),
    plus `sleep_weight` times the same bound on fantasies.

    Args:
        samples: K.
        sleep_weight: weight of the sleep term.
        levels: terms of the chain drawn per example; all if None.
    """

    samples: int = 8
    sleep_weight: float = 0.3
    levels: int | None = None

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        features = model.posterior.encode(batch.x)
        with torch.no_grad():
            draw = model.posterior.condition(features.detach()).draw((self.samples,))
            weights = model.weigh(batch.x, draw)
            chosen = torch.distributions.Categorical(logits=weights.log_weight().T, validate_args=False).sample()
            z = draw.z.gather(0, chosen[None, :, None].expand(1, -1, draw.z.shape[-1]))[0]
        # z* as a draw of its own, so that one call scores the decoder and a prior that learns.
        reconstruction = -model.likelihood.log_prob(batch.x, z)
        wake = -model.posterior.condition(features).log_bound(z, self.levels)
        loss = reconstruction - model.prior.log_prob(z) + wake
        terms = bound_terms(weights) | {"resampled_reconstruction": reconstruction, "wake": wake}
        if self.sleep_weight > 0:
            terms["sleep"] = sleep_loss(model, len(batch.x), self.levels)
            loss = loss + self.sleep_weight * terms["sleep"]
        yield Update(("likelihood", "posterior", "prior"), loss, terms)
