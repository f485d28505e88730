"""The one training loop.

It takes a model, phases (an objective each, and which children of the model rest) and data in memory; it knows about
devices, batches, checkpoints and the history, and nothing about any method. What a step does is in `ddvi.steps`. A run
that is killed and resumed ends with the weights of one that was not: batches follow from seed and epoch, everything
else random from torch's state, which is part of the checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor

from ddvi import checkpoint
from ddvi.drawn import unchecked
from ddvi.errors import InputError, TrainingError
from ddvi.fusing import fuses, fusing
from ddvi.model import LatentVariableModel
from ddvi.objectives.base import Labelled
from ddvi.processes import Processes
from ddvi.randomness import generator, random_state, seeded, set_random_state, sharded
from ddvi.recording import recorder
from ddvi.schedule import Schedule
from ddvi.steps import Outcome, Steps, TrainingData

SECONDS_BETWEEN_CHECKPOINTS = 60.0
BAD_STEPS_ALLOWED = 2
_VALIDATION_CHUNK = 1000


@dataclass
class State:
    """Where a run stands; together with weights, optimisers and random state it is the checkpoint."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    bad_in_a_row: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


class Listener(Protocol):
    """Who watches a training."""

    def step(self, epoch: int, step: int, steps: int) -> None: ...

    def epoch(self, row: dict[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...


class Interrupted(Exception):
    """The user stopped the run by Ctrl-C; its state has been saved.

    Example:
        >>> issubclass(Interrupted, Exception)
        True
    """


class Trainer:
    """Trains a model on data in memory.

    Args:
        model: the model; moved to the fabric's device.
        schedule: how.
        train_x: raw training data (N, *event).
        validation_x: raw examples whose bound goes into the history, or None.
        path: the checkpoint's file; None keeps none.
        fabric: devices and precision; by default the CPU. Of several devices each has a process, which is given the
            same model and all of the data; the result is that of one.
        listener: who watches.
        labelled: raw examples (M, *event) with their labels, for semi-supervised learning; each step draws a batch of
            them with replacement.
        train_z: the latents (N, D) that training data was simulated from, where they are known.
        validation_z: the same of the held-out examples.
        graphs: on a single CUDA device, record the kernels of a step and launch them as one, see `ddvi.recording`; for
            models that change by nothing that Python does beside them.
        compiles: on CUDA, fuse the small operations of a chain, see `ddvi.fusing`.

    Raises:
        InputError: a batch larger than the data; a fabric of several devices that isn't launched.

    Example:
        >>> schedule = Schedule((ddvi.Phase(2, ddvi.ReweightedWakeSleep()),), batch_size=3)
        >>> [row["epoch"] for row in Trainer(model, schedule, x).fit()]
        [1, 2]
    """

    validation_x: Tensor | None
    validation_z: Tensor | None

    def __init__(
        self,
        model: LatentVariableModel,
        schedule: Schedule,
        train_x: Tensor,
        validation_x: Tensor | None = None,
        path: Path | None = None,
        fabric: Fabric | None = None,
        listener: Listener | None = None,
        labelled: Labelled | None = None,
        train_z: Tensor | None = None,
        validation_z: Tensor | None = None,
        graphs: bool = False,
        compiles: bool = False,
    ) -> None:
        if schedule.batch_size > len(train_x):
            raise InputError(
                f"batch_size={schedule.batch_size} is larger than the {len(train_x)} training examples;"
                f" use at most {len(train_x)}"
            )
        self.fabric: Fabric = fabric or Fabric(accelerator="cpu", devices=1)
        self.processes: Processes = Processes(self.fabric)
        self.fabric.to_device(model)
        self.model = model
        self.schedule = schedule
        here = self.fabric.to_device
        self.train_x: Tensor = here(train_x)
        self.validation_x, train_z, self.validation_z = (
            None if given is None else here(given) for given in (validation_x, train_z, validation_z)
        )
        self.labelled: Labelled | None = labelled and Labelled(here(labelled.x), here(labelled.label))
        training_data = TrainingData(self.train_x, train_z, self.labelled)
        how = recorder(graphs, self.fabric.device)
        self.steps: Steps = Steps(model, training_data, schedule, self.fabric, self.processes, how)
        self.path = path
        self.fuses: bool = fuses(compiles, self.fabric.device)
        self.listener: Listener | None = listener if self.processes.first else None
        self.state: State = State()
        self.steps_per_epoch: int = math.ceil(len(train_x) / schedule.batch_size)
        self._saved_at = time.monotonic()
        self._open: deque[tuple[str, Outcome]] = deque()

    def fit(self, *, resume: bool = False, facts: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Train to the end and return the history, a row an epoch.

        Args:
            resume: go on from the checkpoint.
            facts: kept in the checkpoint (configuration), for whoever reads it.

        Raises:
            Interrupted: Ctrl-C; the checkpoint holds the step.
            TrainingError: three updates in a row had a non-finite loss or gradient.
        """
        self.facts: dict[str, Any] = facts or {}
        random, fused = seeded(self.schedule.seed, "training"), fusing(self.fuses)
        with random, unchecked(), fused, self._interruptible() as interrupted:
            if resume:
                self._restore()
            self.processes.start_alike(self.model, [len(self.train_x), len(self.labelled.x) if self.labelled else 0])
            try:
                while self.state.epoch < self.schedule.epochs:
                    self._epoch(interrupted)
            finally:
                self._open.clear()
                self.steps.release()
        self.model.eval()
        return self.state.history

    def _epoch(self, interrupted: threading.Event) -> None:
        state, schedule = self.state, self.schedule
        self.steps.begin(schedule.phase(state.epoch))
        self._learn()
        order = torch.randperm(len(self.train_x), generator=generator(schedule.seed, "order", state.epoch))
        order = self.fabric.to_device(order)
        total_steps = schedule.epochs * self.steps_per_epoch
        started, seconds_before = time.monotonic(), state.seconds
        for step in range(state.step, self.steps_per_epoch):
            progress = (state.epoch * self.steps_per_epoch + step) / total_steps
            rows = order[step * schedule.batch_size : (step + 1) * schedule.batch_size]
            # The first step of an epoch is watched for random numbers that would depend on the number of devices.
            watched = step == 0
            as_written = fusing(False) if watched and self.processes.several else contextlib.nullcontext()
            with sharded(self.processes.shard(len(rows)), watched=watched), as_written:
                self._step(rows, progress)
            state.step = step + 1
            state.seconds = seconds_before + time.monotonic() - started
            if self.listener:
                self.listener.step(state.epoch, state.step, self.steps_per_epoch)
            due = time.monotonic() - self._saved_at > SECONDS_BETWEEN_CHECKPOINTS
            stop, due = self.processes.any((interrupted.is_set(), due))
            if stop or due:
                self._judge()
                state.seconds = seconds_before + time.monotonic() - started
                self._save()
            if stop:
                raise Interrupted
        self._judge()
        state.seconds = seconds_before + time.monotonic() - started
        row = self._row()
        state.history.append(row)
        state.epoch, state.step, state.seconds, state.skipped = state.epoch + 1, 0, 0.0, 0
        self.steps.clear()
        if self.listener:
            self.listener.epoch(row)
        self._save()

    def _learn(self) -> None:
        """Put the model into training mode, but for what rests: it is the same at each pass."""
        self.model.train()
        for name, child in self.model.named_children():
            if name in self.schedule.phase(self.state.epoch).frozen:
                child.eval()

    def _step(self, rows: Tensor, progress: float) -> None:
        outcome = self.steps(rows, progress, self._choose_labelled(len(rows)))
        self._open.append((f"epoch {self.state.epoch + 1}, step {self.state.step + 1}", outcome))
        # A recorded step may still be running: the next one is begun before it is judged, so that none waits.
        self._judge(left_open=int(self.steps.recorded))

    def _choose_labelled(self, count: int) -> Tensor | None:
        if self.labelled is None:
            return None
        random = generator(self.schedule.seed, "labelled", self.state.epoch, self.state.step)
        return self.fabric.to_device(torch.randint(len(self.labelled.label), (count,), generator=random))

    def _judge(self, left_open: int = 0) -> None:
        """Note each bad step, which has changed nothing, but for the last few; end the run at the third in a row."""
        state = self.state
        while len(self._open) > left_open:
            where, outcome = self._open.popleft()
            complaint = outcome.complaint(self.processes)
            if not complaint:
                state.bad_in_a_row = 0
                continue
            state.skipped += 1
            state.bad_in_a_row += 1
            if self.listener:
                self.listener.message(f"{where}: {complaint} not finite; the step is skipped")
            if state.bad_in_a_row > BAD_STEPS_ALLOWED:
                kept = "the last good checkpoint is kept: lower lr or clip_norm" if self.path else "lower lr"
                raise TrainingError(
                    f"{complaint} not finite, three times in a row by {where}; {kept}, or look at the data"
                )

    def _row(self) -> dict[str, Any]:
        """The history's row of the epoch that has just ended."""
        sums = {name: value.item() for name, value in self.processes.total(self.steps.sums).items()}
        terms = {
            name: value / sums[f"count/{name}"]
            for name, value in sums.items()
            if name != "examples" and not name.startswith("count/") and sums[f"count/{name}"] > 0
        }
        seconds = self.state.seconds
        row: dict[str, Any] = {"epoch": self.state.epoch + 1, **terms}
        if self.validation_x is not None:
            row["validation_bound"] = self._validation_bound(self.validation_x, self.validation_z)
        row["skipped"] = self.state.skipped
        row["examples_per_second"] = sums["examples"] / max(seconds, 1e-9)
        row["seconds"] = seconds
        return row

    @torch.no_grad()
    def _validation_bound(self, raw: Tensor, z: Tensor | None) -> float:
        """Mean of `held_out_bound` of held-out examples, the same noise at each epoch."""
        self.model.eval()
        total = 0.0
        with seeded(self.schedule.seed, "validation"), self.fabric.autocast(), fusing(False):
            for rows in torch.arange(len(raw), device=raw.device).split(_VALIDATION_CHUNK):
                x = self.model.preprocessing(raw[rows])
                total += float(self.model.held_out_bound(x, None if z is None else z[rows]).sum())
        self._learn()
        return total / len(raw)

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        state = self.state
        sums = self.processes.total(self.steps.sums)
        if self.path is None or not self.processes.first:
            return
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        for name, optimizer in self.steps.optimizers.items():
            tensors |= checkpoint.flatten_optimizer(name, optimizer)
        tensors |= {f"random/{name}": value for name, value in random_state().items()}
        tensors |= {f"sums/{name}": value for name, value in sums.items()}
        plain = {
            name: getattr(state, name) for name in ("epoch", "step", "seconds", "skipped", "bad_in_a_row", "history")
        }
        facts = {"state": plain, "terms": list(sums), **self.facts}  # tensors are kept in alphabetical order
        checkpoint.save(self.path, tensors, facts)

    def _restore(self) -> None:
        if self.path is None:
            raise InputError("there is no checkpoint to resume from: the trainer was given no path")
        self.processes.wait()  # for what the first may still be writing
        tensors, facts = checkpoint.load(self.path)
        if "state" not in facts:
            raise InputError(
                f"{self.path} holds weights but not the state of a training; train anew with overwrite=true"
            )
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "random": {}, "sums": {}}
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = value
        checkpoint.load_weights(self.model, parts["model"], self.path)
        for name, optimizer in self.steps.optimizers.items():
            checkpoint.restore_optimizer(name, optimizer, tensors)
        self.steps.restore(
            {name: parts["sums"][name] * self.processes.first for name in facts.get("terms", parts["sums"])}
        )
        self.state = State(**facts["state"])
        set_random_state(parts["random"])

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[threading.Event]:
        """Turn the first Ctrl-C into a flag that the loop reads between steps; the second one acts at once."""
        flag = threading.Event()
        if threading.current_thread() is not threading.main_thread():
            yield flag
            return

        def handle(number: int, frame: Any) -> None:
            if flag.is_set():
                raise KeyboardInterrupt
            flag.set()

        before: Callable[..., Any] | int | None = signal.signal(signal.SIGINT, handle)
        try:
            yield flag
        finally:
            signal.signal(signal.SIGINT, before)
