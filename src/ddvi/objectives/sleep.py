"""The sleep term: learning the posterior from fantasies of the model.

It draws z ~ p(z), x ~ p_θ(x|z) and raises log q(z|x), or for posteriors with auxiliary variables the bound
E_r[ log q(z,a|x) − log r(a|z) ] on it, so that q covers all of the posterior where a bound of log p(x) settles for a
part. In a model with labels it draws l ~ p(l) first and raises log q(l|x) as well.

Sources: Hinton et al., The Wake-Sleep Algorithm, 1995; Papamakarios and Murray, Fast ε-free Inference of Simulation
Models, 2016; with a chain, Piriyakulkij et al., AAAI 2025.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from ddvi.model import Fantasies, LatentVariableModel, View
from ddvi.objectives.base import Batch, DataObjective, Objective, Update, check_least


def sleep_loss(
    model: LatentVariableModel, fantasies: Fantasies, levels: int | None, features: Tensor | None = None
) -> Tensor:
    """−E_r[ log q(z,a|x) − log r(a|z) ] on fantasies (N,).

    In a model with labels, −log q(l|x) more, and z, a given the label.

    Args:
        model: whose posterior is to learn.
        fantasies: N of them.
        levels: as in `Conditional.log_bound`.
        features: what the encoder has given of them already (N, features).
    """
    features = model.posterior.encode(fantasies.x) if features is None else features
    view = model.view_of(features, fantasies.label)
    loss = -model.posterior.condition(view.features).log_bound(fantasies.z, levels)
    return loss if view.log_label is None else loss - view.log_label


@final
@dataclass(frozen=True)
class Sleep(Objective):
    """The sleep term alone, for models that can be simulated: the posterior learns from pairs (z, x) of the model.

        E_p(z,x) E_r(a|z)[ log q(z, a | x) − log r(a | z) ] ≤ E_p(z,x)[ log q(z | x) ]

    No density of prior or likelihood is asked for. Pairs are those of the batch where it has them, else fresh ones.

    Args:
        levels: terms of the chain drawn per pair; all if None.
        simulate: count to so many (z, x), of shapes (count, D) and (count, *event); None draws from the model itself.

    Raises:
        InputError: levels is below 1.

    Source: Papamakarios and Murray, Fast ε-free Inference of Simulation Models, 2016; with a chain, method and bound of
    Piriyakulkij et al., AAAI 2025.

    Example:
        >>> Sleep() == Sleep(levels=None)
        True
    """

    levels: int | None = None
    simulate: Callable[[int], tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        check_least(self, levels=1)

    def updates(self, model: LatentVariableModel, batch: Batch) -> Iterator[Update]:
        if batch.z is not None:
            pairs = Fantasies(batch.x, batch.z, None)
        elif self.simulate is None:
            pairs = model.fantasise(len(batch.x))
        else:
            with torch.no_grad():
                z, x = self.simulate(len(batch.x))
            pairs = Fantasies(x.to(batch.x), z.to(batch.x), None)
        loss = sleep_loss(model, pairs, self.levels)
        yield Update(("posterior", "classifier"), loss, {"sleep": loss})


@dataclass(frozen=True)
class Dreaming(DataObjective):
    """An objective on data that may take the sleep term beside it, in one update.

        wake loss of x − sleep_weight · E_p(z) E_p(x|z) E_r(a|z)[ log q(z, a | x) − log r(a | z) ]

    Losses are (B,): several fantasies for an example are averaged. Examples whose label is known bring none.

    Args:
        sleep_weight: weight of the sleep term; 0 leaves it out.
        levels: terms of the chain drawn per example; all if None.
        fantasies: how many for each example of data.

    Source: Piriyakulkij et al., AAAI 2025, where the two alternate (`WakeSleep`).
    """

    sleep_weight: float = field(default=0.0, kw_only=True)
    levels: int | None = field(default=None, kw_only=True)
    fantasies: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        check_least(self, levels=1, fantasies=1)

    @abc.abstractmethod
    def wake_loss(
        self, model: LatentVariableModel, x: Tensor, view: View, progress: float | Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `loss` gives without fantasies, of x (B, *event) as the posterior sees it."""

    def loss(
        self, model: LatentVariableModel, x: Tensor, label: Tensor | None = None, progress: float | Tensor = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        count = len(x)
        asleep = model.fantasise(self.fantasies * count) if self.sleep_weight > 0 and label is None else None
        # Data and fantasies go through the encoder together.
        features = model.posterior.encode(x if asleep is None else torch.cat([x, asleep.x]))
        loss, terms = self.wake_loss(model, x, model.view_of(features[:count], label), progress)
        if asleep is None:
            return loss, terms
        sleep = sleep_loss(model, asleep, self.levels, features[count:]).view(-1, count).mean(0)
        return loss + self.sleep_weight * sleep, {**terms, "sleep": sleep}
