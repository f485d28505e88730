"""From data as stored to observations as modelled: binarised, dequantised, standardised.

Each is a module, so that its constants are kept with the weights, and works on whole batches on the device. What is
random draws from torch's global state, which training and evaluation seed.
"""

from __future__ import annotations

import abc
from typing import final

import torch
from torch import Tensor, nn

from ddvi.randomness import draw


class Preprocessing(nn.Module, abc.ABC):
    """Raw data (B, *event) to observations (B, *event)."""

    @abc.abstractmethod
    def forward(self, raw: Tensor) -> Tensor:
        """The observation that the model sees."""

    @abc.abstractmethod
    def picture(self, raw: Tensor) -> Tensor:
        """The data without randomness, on the scale of the likelihood's mean."""

    @abc.abstractmethod
    def restore(self, x: Tensor) -> Tensor:
        """Observations back in the data's own units; grey values and colours stay in [0, 1]."""

    def white(self, maximum: float) -> float:
        """Which value of a restored image stands for 1.0, where `maximum` does in those that are stored."""
        return 1.0

    @property
    def log_volume(self) -> float:
        """log |det d restore(x) / dx|: log p of the restored x is log p(x) less this, in nats."""
        return 0.0


@final
class Binarise(Preprocessing):
    """Grey values 0 … maximum as probabilities of a one, drawn afresh at each pass."""

    maximum: Tensor

    def __init__(self, maximum: float) -> None:
        super().__init__()
        self.register_buffer("maximum", torch.tensor(float(maximum)))

    def forward(self, raw: Tensor) -> Tensor:
        grey = self.picture(raw)
        return (draw(torch.rand, grey.shape, 0, dtype=grey.dtype, device=grey.device) < grey).to(grey.dtype)

    def picture(self, raw: Tensor) -> Tensor:
        return raw / self.maximum

    def restore(self, x: Tensor) -> Tensor:
        return x


@final
class Dequantise(Preprocessing):
    """Integers 0 … maximum made continuous on [0, 1] by uniform noise, afresh at each pass (Theis et al. 2016)."""

    def __init__(self, maximum: float) -> None:
        super().__init__()
        self.levels: int = int(maximum) + 1

    def forward(self, raw: Tensor) -> Tensor:
        noise = draw(torch.rand, raw.shape, 0, dtype=torch.get_default_dtype(), device=raw.device)
        return (raw + noise) / self.levels

    def picture(self, raw: Tensor) -> Tensor:
        return (raw + 0.5) / self.levels

    def restore(self, x: Tensor) -> Tensor:
        return x


@final
class Standardise(Preprocessing):
    """Each feature shifted and scaled; to mean 0 and standard deviation 1 on the data that `fit` was given."""

    mean: Tensor
    scale: Tensor

    def __init__(self, event_shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(event_shape))
        self.register_buffer("scale", torch.ones(event_shape))

    def fit(self, train_x: Tensor) -> None:
        """Take the constants from training data (N, *event)."""
        data = train_x.to(torch.float64)
        scale = data.std(0, correction=0)
        self.mean.copy_(data.mean(0))
        # Pixels of images may be constant; a run refuses features of tables that are, see `data.check_varied`.
        self.scale.copy_(torch.where(scale > 0, scale, 1.0))

    def forward(self, raw: Tensor) -> Tensor:
        return (raw - self.mean) / self.scale

    def picture(self, raw: Tensor) -> Tensor:
        return self(raw)

    def restore(self, x: Tensor) -> Tensor:
        return x * self.scale + self.mean

    @property
    def log_volume(self) -> float:
        return self.scale.cpu().double().log().sum().item()


@final
class AsIs(Preprocessing):
    """Binary data, counts and categories, as floating-point numbers."""

    def forward(self, raw: Tensor) -> Tensor:
        return raw.to(torch.get_default_dtype())

    def picture(self, raw: Tensor) -> Tensor:
        return self(raw)

    def restore(self, x: Tensor) -> Tensor:
        return x

    def white(self, maximum: float) -> float:
        return maximum
