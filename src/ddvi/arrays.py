"""What a user gives as data (an array, a tensor, a table, batches) as one tensor in memory, found sound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddvi.errors import InputError


def as_tensor(values: Any, what: str = "x") -> Tensor:
    """Data as a tensor (N, *event): whole numbers as int64, booleans as uint8, all else in torch's default precision.

    Args:
        values: a tensor, an array, a table of numbers with `to_numpy`, nested lists of numbers, or batches of these, as
            a `DataLoader` gives them; of a batch that is a sequence or a mapping the first entry is taken. Batches are
            read to their end into memory.
        what: its name in messages.

    Raises:
        InputError: the values aren't real numbers, aren't finite, or there are none.
    """
    tensor = _tensor(values, what)
    if tensor is None:
        tensor = _joined(values, what)
    if not tensor.dim() or not tensor.numel():
        raise InputError(f"{what} of shape {tuple(tensor.shape)} holds no examples; give (N, *event) with N at least 1")
    if tensor.is_complex() or tensor.is_sparse:
        kind = "complex" if tensor.is_complex() else "sparse"
        raise InputError(f"{what} is {kind}, but real numbers in a dense array are needed; convert it first")
    if not tensor.is_floating_point():
        return tensor.to(torch.uint8 if tensor.dtype == torch.bool else torch.int64)
    kept = tensor.to(torch.get_default_dtype())
    for kind, checked in (("NaN or infinite values", tensor), (f"values too large for {kept.dtype}", kept)):
        if (bad := ~checked.isfinite()).any():
            first = tuple(bad.nonzero()[0].tolist())
            raise InputError(f"{what} has {int(bad.sum()):,} {kind}, the first at {first}; remove or replace them")
    return kept


def _tensor(values: Any, what: str) -> Tensor | None:
    """One array as a tensor; None for anything else."""
    if isinstance(values, Tensor):
        return values.detach()
    if hasattr(values, "tocsr") and not isinstance(values, np.ndarray):
        raise InputError(f"{what} is a sparse matrix, but training holds dense data; give {what}.toarray()")
    if convert := getattr(values, "to_numpy", None):
        values = convert()
    if isinstance(values, (list, tuple)) and not any(map(_is_batch, values)):
        try:
            values = np.asarray(values)
        except ValueError:
            raise InputError(f"{what} has rows of different lengths; make them equal") from None
    if not isinstance(values, np.ndarray):
        return None
    if values.dtype.kind not in "biuf":
        raise InputError(f"{what} has dtype {values.dtype}, but real numbers are needed; convert it, as to float32")
    if values.dtype.kind == "u" and values.size and values.max() > np.iinfo(np.int64).max:
        raise InputError(f"{what} holds {values.max()}, too large for whole numbers of torch; convert it to float64")
    native = np.float64 if values.dtype.itemsize > 8 else values.dtype.newbyteorder("=")  # all that torch knows
    return torch.from_numpy(np.array(values, dtype=native, copy=True))


def _is_batch(value: Any) -> bool:
    """Whether an entry of a list is a batch of examples, rather than numbers."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return isinstance(first, (Tensor, np.ndarray, Mapping))


def _joined(values: Any, what: str) -> Tensor:
    """The first entry of every batch, one after the other."""
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, Mapping)):
        raise InputError(f"{what} is a {type(values).__name__}; give a tensor, an array or batches of these")
    parts: list[Tensor] = []
    for batch in values:
        if isinstance(batch, Mapping):
            batch = next(iter(batch.values()))
        elif isinstance(batch, (list, tuple)):
            batch = batch[0]
        part = _tensor(batch, what)
        if part is None:
            raise InputError(f"{what} gives batches of {type(batch).__name__}; make them tensors or arrays")
        parts.append(part)
    if not parts:
        raise InputError(f"{what} gives no batches; is it an iterator that has been used up?")
    if len({(part.shape[1:], part.dtype) for part in parts}) > 1 or not parts[0].dim():
        shapes = ", ".join(sorted({f"{tuple(part.shape[1:])} {part.dtype}" for part in parts}))
        raise InputError(f"{what} gives batches of different kinds ({shapes}); make them one shape and dtype")
    return torch.cat(parts)
