"""The peak of memory of a training or of inference, in a process of its own.

On Linux the mark is set back once the model is built, so that what building it takes doesn't count; on a GPU it is what
torch has allocated there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rates import Case, Clock, Enough, Images, Subject

from ddvi.arithmetic import arithmetic

STEPS = 3
INFERENCE_BATCH = 8_000
"""Large, so that what depends on the chain's length stands out."""


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes of memory: when all is built, data included, at most afterwards, and those of the data alone."""

    built: int
    highest: int
    data: int


def peak(case: Case, common: dict[str, Any], kind: str, examples: int, path: str) -> Peak:
    """Of "training" on so many random examples, or of "inference" on a few batches."""
    request = {"case": dataclasses.asdict(case), "common": common, "kind": kind, "examples": examples, "path": path}
    command = [sys.executable, __file__, json.dumps(request)]
    # Large blocks go back to the system when they are freed: what is resident is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    return Peak(**json.loads(answer.splitlines()[-1]))


def _measure(case: Case, common: dict[str, Any], kind: str, examples: int, path: str) -> Peak:
    settings = case.settings(common)
    with arithmetic(settings.precision, settings.threads, path):
        subject = Subject.build(settings, Images.load(None, examples))
        raw, device = subject.images.x, subject.fabric.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        built = _resident(device, "VmRSS")
        if kind == "training":
            with contextlib.suppress(Enough):
                subject.trainer(examples, 1, Clock(device, STEPS)).fit()
        else:
            for part in raw.split(INFERENCE_BATCH)[:STEPS]:
                subject.infer(subject.fabric.to_device(part), INFERENCE_BATCH)
    return Peak(built, _resident(device, "VmHWM"), raw.nbytes)


def _resident(device: torch.device, entry: str) -> int:
    """Bytes now (VmRSS), or at most since the mark was set back (VmHWM)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if entry == "VmHWM" else torch.cuda.memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {entry} in /proc/self/status")


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(json.dumps(dataclasses.asdict(_measure(**request | {"case": Case(**request["case"])}))))
