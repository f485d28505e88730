"""The adversarial autoencoder: reconstruction, and a discriminator that tells encoded data from draws of the prior.

Source: Makhzani et al., Adversarial Autoencoders, 2015.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from torch.nn.functional import softplus

from ddvi.errors import InputError
from ddvi.model import LatentVariableModel
from ddvi.objectives.base import Batch, Objective, Update


@final
@dataclass(frozen=True)
class Adversarial(Objective):
    """One step of the discriminator, then one of encoder and decoder, which also fool it.

    Args:
        weight: of fooling the discriminator, in nats of reconstruction.
    """

    weight: float = 5.0

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        discriminator = model.discriminator
        if discriminator is None:
            raise InputError("adversarial training needs a model with a discriminator; build it with method=aae")
        z = model.posterior(batch.x).draw().z
        # −log D(prior) − log(1 − D(encoded)), with D the sigmoid of the discriminator's logit.
        real = discriminator(model.prior.sample((len(batch.x),)))
        loss = softplus(-real) + softplus(discriminator(z.detach()))
        yield Update(("discriminator",), loss, {"discrimination": loss})
        reconstruction = -model.likelihood.log_prob(batch.x, z)
        fooling = softplus(-discriminator(z))
        terms = {"reconstruction": reconstruction, "fooling": fooling}
        yield Update(("likelihood", "posterior"), reconstruction + self.weight * fooling, terms)
