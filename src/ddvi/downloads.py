"""Downloads that go on where they were interrupted, and archives that are unpacked whole or not at all."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from pathlib import Path


def resume(url: str, output_file: str, _: object) -> None:
    """A downloader for pooch that goes on where an interrupted one stopped: what has arrived is in a `.part` file."""
    import requests

    part = Path(output_file).parent / f"{url.rsplit('/', 1)[1]}.part"
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code != 416:  # "range not satisfiable": everything had arrived
            response.raise_for_status()
            with part.open("ab" if response.status_code == 206 else "wb") as file:  # 206: "partial content"
                shutil.copyfileobj(response.raw, file)
    part.replace(output_file)


def unpack(archive: Path) -> None:
    """Unpack aside and rename, so that a folder is there whole or not at all; the archive is deleted."""
    with tarfile.open(archive) as tar, tempfile.TemporaryDirectory(dir=archive.parent) as aside:
        tar.extractall(aside, filter="data")
        for entry in Path(aside).iterdir():
            entry.replace(archive.parent / entry.name)
    archive.unlink()
