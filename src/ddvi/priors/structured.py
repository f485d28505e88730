"""Structured priors p(z), in labelled parts, p(z) = (1/C) Σ_l p(z|l).

A structured prior is a thin set, widened: a point of a curve t ↦ c(t), plus Gaussian noise of deviation `width`. Its
density is an integral along the curve, which Gauss–Legendre quadrature, in panels that are short beside `width`,
turns into a finite mixture that is exact to rounding; a straight segment has its integral in closed form.

    p(z|l) = ∫ p(t|l) N(z; c(t), width² I) dt = Σ_j w_j N(z; c(t_j), width² I)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.special import log_ndtr

from ddvi.errors import InputError
from ddvi.mixtures import Neighbourhoods, Nodes, log_mixture
from ddvi.priors.base import Prior

_FARTHEST = -1e18  # in widths: the square of what lies further is infinite in single precision


class _Structured(Prior):
    """Checked arguments, and constants that are exact in every precision."""

    smallest_size: ClassVar[int] = 2
    default_width: ClassVar[float] = 0.0

    def __init__(self, latent_size: int = 2, parts: int = 10, width: float | None = None):
        name = type(self).__name__
        for what, given, least in (("latent_size", latent_size, self.smallest_size), ("parts", parts, 1)):
            if not isinstance(given, int) or given < least:
                raise InputError(f"{what}={given!r} is impossible for {name}; give an integer, {least} or more")
        if width is not None and not 1e-4 <= width < math.inf:
            raise InputError(f"width={width!r} is impossible for {name}; give a finite number, 1e-4 or more")
        super().__init__(latent_size, parts)
        self.count = parts
        self.width: float = self.default_width if width is None else float(width)
        self._rounded: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    @property
    def recipe(self) -> tuple[Any, ...] | None:
        if type(self).__module__ != __name__:  # another's class may say anything
            return None
        width = None if self.width == self.default_width else self.width
        return type(self), *self.event_shape, self.count, width

    def _tabulate(self) -> tuple[Tensor, ...]:
        """The constants of the density, in float64."""
        return ()

    def _constants(self, like: Tensor) -> tuple[Tensor, ...]:
        """The constants, rounded once to the precision of `like` and kept on its device."""
        key = (like.device, like.dtype)
        if key not in self._rounded:
            with torch.inference_mode(False), torch.device("cpu"):  # whatever mode the first call is in
                self._rounded[key] = tuple(constant.to(like.dtype).to(like.device) for constant in self._tabulate())
        return self._rounded[key]


def _log_normal(x: Tensor, scale: float) -> Tensor:
    """log N(x; 0, scale²), entry by entry."""
    return -0.5 * (x / scale).square() - math.log(scale * math.sqrt(2 * math.pi))


class _Curve(_Structured):
    """A curve c(t) for each label in the first two coordinates, convolved with N(0, width² I) in all of them."""

    noise: Callable[..., Tensor]  # torch.rand or torch.randn, of which t is made
    limits: tuple[float, float]  # of that noise, beyond which nothing counts
    _position: Callable[[Tensor, Tensor], Tensor]  # label, noise ↦ t, of the law p(t|l)
    _log_speed: Callable[[Tensor], Tensor]  # t ↦ log p(t|l) within part l
    _point: Callable[[Tensor, Tensor], Tensor]  # t, label ↦ c(t), (*, 2)

    def _tabulate(self) -> tuple[Tensor, ...]:
        """Nodes x, y in units of √2 width, and log-weights, all of shape (C, M)."""
        label = torch.arange(self.count).unsqueeze(-1)
        start, stop = self._position(label, torch.tensor(self.limits, dtype=torch.float64)).split(1, -1)
        grid = start + (stop - start) * torch.linspace(0, 1, 4001, dtype=torch.float64)
        arc = nn.functional.pad(self._point(grid, label).diff(dim=1).norm(dim=-1).cumsum(-1), (1, 0)).numpy()
        panels = math.ceil(arc.max() / (2 * self.width))  # one number for all labels makes their nodes one array
        edges = [np.interp(np.linspace(0, a[-1], panels + 1), a, t) for a, t in zip(arc, grid.numpy(), strict=True)]
        offset, weight = np.polynomial.legendre.leggauss(8)
        half = np.diff(edges)[..., None] / 2
        t = torch.from_numpy((np.array(edges)[:, :-1, None] + half * (1 + offset)).reshape(self.count, -1))
        log_weight = torch.from_numpy((half * weight).reshape(self.count, -1)).log() + self._log_speed(t)
        x, y = (self._point(t, label) / (self.width * math.sqrt(2))).unbind(-1)
        return x.contiguous(), y.contiguous(), log_weight

    def _draw(self, shape: torch.Size, label: Tensor | None, options: dict[str, Any]) -> Tensor:
        label = torch.randint(self.count, shape, **options).long() if label is None else label
        z = self.width * torch.randn(*shape, *self.event_shape, **options)
        z[..., :2] += self._point(self._position(label, self.noise(shape, **options)), label)
        return z

    def _log_density(self, z: Tensor, label: Tensor | None) -> Tensor:
        place = z[:, :2] / (self.width * math.sqrt(2))
        # Elsewhere to wait for the sizes of blocks would cost more.
        near = None
        if label is None and z.device.type == "cpu" and self.recipe is not None:
            near = _neighbourhoods(type(self), self.count, self.width, z.dtype)
        blocks = Nodes(*self._constants(z)).blocks(len(z), label) if near is None else near.blocks(place)
        mixture = log_mixture(place, blocks)
        constant = math.log(2 * math.pi * self.width**2 * (self.count if label is None else 1))
        return mixture - constant + _log_normal(z[:, 2:], self.width).sum(-1)


@functools.lru_cache(maxsize=16)
def _neighbourhoods(kind: type[_Curve], parts: int, width: float, dtype: torch.dtype) -> Neighbourhoods | None:
    """Of a curve's nodes; None of a very narrow one, whose table would take longer than it saves."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        nodes = Nodes(*kind(2, parts, width)._tabulate())
        return Neighbourhoods(nodes, torch.empty(0, dtype=dtype)) if Neighbourhoods.affordable(nodes) else None


@final
class Pinwheel(_Curve):
    """C bent arms, one a label.

        u ~ N(1, 0.15²),    angle = 2πl/C + 0.25 exp(u),    z = u (cos angle, sin angle) + N(0, width² I)

    Entries of z beyond the first two are N(0, width²).

    Args:
        latent_size: D, 2 or more.
        parts: C.
        width: standard deviation of the noise, 1e-4 or more; None is 0.03.

    Raises:
        InputError: an argument is out of its range.

    Source: Johnson et al., Composing Graphical Models with Neural Networks, 2016.

    Example:
        >>> Pinwheel(latent_size=3).sample((10,)).shape
        torch.Size([10, 3])
    """

    default_width: ClassVar[float] = 0.03
    noise: Callable[..., Tensor] = torch.randn
    limits: tuple[float, float] = (-8.0, 8.0)

    def _position(self, label: Tensor, noise: Tensor) -> Tensor:
        return 1 + 0.15 * noise + 0 * label

    def _log_speed(self, t: Tensor) -> Tensor:
        return _log_normal(t - 1, 0.15)

    def _point(self, t: Tensor, label: Tensor) -> Tensor:
        angle = 2 * math.pi * label.to(t.dtype) / self.count + 0.25 * t.exp()
        return torch.stack([t * angle.cos(), t * angle.sin()], -1)


@final
class SwissRoll(_Curve):
    """A spiral from the centre outwards; label l has u in [l/C, (l+1)/C).

        u ~ U(0, 1),    radius = 3√u,    angle = 4.5π√u,    z = radius (cos angle, sin angle) + N(0, width² I)

    Entries of z beyond the first two are N(0, width²).

    Args:
        latent_size: D, 2 or more.
        parts: C.
        width: standard deviation of the noise, 1e-4 or more; None is 0.05.

    Raises:
        InputError: an argument is out of its range.

    Source: Makhzani et al., Adversarial Autoencoders, 2015.

    Example:
        >>> z = SwissRoll().sample((1000,), torch.tensor(0))  # the innermost tenth
        >>> bool((z.norm(dim=-1) < 1.3).all())
        True
    """

    default_width: ClassVar[float] = 0.05
    noise: Callable[..., Tensor] = torch.rand
    limits: tuple[float, float] = (0.0, 1.0)

    def _position(self, label: Tensor, noise: Tensor) -> Tensor:
        return ((label + noise) / self.count).sqrt()  # t = √u, of density 2t, in which the curve is smooth

    def _log_speed(self, t: Tensor) -> Tensor:
        return (2 * self.count * t).log()

    def _point(self, t: Tensor, label: Tensor) -> Tensor:
        angle = 4.5 * math.pi * t
        return 3 * torch.stack([t * angle.cos(), t * angle.sin()], -1)


@final
class LessNoisySquare(_Structured):
    """The perimeter of [−1, 1]², uniformly, widened; label l is the l-th of C parts, clockwise from (−1, 1).

        z = c(t) + N(0, width² I),    t ~ U    along the perimeter c

    D > 2: without a label one coordinate, chosen at random, is uniform on [−1, 1], the others ±1; with one it is the
    square in the first two, N(0, width²) in the others. So parts make up p(z) for D = 2 only.

    Args:
        latent_size: D, 2 or more.
        parts: C.
        width: standard deviation of the noise, 1e-4 or more; None is 0.06.

    Raises:
        InputError: an argument is out of its range.

    Source: Piriyakulkij et al., AAAI 2025.

    Example:
        >>> LessNoisySquare().log_prob(torch.zeros(2)) < LessNoisySquare().log_prob(torch.ones(2))
        tensor(True)
    """

    default_width: ClassVar[float] = 0.06

    def _tabulate(self) -> tuple[Tensor, ...]:
        """Direction (x, y) of each side (4,), at 1 along its normal (−y, x); segment of each part on it (C, 4)."""
        x, y = torch.tensor([[1, 0, -1, 0], [0, -1, 0, 1]], dtype=torch.float64)
        corner = 2 * torch.arange(4, dtype=torch.float64)  # in arc length
        border = 8 * torch.arange(self.count + 1, dtype=torch.float64).unsqueeze(-1) / self.count
        start, stop = torch.maximum(border[:-1], corner), torch.minimum(border[1:], corner + 2)
        half = torch.where(start < stop, (stop - start) / 2, 1.0)  # a part not on this side has log density −∞ there
        return x, y, (start + stop) / 2 - corner - 1, half, (start < stop).double().log() + math.log(self.count / 8)

    def _draw(self, shape: torch.Size, label: Tensor | None, options: dict[str, Any]) -> Tensor:
        (size,) = self.event_shape
        z = self.width * torch.randn(*shape, size, **options)
        if label is None:
            corner = 2 * torch.randint(2, (*shape, size), **options) - 1
            edge = nn.functional.one_hot(torch.randint(size, shape, **options).long(), size).bool()
            return z + torch.where(edge, 2 * torch.rand(*shape, 1, **options) - 1, corner)
        arc = 8 * (label + torch.rand(shape, **options)) / self.count
        side = (arc / 2).long().clamp(max=3)
        x, y = (constant[side] for constant in self._constants(z)[:2])
        along = arc - 2 * side - 1
        z[..., :2] += torch.stack([along * x - y, along * y + x], -1)
        return z

    def _log_density(self, z: Tensor, label: Tensor | None) -> Tensor:
        if label is None:
            distance = z.abs()
            log_edge = self._log_box(distance, 1.0) - math.log(2)
            other_side = nn.functional.softplus(distance * (-2 / self.width**2))
            log_corner = _log_normal(distance - 1, self.width) + other_side - math.log(2)
            return (log_edge - log_corner).logsumexp(-1) + log_corner.sum(-1) - math.log(z.shape[-1])
        x, y, *segments = self._constants(z)
        centre, half, log_height = (constant[label] for constant in segments)
        along, across = z[:, :1] * x + z[:, 1:2] * y - centre, z[:, 1:2] * x - z[:, :1] * y - 1
        terms = self._log_box(along.abs(), half) + _log_normal(across, self.width) + log_height
        return terms.logsumexp(-1) + _log_normal(z[:, 2:], self.width).sum(-1)

    def _log_box(self, distance: Tensor, half: Tensor | float) -> Tensor:
        """log[Φ((h − d)/width) − Φ((−h − d)/width)] for d ≥ 0: where it is small both arguments are negative."""
        upper, lower = (_log_ndtr((side - distance) / self.width) for side in (half, -half))
        # The ratio never exceeds this, but far out rounding would make it 1.
        log_ratio = torch.minimum(lower - upper, distance * half * (-2 / self.width**2))
        return upper + torch.log(-torch.expm1(log_ratio))


def _log_ndtr(x: Tensor) -> Tensor:
    """log Φ(x), finite as far out as single precision allows."""
    value: Any = _LogNormalCDF.apply(x.clamp_min(_FARTHEST))
    return value


class _LogNormalCDF(torch.autograd.Function):
    """Torch's own gradient of log Φ is φ(x)/Φ(x) by a difference of logs, of which nothing is left far out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return log_ndtr(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return grads[0] * math.sqrt(2 / math.pi) / torch.special.erfcx(x * -math.sqrt(0.5))


@final
class StandardGaussian(_Structured):
    """N(0, I), or N(0, (1 + width²) I) if a width is given; the same for every label.

    Args:
        latent_size: D, 1 or more.
        parts: C.
        width: standard deviation of the noise, 1e-4 or more; None is none.

    Raises:
        InputError: an argument is out of its range.

    Example:
        >>> f"{StandardGaussian(latent_size=1).log_prob(torch.zeros(1)):.4f}"
        '-0.9189'
    """

    smallest_size = 1

    def _draw(self, shape: torch.Size, label: Tensor | None, options: dict[str, Any]) -> Tensor:
        return math.hypot(1.0, self.width) * torch.randn(*shape, *self.event_shape, **options)

    def _log_density(self, z: Tensor, label: Tensor | None) -> Tensor:
        return _log_normal(z, math.hypot(1.0, self.width)).sum(-1)


@final
class GaussianMixture(_Structured):
    """C Gaussians on a circle; label l has centre 1.4 e, e = (cos 2πl/C, sin 2πl/C).

        p(z | l) = N( 1.4 e, 0.5² e eᵀ + 0.1² (I − e eᵀ) + width² I )

    Its entries of z beyond the first two have standard deviation 0.1.

    Args:
        latent_size: D, 2 or more.
        parts: C.
        width: standard deviation of the noise, 1e-4 or more; None is none.

    Raises:
        InputError: an argument is out of its range.

    Source: Makhzani et al., Adversarial Autoencoders, 2015.

    Example:
        >>> GaussianMixture(parts=3).log_prob(torch.zeros(4, 2)).shape
        torch.Size([4])
    """

    def _tabulate(self) -> tuple[Tensor, ...]:
        angle = torch.arange(self.count, dtype=torch.float64) * (2 * math.pi / self.count)
        return angle.cos(), angle.sin()

    def _draw(self, shape: torch.Size, label: Tensor | None, options: dict[str, Any]) -> Tensor:
        label = torch.randint(self.count, shape, **options).long() if label is None else label
        z = math.hypot(0.1, self.width) * torch.randn(*shape, *self.event_shape, **options)
        x, y = (constant[label] for constant in self._constants(z))
        along = 1.4 + math.hypot(0.5, self.width) * torch.randn(shape, **options)
        z[..., :2] = torch.stack([along * x - z[..., 1] * y, along * y + z[..., 1] * x], -1)
        return z

    def _log_density(self, z: Tensor, label: Tensor | None) -> Tensor:
        wide, narrow = math.hypot(0.5, self.width), math.hypot(0.1, self.width)
        x, y = (constant if label is None else constant[label, None] for constant in self._constants(z))
        along, across = z[:, :1] * x + z[:, 1:2] * y, z[:, 1:2] * x - z[:, :1] * y
        terms = _log_normal(along - 1.4, wide) + _log_normal(across, narrow)
        mixture = terms.logsumexp(-1) - (math.log(self.count) if label is None else 0)
        return mixture + _log_normal(z[:, 2:], narrow).sum(-1)
