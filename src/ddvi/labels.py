"""Which labels a semi-supervised run may see."""

from __future__ import annotations

import torch
from torch import Tensor

from ddvi.errors import InputError
from ddvi.randomness import generator


def choose_labelled(labels: Tensor, count: int, classes: int, seed: int) -> Tensor:
    """Rows whose label a run may see: stratified by class, drawn by the seed.

    Args:
        labels: of the training examples (N,), −1 where unknown.
        count: how many to show; 0 shows all that are known.
        classes: C.
        seed: the run's.

    Returns:
        Row numbers, ascending.

    Raises:
        InputError: there are no labels, or fewer than `count`, or `count` leaves a class without any.
    """
    known = int((labels >= 0).sum())
    if known == 0:
        raise InputError("semi-supervised learning needs labels, and the training data has none; leave out '_semi'")
    if count == 0:
        return (labels >= 0).nonzero()[:, 0]
    if count > known:
        raise InputError(f"n_labels={count} is more than the {known} labels of the training data; use at most {known}")
    present = [rows for rows in ((labels == label).nonzero()[:, 0] for label in range(classes)) if len(rows)]
    if count < len(present):
        raise InputError(f"n_labels={count} leaves classes without a label; use at least {len(present)}")
    random = generator(seed, "labels")
    shuffled = [rows[torch.randperm(len(rows), generator=random)] for rows in present]
    # Turn by turn, a row of each class that has one left.
    turns = [(turn, index) for index, rows in enumerate(shuffled) for turn in range(len(rows))]
    chosen = [shuffled[index][turn] for turn, index in sorted(turns)[:count]]
    return torch.stack(chosen).sort().values
