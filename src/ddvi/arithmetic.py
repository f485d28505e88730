"""Threads, floating-point type, numbers next to zero and the path of matrix products, for the length of a run.

Torch multiplies matrices through one of several libraries, which a global precision setting selects; on some processors
the default one runs at less than half the rate of another that is just as exact. Which is fastest is measured once on
each machine and remembered, so that the same run takes the same path every time and repeats to the last bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from ddvi.files import cache_folder, write_aside
from ddvi.randomness import seeded

PATHS = ("highest", "high", "medium")
"""Values of torch's precision of single-precision matrix products, see `torch.set_float32_matmul_precision`."""
LARGEST_ERROR = 1e-6
"""Of a product against double precision, relative to its norm: what single precision keeps to."""
_WORTH_IT = 1.2  # times as fast as the default, or the default stays
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h
_SHAPES = ((128, 784, 1000), (1024, 128, 128))


@contextlib.contextmanager
def arithmetic(precision: str = "32", threads: int = 0, path: str | None = None) -> Iterator[str]:
    """Run a block with a run's threads, floating-point type and matrix products, and restore the caller's afterwards.

    Denormal numbers, below 1e-38 in single precision, count as zero: activations and gradients fade to them, and a
    matrix product of them takes several times as long. So it is in this thread and in those that torch starts
    meanwhile, which go on so; those that it had started before keep what they had.

    Args:
        precision: "32", "64", "tf32" or "bf16", as the setting.
        threads: CPU threads; 0 keeps the caller's.
        path: one of `PATHS`; the fastest exact one of this processor if None.

    Yields:
        The path of matrix products.
    """
    _keep_memory()
    before = torch.get_num_threads(), torch.get_default_dtype()
    try:
        torch.set_num_threads(threads or before[0])
        torch.set_default_dtype(torch.float64 if precision == "64" else torch.float32)
        with _products(path or fastest_path()) as chosen:
            yield chosen
    finally:
        torch.set_num_threads(before[0])
        torch.set_default_dtype(before[1])


def fast_products(device: torch.device) -> AbstractContextManager[str | None]:
    """A block with the products of a run, for a user's own model: where it is on the CPU and they are torch's default.

    Other choices of the caller stay: they hold for other devices too, where they may mean less than single precision.

    Args:
        device: of the model.
    """
    try:
        untouched = device.type == "cpu" and torch.get_float32_matmul_precision() == PATHS[0]
    except RuntimeError:  # chosen in torch's newer words, which its older ones don't read
        untouched = False
    return _products(fastest_path()) if untouched else contextlib.nullcontext()


@contextlib.contextmanager
def _products(path: str) -> Iterator[str]:
    """Take a path of matrix products, and denormal numbers as zero, and restore the caller's choice of both."""
    before, flushes = torch.get_float32_matmul_precision(), _flushes()
    try:
        torch.set_flush_denormal(True)
        torch.set_float32_matmul_precision(path)
        yield path
    finally:
        torch.set_float32_matmul_precision(before)
        torch.set_flush_denormal(flushes)


def _flushes() -> bool:
    """Whether denormal numbers count as zero, which torch doesn't tell."""
    return not torch.full((2,), 1e-39, dtype=torch.float32, device="cpu").mul(0.5).any()


def _keep_memory() -> None:
    """Let glibc keep what is freed: by default every large tensor is given back and faulted in again, page by page.

    It concerns speed alone, and there is no way back: glibc doesn't tell what held before.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def path_of(device: str, precision: str) -> str | None:
    """The path of a kind of device in a precision, as the settings; None on a CPU, where it is measured."""
    if device == "cpu":
        return None
    return "high" if precision == "tf32" else PATHS[0]


def keeps_precision(path: str) -> bool:
    """Whether products by a path keep single precision on this machine's CPU."""
    return path == PATHS[0] or measure_path(path, _SHAPES[0], repeats=1)[1] <= LARGEST_ERROR


def fastest_path() -> str:
    """The fastest of `PATHS` that keeps single precision on this machine's CPU; measured once and remembered."""
    file = cache_folder() / "matrix_products.json"
    machine = f"{processor()} {torch.__version__} {torch.get_num_threads()}"
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(file.read_text()))
    if known.get(machine) not in PATHS:
        known[machine] = _probe()
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_aside(file, lambda temporary: temporary.write_text(json.dumps(known, indent=2) + "\n"))
    return known[machine]


def measure_path(path: str, shape: tuple[int, int, int], repeats: int = 20) -> tuple[float, float]:
    """Least seconds, and relative error, of a linear layer of (examples, inputs, outputs) on one path."""
    examples, inputs, outputs = shape
    before = torch.get_float32_matmul_precision()
    try:
        with seeded(0, "matrix products"), torch.no_grad():
            x, weight, bias = torch.randn(examples, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
            x, weight, bias = x.float(), weight.float(), bias.float()
        torch.set_float32_matmul_precision(path)
        best = float("inf")
        product = torch.nn.functional.linear(x, weight, bias)
        for _ in range(repeats):
            started = time.perf_counter()
            torch.nn.functional.linear(x, weight, bias)
            best = min(best, time.perf_counter() - started)
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        return best, float((product.double() - exact).norm() / exact.norm())
    finally:
        torch.set_float32_matmul_precision(before)


def _probe() -> str:
    seconds: dict[str, float] = {}
    for path in PATHS:
        measured = [measure_path(path, shape) for shape in _SHAPES]
        if all(error <= LARGEST_ERROR for _, error in measured):
            seconds[path] = sum(part for part, _ in measured)
    best = min(seconds, key=lambda path: seconds[path], default=PATHS[0])
    return best if seconds.get(PATHS[0], float("inf")) > _WORTH_IT * seconds.get(best, float("inf")) else PATHS[0]


def processor() -> str:
    """What the CPU calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
