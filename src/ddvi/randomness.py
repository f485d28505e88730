"""Random state: the caller's is never changed.

What accepts a generator gets one from `generator`; everything else runs inside `seeded`, which gives torch's state back
when it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor


def derive_seed(seed: int, *stream: int | str) -> int:
    """A seed for one purpose out of a run's seed: distinct streams are independent, the same stream repeats exactly."""
    text = ":".join(str(part) for part in (seed, *stream))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def generator(seed: int, *stream: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for the stream named by `stream`, see `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *stream))


@contextlib.contextmanager
def seeded(seed: int, *stream: int | str) -> Iterator[None]:
    """Run a block under its own random state on every device, and restore the caller's afterwards."""
    with preserved():
        torch.manual_seed(derive_seed(seed, *stream))
        yield


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Restore torch's random state, on the CPU and on every accelerator, when the block ends."""
    saved = random_state()
    try:
        yield
    finally:
        set_random_state(saved)


def random_state() -> dict[str, Tensor]:
    """Torch's global random state, by device; part of a checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Put back what `random_state` returned; devices that are not here are passed over."""
    torch.set_rng_state(state["cpu"].cpu())
    for name, value in state.items():
        if name.startswith("cuda") and torch.cuda.is_available() and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value.cpu(), name)
        elif name == "mps" and torch.backends.mps.is_available():
            torch.mps.set_rng_state(value.cpu())
