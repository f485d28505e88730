"""Files: written aside and renamed, and the folder of what can be had again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddvi.errors import InputError


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
        temporary.chmod(0o666 & ~_umask())  # some writers leave it to its owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """What the process keeps from others, which can only be known by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def check_file(path: Path) -> None:
    """Refuse a file that can't be written, before the work that fills it."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        fault = "is a folder" if path.is_dir() else "is in a folder that doesn't exist"
        raise InputError(f"{path} {fault}; give the file's own path, in a folder that is there")
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"{path} can't be written; give a file in another folder")
