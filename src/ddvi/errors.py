"""Errors that a user can act on.

Every message is one sentence that says what was given, what is allowed and what to do. Nothing here imports torch, so
that the command line can refuse a wrong name at once.
"""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable

_MOST_TO_LIST = 20


class InputError(ValueError):
    """Something that the user gave (a name, a value, a file, an array) can't be used; nothing is changed by then.

    Example:
        >>> ddvi.make_prior("pinwhel")
        Traceback (most recent call last):
        ddvi.errors.InputError: unknown prior 'pinwhel' (choose from ...); did you mean 'pinwheel'?
    """


class TrainingError(RuntimeError):
    """Training had to stop: loss or gradient weren't finite three times in a row, or a device or process failed it.

    A run keeps its last good checkpoint.

    Example:
        >>> issubclass(TrainingError, RuntimeError)
        True
    """


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, numpy's too, which truth values aren't."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_name(kind: str, given: str, allowed: Iterable[str], otherwise: str = "") -> str:
    """Return `given` if it is one of `allowed`, else refuse it and suggest the nearest.

    Args:
        kind: what is being named, in the singular ("prior", "method").
        given: the name that the user wrote.
        allowed: every name that exists.
        otherwise: what can be given instead of a name.

    Raises:
        InputError: `given` is not in `allowed`.
    """
    names = list(allowed)
    if given in names:
        return given
    close = difflib.get_close_matches(given.lower(), names, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    if otherwise:
        otherwise = f", or {otherwise}"
    allowed = f"choose from {', '.join(names)}" if len(names) <= _MOST_TO_LIST else "'ddvi list' shows them all"
    raise InputError(f"unknown {kind} '{given}' ({allowed}{otherwise}){hint}")
