"""Networks: encoders from an observation to features, decoders from a latent to parameters, and the denoiser."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddvi.errors import InputError
from ddvi.fusing import fusible
from ddvi.randomness import draw

_CHANNELS = (16, 32, 64, 128)  # of convolutions, from the image on


class Given(nn.Module):
    """An encoder that is shown features (B, out_features) instead of observations."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def check_encoder(encoder: nn.Module | None) -> None:
    """Refuse an encoder that doesn't say how many features it gives."""
    if encoder is not None and not isinstance(getattr(encoder, "out_features", None), int):
        raise InputError(f"{type(encoder).__name__} has no out_features; set it to how many features it gives")


class Linear(nn.Linear):
    """A linear layer that adds its bias afterwards on CUDA, where products of few rows take longer with it."""

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_cuda:
            return super().forward(input)
        return nn.functional.linear(input, self.weight).add_(self.bias)


def mlp(features: int, hidden: tuple[int, ...], out: int | None = None, dropout: float = 0.0) -> nn.Sequential:
    """Fully connected leaky-ReLU layers, and a linear one at the end where `out` is given."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [Linear(features, size), nn.LeakyReLU(inplace=True)]
        if dropout > 0:
            layers.append(Dropout(dropout))
        features = size
    if out is not None:
        layers.append(Linear(features, out))
    return nn.Sequential(*layers)


class Dropout(nn.Module):
    """In training, entries set to zero with a probability and the others scaled up, so that the mean stays.

    What `torch.nn.Dropout` does, at a fifth of its cost on a CPU, where random numbers take most of it: an entry takes
    16 bits here, which round the probability to a multiple of 2^-16.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.dropped: int = round(probability * 2**16)

    def forward(self, h: Tensor) -> Tensor:
        if not self.training:
            return h
        return _thinned(h, draw(_random_bits, h.shape, -2, device=h.device), self.dropped)


@fusible
def _thinned(h: Tensor, bits: Tensor, dropped: int) -> Tensor:
    """Entries whose bits are below a share of 2^-16 · dropped set to zero, the others scaled up."""
    uniform = bits.to(h.dtype)
    # Integers: 1 from `dropped` on, 0 below. A comparison would be slower, and its result have to be converted.
    kept = uniform.sub_(dropped - 2**15 - 1).clamp_(0, 1)
    return h * kept.mul_(2**16 / (2**16 - dropped))


def _random_bits(shape: Sequence[int], device: torch.device) -> Tensor:
    """16 of them in each entry."""
    count = math.prod(shape)
    bits = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
    return bits.view(torch.int16)[:count].view(shape)


class DenseEncoder(nn.Module):
    """Observation (B, *event), flattened, to features (B, hidden_size).

    Args:
        in_features: entries of an observation, once flattened.
        hidden_size: width of the two layers.
        dropout: probability that a hidden unit is dropped in training.
    """

    def __init__(self, in_features: int, hidden_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.out_features = hidden_size
        self.layers: nn.Sequential = mlp(in_features, (hidden_size, hidden_size), dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))


class DenseDecoder(nn.Module):
    """Latent (*, D) to one parameter per entry of the observation (*, *event)."""

    def __init__(self, latent_size: int, event_shape: torch.Size, hidden_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.event_shape = event_shape
        self.layers: nn.Sequential = mlp(latent_size, (hidden_size, hidden_size), math.prod(event_shape), dropout)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z).unflatten(-1, self.event_shape)


class Logarithm(nn.Module):
    """Counts x to log(1 + x), for encoders."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log1p(x)


class OneHot(nn.Module):
    """Categories (B, *event) to indicators (B, *event, categories), for encoders."""

    def __init__(self, categories: int) -> None:
        super().__init__()
        self.categories = categories

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(x.long(), self.categories).to(x.dtype)


class TransformedEncoder(nn.Module):
    """An encoder that sees a fixed transform of the observation."""

    def __init__(self, transform: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.out_features: int = int(encoder.out_features)  # type: ignore[arg-type]
        self.transform = transform
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.transform(x))


class ConvolutionalEncoder(nn.Module):
    """Image (B, channels, height, width), sides divisible by 8, to features (B, hidden_size).

    Four convolutions with strides 1, 2, 2, 2. Group normalisation rather than batch normalisation: an example's loss
    must not depend on what else is in the batch, nor a bound on the running statistics of fantasies.
    """

    def __init__(self, event_shape: torch.Size, hidden_size: int) -> None:
        super().__init__()
        depth, height, width = _image_shape(event_shape)
        self.out_features = hidden_size
        layers: list[nn.Module] = []
        for index, size in enumerate(_CHANNELS):
            stride = 1 if index == 0 else 2
            layers += [nn.Conv2d(depth, size, 3, stride, 1), nn.GroupNorm(8, size), nn.LeakyReLU(inplace=True)]
            depth = size
        self.convolutions: nn.Sequential = nn.Sequential(*layers)
        self.dense: nn.Sequential = mlp(depth * (height // 8) * (width // 8), (hidden_size,))

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.convolutions(x).flatten(1))


class ConvolutionalDecoder(nn.Module):
    """Latent (*, D) to one parameter per pixel value (*, channels, height, width): four transposed convolutions."""

    def __init__(self, latent_size: int, event_shape: torch.Size, hidden_size: int) -> None:
        super().__init__()
        self.event_shape = event_shape
        depth, height, width = _image_shape(event_shape)
        channels = _CHANNELS[::-1]
        self.dense: nn.Sequential = mlp(latent_size, (hidden_size, channels[0] * (height // 8) * (width // 8)))
        self.unflatten: nn.Unflatten = nn.Unflatten(-1, (channels[0], height // 8, width // 8))
        layers: list[nn.Module] = []
        for size, following in itertools.pairwise(channels):
            layers += [
                nn.ConvTranspose2d(size, following, 4, 2, 1),
                nn.GroupNorm(8, following),
                nn.LeakyReLU(inplace=True),
            ]
        self.convolutions: nn.Sequential = nn.Sequential(*layers, nn.ConvTranspose2d(channels[-1], depth, 3, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        images = self.unflatten(self.dense(z)).flatten(0, -4)
        return self.convolutions(images).unflatten(0, z.shape[:-1])


def _image_shape(event_shape: torch.Size) -> tuple[int, int, int]:
    if len(event_shape) != 3 or event_shape[1] % 8 or event_shape[2] % 8:
        raise InputError(
            f"convolutions need images of channels × height × width with sides divisible by 8, not"
            f" {tuple(event_shape)}; use network=dense"
        )
    return event_shape[0], event_shape[1], event_shape[2]


class Denoiser(nn.Module):
    """z_t, t and context to corrections of the prediction of z_0; zero at initialisation.

    Each layer adds an embedding of t, the first one a projection of the context as well. Both are computed once per
    step or per example, not once per draw.

    Args:
        inputs: features per draw (z_t and whatever is known about it).
        outputs: number of corrections.
        context_size: size of the context c(x).
        steps: T.
        hidden_size: width of the layers.
        layers: number of hidden layers.
    """

    def __init__(
        self, inputs: int, outputs: int, context_size: int, steps: int, hidden_size: int = 128, layers: int = 3
    ) -> None:
        super().__init__()
        self.steps = steps
        self.entrance: nn.Linear = nn.Linear(inputs, hidden_size)
        self.context: nn.Linear = nn.Linear(context_size, hidden_size, bias=False)
        self.hidden: nn.ModuleList = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(layers - 1))
        self.time: nn.Parameter = nn.Parameter(torch.randn(layers, steps, hidden_size) * 0.1)
        self.exit: nn.Linear = nn.Linear(hidden_size, outputs)
        nn.init.zeros_(self.exit.weight)
        nn.init.zeros_(self.exit.bias)

    def biases(self, t: Tensor | slice) -> list[Tensor]:
        """The bias of each hidden layer at levels t (*), integers 1 … T or a slice of them: (*, hidden_size)."""
        layers = [self.entrance, *self.hidden]
        tables = [time + layer.bias for layer, time in zip(layers, self.time, strict=True)]
        if isinstance(t, slice):
            return [table[t.start - 1 : t.stop - 1] for table in tables]
        return [nn.functional.embedding(t - 1, table) for table in tables]

    def forward(self, inputs: Tensor, biases: Sequence[Tensor], context: Tensor) -> Tensor:
        """Corrections for inputs (*S, B, ·).

        Args:
            inputs: what is known about each draw.
            biases: from `biases`, broadcastable to (*S, B, hidden_size).
            context: (B, hidden_size), from `self.context`.
        """
        h = _silu(_product(inputs, self.entrance.weight).add_(biases[0] + context))
        hidden: Any = self.hidden
        for layer, bias in zip(hidden, biases[1:], strict=True):
            h = _silu(_affine(h, layer.weight, bias))
        return _product(h, self.exit.weight).add_(self.exit.bias)


def _product(h: Tensor, weight: Tensor) -> Tensor:
    """h Wᵀ, where W has few rows or columns.

    For a few draws on a GPU a library's product takes longer than sums that are fused with what comes before and after;
    where these have to be differentiated, over many draws, it is the other way round.
    """
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return (h.unsqueeze(-2) * weight).sum(-1)
    return nn.functional.linear(h, weight)


def _affine(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer whose bias may differ between rows; added in place, as memory traffic is what it costs."""
    if bias.dim() == 1:
        return nn.functional.linear(h, weight, bias)
    return nn.functional.linear(h, weight).add_(bias)


def _silu(h: Tensor) -> Tensor:
    """h · sigmoid(h), in place where nothing is to be differentiated."""
    return nn.functional.silu(h, inplace=not h.requires_grad)
