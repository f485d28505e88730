"""Files: written aside and renamed, and the folder of what can be had again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where ddvi keeps what it can get again: $DDVI_CACHE, or the system's place for it."""
    import pooch

    return Path(os.environ.get("DDVI_CACHE") or pooch.os_cache("ddvi")).expanduser()


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write(temporary path)`, then rename: readers see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
