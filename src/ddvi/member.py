"""A run of a study in a process of its own: `python -m ddvi.member WORDS` is `ddvi train WORDS` on a lifeline.

Standard input is the lifeline: whoever started the run holds its other end, and when that is closed, by will or because
its holder was killed, the run saves its state and stops, as after Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress

from ddvi import cli


def main() -> int:
    """Run `ddvi train` with this process's words, and return its exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Thread(target=_hold_on, daemon=True).start()
    return cli.main(["train", *sys.argv[1:]])


def _hold_on() -> None:
    """Wait for the other end to be closed."""
    with suppress(OSError):
        while os.read(sys.stdin.fileno(), 1):
            pass
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
