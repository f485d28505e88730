"""What a prior p(z) can do: draw, and give the exact density of what it draws."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ddvi.errors import InputError
from ddvi.randomness import generator

_DRAWS = 10_000


@torch.no_grad()
def moments(prior: Prior) -> tuple[Tensor, Tensor]:
    """A prior's mean and standard deviations, (D,) each, by 10,000 draws that are the same each time."""
    draws = prior.sample((_DRAWS,), generator=generator(0, "spread"))
    return draws.mean(0), draws.std(0)


class Prior(nn.Module, abc.ABC):
    """A distribution over latent vectors of D entries; a subclass gives `_draw` and `_log_density`.

        p(z) = (1/C) Σ_l p(z | l)    where there are label parts

    `event_shape` is (D,); `parts` is the number C of label parts, or None; labels are integers in 0 … C − 1, and
    `log_prob` checks that on the CPU only, where it waits for no device. `.to(device, dtype)` says where and in what
    precision `sample` draws; `log_prob` answers in the precision of z, at least float32.

    Args:
        latent_size: D.
        parts: C, or None.

    Example:
        >>> prior = ddvi.Pinwheel(parts=5)
        >>> z = prior.sample((10,), label=torch.tensor(3))
        >>> prior.log_prob(z).shape, prior.log_prob(z, torch.arange(5)[:, None]).shape
        (torch.Size([10]), torch.Size([5, 10]))
    """

    _anchor: Tensor

    def __init__(self, latent_size: int, parts: int | None):
        super().__init__()
        self.event_shape: torch.Size = torch.Size([latent_size])
        self.parts = parts
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)  # knows the device and dtype of samples

    @property
    def recipe(self) -> tuple[Any, ...] | None:
        """Class and arguments that make a prior of the same law, where these say all of it, or None.

        What is tabulated of such a law is kept for the next one.
        """
        return None

    def sample(
        self, sample_shape: Sequence[int] = (), label: Tensor | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Draw z ~ p(z), or z ~ p(z|l), of shape `(*sample_shape, D)`; labels broadcast to `sample_shape`.

        Raises:
            InputError: the label isn't of integers in range, or doesn't broadcast. On CUDA, where to look at it would
                wait for the device, one out of range fails there.
        """
        shape, anchor = torch.Size(sample_shape), self._anchor
        label = None if label is None else self._checked(label, shape, sampling=True).to(anchor.device)
        return self._draw(shape, label, {"generator": generator, "device": anchor.device, "dtype": anchor.dtype})

    def log_prob(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """log p(z), or log p(z|l), in nats, for z `(*, D)`; of shape `(*)` broadcast with the label's.

        Raises:
            InputError: z doesn't end in D floating-point entries, or the label isn't of integers in range.
        """
        (size,) = self.event_shape
        if z.ndim == 0 or z.shape[-1] != size or not z.is_floating_point():
            given = f"z is {z.dtype} of shape {tuple(z.shape)}, but {type(self).__name__} takes"
            raise InputError(f"{given} floating-point vectors of {size}; give it the latent_size of z")
        if label is not None:
            label = self._checked(label, z.shape[:-1], sampling=False)
            z, label = z.expand(*label.shape, size), label.reshape(-1)
        rows = z.reshape(-1, size).to(torch.promote_types(z.dtype, torch.float32))
        return self._log_density(rows, label).reshape(z.shape[:-1])

    def _checked(self, label: Tensor, shape: torch.Size, sampling: bool) -> Tensor:
        """`label`, found sound, expanded to `shape`, or where densities are asked broadcast with it."""
        name, given = type(self).__name__, getattr(label, "dtype", type(label).__name__)
        if self.parts is None:
            raise InputError(f"a label was given, but this {name} has no label parts; leave the label out")
        if given not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise InputError(f"label is of {given}, but {name} takes a tensor of integers; convert it with .long()")
        if label.is_cuda:  # an error there ends the process, but to look at it would wait for the device
            torch._assert_async(((label >= 0) & (label < self.parts)).all(), f"labels are 0 … {self.parts - 1}")
        elif (sampling or label.device.type == "cpu") and label.numel():
            low, high = (bound.item() for bound in label.aminmax())
            if low < 0 or high >= self.parts:
                given = f"labels run from {low} to {high}, but those of this {name} from 0 to {self.parts - 1}"
                raise InputError(f"{given}; give `parts` the number of classes")
        try:
            return label.long().expand(shape if sampling else torch.broadcast_shapes(shape, label.shape))
        except RuntimeError:
            given = f"{tuple(label.shape)} labels don't broadcast to {tuple(shape)}"
            raise InputError(f"{given}; give one for each latent, or one for all") from None

    @abc.abstractmethod
    def _draw(self, shape: torch.Size, label: Tensor | None, options: dict[str, Any]) -> Tensor:
        """`(*shape, D)` for a label of that shape; `options` are generator, device and dtype for `torch.randn`."""

    @abc.abstractmethod
    def _log_density(self, z: Tensor, label: Tensor | None) -> Tensor:
        """`(N,)` for z `(N, D)` and a label `(N,)`."""
