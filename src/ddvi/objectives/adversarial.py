"""The adversarial autoencoder: reconstruction, and a discriminator that tells encoded data from draws of the prior.

With labels the discriminator also sees one of C + 1 indicators, the last for "unknown": draws of the prior show their
label half of the time, data where it has one. So the encoder learns which part of the prior belongs to which label.

Source: Makhzani et al., Adversarial Autoencoders, 2015.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from ddvi.errors import InputError
from ddvi.model import LatentVariableModel
from ddvi.objectives.base import Batch, Objective, Update
from ddvi.randomness import draw, draw_whole, part


@final
@dataclass(frozen=True)
class Adversarial(Objective):
    """One step of the discriminator, then one of encoder and decoder, which also fool it.

        −log D(z) − log(1 − D(f(x))),  z ~ p(z),    then    −log p_θ(x | f(x)) − weight · log D(f(x))

    D is the sigmoid of `model.discriminator`, f the encoder. Losses are (B,).

    Args:
        weight: of fooling the discriminator, in nats of reconstruction.

    Raises:
        InputError: in training, the model has no discriminator.

    Source: Makhzani et al., Adversarial Autoencoders, 2015.

    Example:
        >>> encoder = ddvi.ImplicitPosterior(model.posterior.encoder, latent_size=2)
        >>> discriminator = torch.nn.Linear(2, 1)
        >>> aae = LatentVariableModel(model.prior, model.likelihood, encoder, discriminator=discriminator)
        >>> [update.children for update in Adversarial().updates(aae, Batch(x))]
        [('discriminator',), ('likelihood', 'posterior')]
    """

    weight: float = 5.0

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        discriminator = model.discriminator
        if discriminator is None:
            raise InputError("adversarial training needs a model with a discriminator; build it with method=aae")
        count, parts = len(batch.x), 0
        # Data without labels first, then as much with them; in the loss of an example the two are averaged.
        x, labels, every = batch.x, None, None
        if batch.labelled is not None:
            parts = model.prior.parts or 1
            every = draw_whole(partial(torch.randint, parts), count, device=x.device)
            x = torch.cat([x, batch.labelled.x])
            labels = torch.cat([torch.full_like(batch.labelled.label, parts), batch.labelled.label])
        z = model.posterior(x).draw().z
        drawn, label = draw(partial(model.prior.sample, label=every), (count,), 0), None
        if every is not None:
            hidden = draw(torch.rand, (count,), 0, device=x.device) < 0.5
            label = part(every).masked_fill(hidden, parts)

        def averaged(value: Tensor) -> Tensor:
            return value.view(-1, count).mean(0)

        # −log D(prior) − log(1 − D(encoded)), with D the sigmoid of the discriminator's logit.
        real = softplus(-discriminator(_shown(drawn, label, parts)))
        loss = real + averaged(softplus(discriminator(_shown(z.detach(), labels, parts))))
        yield Update(("discriminator",), loss, {"discrimination": loss})
        reconstruction = averaged(-model.likelihood.log_prob(x, z))
        fooling = averaged(softplus(-discriminator(_shown(z, labels, parts))))
        terms = {"reconstruction": reconstruction, "fooling": fooling}
        yield Update(("likelihood", "posterior"), reconstruction + self.weight * fooling, terms)


def _shown(z: Tensor, label: Tensor | None, parts: int) -> Tensor:
    """What the discriminator sees of z (N, D): with labels (N,), of which `parts` says unknown, (N, D + parts + 1)."""
    return z if label is None else torch.cat([z, one_hot(label, parts + 1).to(z.dtype)], -1)
