"""The one training loop.

It takes a model, phases (an objective each, and which children of the model rest) and data in memory; it knows about
devices, precision, optimisers, checkpoints and the history, and nothing about any method. A run that is killed and
resumed ends with the weights of one that was not: batches follow from seed and epoch, everything else random from
torch's state, which is part of the checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor

from ddvi import checkpoint
from ddvi.errors import InputError, TrainingError
from ddvi.model import LatentVariableModel
from ddvi.objectives.base import Batch, Labelled, Update
from ddvi.processes import Processes
from ddvi.randomness import generator, mean, own, part, random_state, seeded, set_random_state, sharded
from ddvi.schedule import Phase, Schedule

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
    sums: dict[str, Tensor] = field(default_factory=dict)
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

    Raises:
        InputError: a batch larger than the data; a fabric of several devices that isn't launched.

    Example:
        >>> schedule = Schedule((ddvi.Phase(2, ddvi.ReweightedWakeSleep()),), batch_size=3)
        >>> [row["epoch"] for row in Trainer(model, schedule, x).fit()]
        [1, 2]
    """

    validation_x: Tensor | None
    train_z: Tensor | None
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
        self.train_x: Tensor = self.fabric.to_device(train_x)
        here = self.fabric.to_device
        self.validation_x, self.train_z, self.validation_z = (
            None if given is None else here(given) for given in (validation_x, train_z, validation_z)
        )
        self.labelled: Labelled | None = labelled and Labelled(here(labelled.x), here(labelled.label))
        self.path = path
        self.listener: Listener | None = listener if self.processes.first else None
        self.state: State = State()
        fused = self.fabric.device.type in ("cpu", "cuda")
        self.groups: dict[str, list[torch.nn.Parameter]] = model.groups()
        self.optimizers: dict[str, torch.optim.Adam] = {
            name: torch.optim.Adam(parameters, lr=schedule.lr, fused=fused) for name, parameters in self.groups.items()
        }
        self.steps_per_epoch: int = math.ceil(len(train_x) / schedule.batch_size)
        self._saved_at = time.monotonic()

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
        with seeded(self.schedule.seed, "training"), self._interruptible() as interrupted:
            if resume:
                self._restore()
            self.processes.start_alike(self.model, [len(self.train_x), len(self.labelled.x) if self.labelled else 0])
            self.model.train()
            while self.state.epoch < self.schedule.epochs:
                self._epoch(interrupted)
        self.model.eval()
        return self.state.history

    def _epoch(self, interrupted: threading.Event) -> None:
        state, schedule = self.state, self.schedule
        phase = schedule.phase(state.epoch)
        order = torch.randperm(len(self.train_x), generator=generator(schedule.seed, "order", state.epoch))
        order = self.fabric.to_device(order)
        total_steps = schedule.epochs * self.steps_per_epoch
        started, seconds_before = time.monotonic(), state.seconds
        for step in range(state.step, self.steps_per_epoch):
            progress = (state.epoch * self.steps_per_epoch + step) / total_steps
            rows = order[step * schedule.batch_size : (step + 1) * schedule.batch_size]
            # The first step of an epoch is watched for random numbers that would depend on the number of devices.
            with sharded(self.processes.shard(len(rows)), watched=step == 0):
                self._step(phase, rows, progress)
            state.step = step + 1
            state.seconds = seconds_before + time.monotonic() - started
            if self.listener:
                self.listener.step(state.epoch, state.step, self.steps_per_epoch)
            due = time.monotonic() - self._saved_at > SECONDS_BETWEEN_CHECKPOINTS
            stop, due = self.processes.any((interrupted.is_set(), due))
            if stop or due:
                self._save()
            if stop:
                raise Interrupted
        row = self._row()
        state.history.append(row)
        state.epoch, state.step, state.seconds, state.skipped, state.sums = state.epoch + 1, 0, 0.0, 0, {}
        if self.listener:
            self.listener.epoch(row)
        self._save()

    def _step(self, phase: Phase, rows: Tensor, progress: float) -> None:
        lr = self.schedule.learning_rate(progress)
        here = part(rows)
        with self.fabric.autocast():
            z = None if self.train_z is None else self.train_z[here]
            batch = Batch(self.model.preprocessing(self.train_x[here]), progress, self._draw_labelled(len(rows)), z)
            updates = phase.objective.updates(self.model, batch)
        complaint = ""
        while True:
            with self.fabric.autocast():
                update = next(updates, None)
            if update is None:
                break
            if self._apply(update, phase.frozen, lr):
                self._count(update)
            else:
                complaint = self._complaint(update)
                break
        self._add("examples", torch.full((), float(len(own(here))), dtype=torch.float64))
        self._judge(complaint)

    def _draw_labelled(self, count: int) -> Labelled | None:
        if self.labelled is None:
            return None
        random = generator(self.schedule.seed, "labelled", self.state.epoch, self.state.step)
        rows = self.fabric.to_device(part(torch.randint(len(self.labelled.label), (count,), generator=random)))
        return Labelled(self.model.preprocessing(self.labelled.x[rows]), self.labelled.label[rows])

    def _apply(self, update: Update, frozen: frozenset[str], lr: float) -> bool:
        """Carry out one update, or leave it where loss or gradient isn't finite."""
        active = [name for name in update.children if name in self.groups and name not in frozen]
        parameters = [parameter for name in active for parameter in self.groups[name]]
        if not parameters:
            return True
        for parameter in parameters:
            parameter.grad = None
        loss = mean(update.loss)
        self.fabric.backward(loss, inputs=parameters)
        grads, loss = [parameter.grad for parameter in parameters if parameter.grad is not None], loss.detach()
        self.processes.add_up([*grads, loss])
        norm = torch.nn.utils.get_total_norm(grads)
        if not torch.isfinite(loss + norm):
            return False
        if 0 < self.schedule.clip_norm < norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.schedule.clip_norm, norm)
        for name in active:
            optimizer = self.optimizers[name]
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        return True

    def _judge(self, complaint: str) -> None:
        """Go on after a good step; leave out the rest of a bad one, and end the run at the third in a row."""
        state = self.state
        if not complaint:
            state.bad_in_a_row = 0
            return
        state.skipped += 1
        state.bad_in_a_row += 1
        where = f"epoch {state.epoch + 1}, step {state.step + 1}"
        if self.listener:
            self.listener.message(f"{where}: {complaint} not finite; the step is skipped")
        if state.bad_in_a_row > BAD_STEPS_ALLOWED:
            raise TrainingError(
                f"{complaint} not finite, three times in a row by {where}; the last good checkpoint is kept: lower lr"
                " or clip_norm, or look at the data"
            )

    def _complaint(self, update: Update) -> str:
        """Which terms of a bad update are to blame, in any of the processes."""
        bad = self.processes.any(not torch.isfinite(value).all() for value in update.terms.values())
        names = [name for name, is_bad in zip(update.terms, bad, strict=True) if is_bad]
        if not names:
            return f"the gradient of {', '.join(update.terms)} is"
        return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"

    def _count(self, update: Update) -> None:
        for name, value in update.terms.items():
            value = own(value.detach())
            self._add(name, value.sum(dtype=torch.float64))
            self._add(f"count/{name}", torch.full((), float(value.numel()), dtype=torch.float64))

    def _add(self, name: str, value: Tensor) -> None:
        self.state.sums[name] = self.state.sums[name] + value if name in self.state.sums else value

    def _row(self) -> dict[str, Any]:
        """The history's row of the epoch that has just ended."""
        sums = {name: value.item() for name, value in self.processes.total(self.state.sums).items()}
        terms = {
            name: value / sums[f"count/{name}"]
            for name, value in sums.items()
            if name != "examples" and not name.startswith("count/")
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
        with seeded(self.schedule.seed, "validation"), self.fabric.autocast():
            for rows in torch.arange(len(raw), device=raw.device).split(_VALIDATION_CHUNK):
                x = self.model.preprocessing(raw[rows])
                total += float(self.model.held_out_bound(x, None if z is None else z[rows]).sum())
        self.model.train()
        return total / len(raw)

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        state = self.state
        sums = self.processes.total(state.sums)
        if self.path is None or not self.processes.first:
            return
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= checkpoint.flatten_optimizer(name, optimizer)
        tensors |= {f"random/{name}": value for name, value in random_state().items()}
        tensors |= {f"sums/{name}": value for name, value in sums.items()}
        plain = {
            name: getattr(state, name) for name in ("epoch", "step", "seconds", "skipped", "bad_in_a_row", "history")
        }
        checkpoint.save(self.path, tensors, {"state": plain, **self.facts})

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
        for name, optimizer in self.optimizers.items():
            checkpoint.restore_optimizer(name, optimizer, tensors)
        sums = {name: value * self.processes.first for name, value in self.fabric.to_device(parts["sums"]).items()}
        self.state = State(**facts["state"], sums=sums)
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
