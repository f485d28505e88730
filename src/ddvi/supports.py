"""Latents of any shape in a constrained space (positive, an interval, a simplex), on R^D.

    z = T(s u + m),    log p(u) = log p(z) + log |det ∂z/∂u|

T is the bijection that torch.distributions.biject_to has for the support: exp for positive numbers, a sigmoid for an
interval, stick-breaking for a simplex, whose K entries have K − 1 numbers u and whose density is that of the first
K − 1. Location m and scale s make the prior about standard, as a chain of noise from N(0, I) wants it.

Source: Kucukelbir et al., Automatic Differentiation Variational Inference, 2017.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, final

import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint

from ddvi.errors import InputError
from ddvi.priors.own import check_source
from ddvi.randomness import preserved, seeded

_FARTHEST = 80.0  # from 0, where single precision still has exp and its inverse
_DRAWS = 4096  # of the prior, for location and scale
_STANDARD = 0.15  # a prior whose location is within this of 0 and its scale of 1 is left as it is


class Section(NamedTuple):
    """A part of the latents: its support, a torch constraint, and its shape.

    Example:
        >>> Section(constraints.positive, torch.Size([3])).shape.numel()
        3
    """

    support: Constraint
    shape: torch.Size


@final
class Product(nn.Module):
    """Independent latents, side by side in one vector: p(z) = Π_i p_i(z_i).

    A prior whose parts may have different supports and shapes; z is (*, D) with each part flattened.

    Args:
        factors: distributions, or objects with `sample` and `log_prob` and perhaps a `support`, each over one latent.

    Raises:
        InputError: there is no factor, or one is a batch of distributions.

    Source: torch.distributions.constraints.cat does the like for supports, but not where a dimension changes.

    Example:
        >>> from torch.distributions import Dirichlet, Gamma
        >>> prior = Product(Gamma(2.0, 1.0), Dirichlet(torch.ones(3)))
        >>> rate, weights = prior.split(prior.sample((5,)))
        >>> rate.shape, weights.shape
        (torch.Size([5]), torch.Size([5, 3]))
    """

    def __init__(self, *factors: Any) -> None:
        super().__init__()
        if not factors:
            raise InputError("a product has at least one factor; give distributions, one for each latent")
        factors = tuple(
            part for factor in factors for part in (factor.factors if isinstance(factor, Product) else (factor,))
        )
        self.factors = factors
        for index, factor in enumerate(factors):
            if isinstance(factor, nn.Module):
                self.add_module(str(index), factor)
        self.sections: list[Section] = [section for factor in factors for section in sections(factor)]
        self.sizes: list[int] = [section.shape.numel() for section in self.sections]
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)  # knows the device of draws
        self._homes: list[torch.device | None] = [_home(factor) for factor in factors]

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """z (*sample_shape, D)."""
        shape = torch.Size(sample_shape)
        draws = (factor.sample(shape).to(self._anchor.device) for factor in self.factors)
        return torch.cat([draw.reshape(*shape, -1) for draw in draws], -1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Σ_i log p_i(z_i) of z (*, D): (*), in nats."""
        parts = zip(self.factors, self.split(z), self._homes, strict=True)
        return torch.stack([factor.log_prob(part.to(home)).to(z.device) for factor, part, home in parts]).sum(0)

    def split(self, z: Tensor) -> tuple[Tensor, ...]:
        """The latents in z (*, D), each in its own shape (*, *event)."""
        parts = z.split(self.sizes, -1)
        return tuple(part.reshape(*z.shape[:-1], *s.shape) for part, s in zip(parts, self.sections, strict=True))


def _home(source: Any) -> torch.device | None:
    """Where a source of draws stays; None for a module, which moves."""
    if isinstance(source, nn.Module):
        return None
    with preserved():
        return source.sample(torch.Size()).device


def sections(prior: Any, support: Constraint | None = None) -> list[Section]:
    """What a prior's latents are made of.

    Args:
        prior: any object with `sample` and `log_prob`; its `support` says where latents live, R^D if it has none.
        support: to be taken instead.

    Raises:
        InputError: the prior is a batch of distributions, or its support isn't continuous.
    """
    check_source(prior, "latents")
    name = type(prior).__name__
    if isinstance(prior, Product) and support is None:
        return prior.sections
    with seeded(0), torch.no_grad():
        shape = prior.sample(torch.Size([2])).shape[1:]
    return [section(support or getattr(prior, "support", None), shape, name)]


def section(support: Constraint | None, shape: torch.Size, name: str) -> Section:
    """Latents of one shape (*latent) that have a support; None is all real numbers. `name` is theirs in messages.

    Raises:
        InputError: the support isn't continuous, or doesn't fit the shape.
    """
    support = support or constraints.real
    if support.is_discrete:
        raise InputError(f"{name} is discrete, but a diffusion needs continuous latents; sum discrete ones out")
    if support.event_dim > len(shape):
        raise InputError(
            f"{name} has latents of shape {tuple(shape)}, too few axes for {support}; give another support"
        )
    if support.event_dim < len(shape):
        support = constraints.independent(support, len(shape) - support.event_dim)
    return Section(support, shape)


@final
class Bijection(nn.Module):
    """From u (*, D) to latents z (*, *event), see the module.

    Args:
        parts: sections; more than one make up a vector.

    Raises:
        InputError: torch has no bijection onto a support.

    Example:
        >>> to_weights = Bijection([Section(constraints.simplex, torch.Size([3]))])
        >>> to_weights.size, to_weights(torch.zeros(5, 2)).shape
        (2, torch.Size([5, 3]))
    """

    location: Tensor
    scale: Tensor

    def __init__(self, parts: Sequence[Section]) -> None:
        super().__init__()
        self.parts: list[Section] = list(parts)
        self.transforms: list[Any] = []
        for support, _ in self.parts:
            try:
                self.transforms.append(biject_to(support))
            except NotImplementedError:
                raise InputError(f"torch has no bijection onto {support}; give support= another constraint") from None
        shapes = [t.inverse_shape(part.shape) for t, part in zip(self.transforms, self.parts, strict=True)]
        self.shapes: list[torch.Size] = [torch.Size(shape) for shape in shapes]
        self.sizes: list[int] = [shape.numel() for shape in self.shapes]
        self.widths: list[int] = [part.shape.numel() for part in self.parts]
        self.size: int = sum(self.sizes)
        """D."""
        self.event_shape: torch.Size = self.parts[0].shape if len(self.parts) == 1 else torch.Size([sum(self.widths)])
        self.register_buffer("location", torch.zeros(self.size))
        self.register_buffer("scale", torch.ones(self.size))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # The bounds of a support may be tensors.
        self.parts = [part._replace(support=_moved(part.support, fn)) for part in self.parts]
        self.transforms = [biject_to(part.support) for part in self.parts]
        return self

    @classmethod
    def of(cls, prior: Any, support: Constraint | None = None) -> Self:
        """That of a prior's support, with location and scale from draws of it."""
        bijection = cls(sections(prior, support))
        with seeded(0, "location and scale"), torch.no_grad():
            bijection.fit(prior.sample(torch.Size([_DRAWS])))
        return bijection

    @property
    def trivial(self) -> bool:
        """Whether it leaves vectors as they are."""
        real = all(isinstance(_base(part.support), type(constraints.real)) for part in self.parts)
        standard = bool((self.location == 0).all() and (self.scale == 1).all())
        return real and standard and len(self.event_shape) == 1

    def fit(self, z: Tensor) -> None:
        """Take location and scale from draws z (N, *event): medians, and half of what the middle 68% span."""
        draws = self.inverse(z.to(self.location))
        levels = draws.new_tensor([0.16, 0.5, 0.84])
        low, location, high = draws.quantile(levels, 0)
        scale = torch.where(high > low, (high - low) / 2, 1.0)
        if ((location.abs() < _STANDARD) & ((scale - 1).abs() < _STANDARD)).all():
            return
        self.location.copy_(location)
        self.scale.copy_(scale)

    def forward(self, u: Tensor) -> Tensor:
        """z (*, *event) of u (*, D)."""
        parts = zip(self.transforms, self._inner(u), self.widths, strict=True)
        flat = [transform(v).reshape(*u.shape[:-1], width) for transform, v, width in parts]
        return torch.cat(flat, -1).reshape(*u.shape[:-1], *self.event_shape)

    def inverse(self, z: Tensor) -> Tensor:
        """u (*, D) of z (*, *event)."""
        batch = self._batch(z)
        pairs = zip(self.transforms, self._split(z), strict=True)
        flat = torch.cat([transform.inv(part).reshape(*batch, -1) for transform, part in pairs], -1)
        return (flat - self.location) / self.scale

    def checked_inverse(self, z: Tensor, tolerated: float = 0.0) -> Tensor:
        """`inverse` of z (*, *event) of whatever device, all of which have one.

        Args:
            z: latents.
            tolerated: share of them that may lie on the edge of an interval or simplex, where u is as far out as
                torch goes: random numbers of single precision reach it now and then.

        Raises:
            InputError: some lie outside of the support, or on its edge, where u would be infinite.
        """
        self.check(z)
        z = z.to(self.location)
        u = self.inverse(z)
        infinite, edge = int((~u.isfinite().all(-1)).sum()), int((~self._inside(z)).sum())
        if infinite or edge > tolerated * u[..., 0].numel():
            at = max(infinite, edge)
            raise InputError(f"{at:,} latents lie on the edge of their support ({self._where}); move them inside")
        return u

    def _inside(self, z: Tensor) -> Tensor:
        """Which of z (*, *event) in the support lie on no edge of an interval or simplex: (*), of booleans."""
        checks = [_interior(part.support, value) for part, value in zip(self.parts, self._split(z), strict=True)]
        return torch.stack([check.reshape(*self._batch(z), -1).all(-1) for check in checks]).all(0)

    def check(self, z: Tensor) -> None:
        """Refuse z (*, *event) some of which lie outside of the support.

        Raises:
            InputError: some do.
        """
        if outside := int((~self.contains(z)).sum()):
            where = f"their support ({self._where})"
            raise InputError(f"{outside:,} latents lie outside of {where}; correct or leave them out")

    @property
    def _where(self) -> str:
        return ", ".join(str(part.support) for part in self.parts)

    def log_volume(self, u: Tensor) -> Tensor:
        """log |det ∂z/∂u| of u (*, D): (*)."""
        total = self.scale.log().sum().expand(u.shape[:-1])
        for transform, v in zip(self.transforms, self._inner(u), strict=True):
            total = total + transform.log_abs_det_jacobian(v, transform(v))
        return total

    def contains(self, z: Tensor) -> Tensor:
        """Which of z (*, *event) lie in the support: (*), of booleans."""
        checks = [part.support.check(value) for part, value in zip(self.parts, self._split(z), strict=True)]
        return torch.stack([check.expand(self._batch(z)) for check in checks]).all(0)

    def _batch(self, z: Tensor) -> torch.Size:
        return z.shape[: z.dim() - len(self.event_shape)]

    def _split(self, z: Tensor) -> list[Tensor]:
        """The parts of z (*, *event), each in its own shape."""
        batch = self._batch(z)
        pieces = z.reshape(*batch, sum(self.widths)).split(self.widths, -1)
        return [piece.reshape(*batch, *part.shape) for piece, part in zip(pieces, self.parts, strict=True)]

    def _inner(self, u: Tensor) -> list[Tensor]:
        """s u + m of u (*, D), in the shapes that the transforms take, and where their numbers are finite."""
        pieces = (u * self.scale + self.location).split(self.sizes, -1)
        shaped = [piece.reshape(*u.shape[:-1], *shape) for piece, shape in zip(pieces, self.shapes, strict=True)]
        real = [isinstance(_base(part.support), type(constraints.real)) for part in self.parts]
        return [v if r else v.clamp(-_FARTHEST, _FARTHEST) for v, r in zip(shaped, real, strict=True)]


def _moved(support: Constraint, fn: Callable[[Tensor], Tensor]) -> Constraint:
    """A support whose bounds, where they are tensors, went through a function."""
    if isinstance(support, constraints.independent):
        return constraints.independent(_moved(support.base_constraint, fn), support.reinterpreted_batch_ndims)
    bounds = {name: value for name, value in vars(support).items() if isinstance(value, Tensor)}
    if not bounds:
        return support
    moved = copy.copy(support)
    vars(moved).update({name: fn(value) for name, value in bounds.items()})
    return moved


def _interior(support: Constraint, z: Tensor) -> Tensor:
    """Which entries of z in a support don't lie on an edge that torch's bijections take for a place near it."""
    base: Any = _base(support)
    if isinstance(base, (type(constraints.unit_interval), constraints.half_open_interval)):
        return (z > base.lower_bound) & (z < base.upper_bound)
    return z > 0 if isinstance(base, type(constraints.simplex)) else torch.ones_like(z, dtype=torch.bool)


def _base(support: Constraint) -> Constraint:
    """A support of entries, where `support` is of independent ones."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


@final
class Unconstrained(nn.Module):
    """A prior over constrained latents as one over u (*, D): `sample` and `log_prob`, for `as_prior`.

    Args:
        source: an object with `sample` and `log_prob`.
        bijection: from u to what it draws.
    """

    def __init__(self, source: Any, bijection: Bijection) -> None:
        super().__init__()
        self.source = source
        self.bijection = bijection
        self._home = _home(source)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """u (*sample_shape, D)."""
        return self.bijection.inverse(self.source.sample(torch.Size(sample_shape)).to(self.bijection.location))

    def log_prob(self, u: Tensor) -> Tensor:
        """log p(u) of u (*, D): (*), in nats."""
        return self.source.log_prob(self.bijection(u).to(self._home)).to(u.device) + self.bijection.log_volume(u)
