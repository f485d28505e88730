"""One step of training: the updates that an objective makes of a batch, carried out.

A bad update, whose loss or gradient isn't finite, changes nothing, nor do those after it in its step. On a GPU steps
can be recorded (`ddvi.recording`); then nothing waits for the device, and what became of a step is known when the next
one is already on its way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, final

import torch
from lightning_fabric import Fabric
from torch import Tensor

from ddvi.model import LatentVariableModel
from ddvi.objectives.base import Batch, Labelled, Update
from ddvi.processes import Processes
from ddvi.randomness import mean, own, part
from ddvi.recording import Recorded, Recorder, record
from ddvi.schedule import Phase, Schedule


class TrainingData(NamedTuple):
    """What is trained on, on the device."""

    x: Tensor
    """Raw examples (N, *event)."""
    z: Tensor | None
    """The latents (N, D) that they were simulated from, where they are known."""
    labelled: Labelled | None
    """Raw examples (M, *event) with their labels, for semi-supervised learning."""


class Outcome(NamedTuple):
    """What became of a step, which may not have been carried out yet."""

    names: list[tuple[str, ...]]
    """Of the terms of each update."""
    finite: Tensor
    """Of each update whether its loss and gradient are finite, and each of its terms: one after the other."""
    ready: torch.cuda.Event | None
    """When `finite` has come from the device."""

    def complaint(self, processes: Processes) -> str:
        """What of the step's first bad update isn't finite, in any of the processes; nothing if there is none."""
        if self.ready is not None:
            self.ready.synchronize()
        flags = iter(self.finite.tolist())
        for names in self.names:
            good, *terms = (next(flags) for _ in range(1 + len(names)))
            if good:
                continue
            bad = processes.any(not finite for finite in terms)
            blamed = [name for name, is_bad in zip(names, bad, strict=True) if is_bad]
            if not blamed:
                return f"the gradient of {', '.join(names)} is"
            return f"{', '.join(blamed)} {'is' if len(blamed) == 1 else 'are'}"
        return ""


@final
class Steps:
    """Carries out steps of a model's training.

    Args:
        model: on the device.
        data: what it is trained on.
        schedule: how.
        fabric: devices and precision.
        processes: all that train together.
        recorder: how steps are recorded; None carries them out operation by operation.
    """

    def __init__(
        self,
        model: LatentVariableModel,
        data: TrainingData,
        schedule: Schedule,
        fabric: Fabric,
        processes: Processes,
        recorder: Recorder | None,
    ) -> None:
        self.model = model
        self.data = data
        self.schedule = schedule
        self.fabric = fabric
        self.processes = processes
        kind = fabric.device.type
        can_record = not processes.several and (kind == "cuda" or recorder is not record)
        self.recorder: Recorder | None = recorder if can_record else None
        self.groups: dict[str, list[torch.nn.Parameter]] = model.groups()
        options: dict[str, Any] = {"fused": kind in ("cpu", "cuda"), "capturable": kind == "cuda"}
        self.optimizers: dict[str, torch.optim.Adam] = {
            name: torch.optim.Adam(parameters, lr=schedule.lr, **options) for name, parameters in self.groups.items()
        }
        self.sums: dict[str, Tensor] = {}
        """Of each term over the examples since `clear`, as far as this process counts them, and their number."""
        self._phase: Phase | None = None
        self._carry_out: Callable[..., Tensor] = self._updates
        self._names: list[tuple[str, ...]] = []

    @property
    def recorded(self) -> bool:
        """Whether the steps of this phase are recorded, or will be."""
        return isinstance(self._carry_out, Recorded)

    def begin(self, phase: Phase) -> None:
        """Make ready for an epoch of a phase: another one has other terms, and is recorded anew."""
        if phase == self._phase:
            return
        if self._phase is not None:
            self.sums = {}
        self._phase = phase
        self._carry_out = partial(self._updates, phase)
        if self.recorder is not None:
            self._carry_out = Recorded(self._carry_out, self.recorder)

    def clear(self) -> None:
        """Begin sums anew, in the same tensors, to which recorded steps add."""
        for total in self.sums.values():
            total.zero_()

    def __call__(self, rows: Tensor, progress: float, labelled: Tensor | None) -> Outcome:
        """One step.

        Args:
            rows: of the whole batch, (B,).
            progress: how much of training is over, 0 … 1.
            labelled: those of the labelled examples beside it, (B,), or None without any.
        """
        mine, lr = part(rows), self.schedule.learning_rate(progress)
        told = () if labelled is None else (part(labelled),)
        if self.recorded:
            device = rows.device
            now = torch.full((), progress, dtype=torch.float64, device=device), torch.full((), lr, device=device)
            finite = self._carry_out(mine, *now, *told)
        else:
            finite = self._carry_out(mine, progress, lr, *told)
        self._add("examples", float(len(own(mine))))
        if not self.recorded:
            return Outcome(self._names, finite, None)
        # The next step writes into the same tensor.
        ready = torch.cuda.Event() if finite.is_cuda else None
        finite = finite.to("cpu", non_blocking=True, copy=True)
        if ready is not None:
            ready.record()
        return Outcome(self._names, finite, ready)

    def _updates(
        self, phase: Phase, rows: Tensor, progress: Tensor | float, lr: Tensor | float, labelled: Tensor | None = None
    ) -> Tensor:
        """All updates of a step on this process's rows; what it gives is `Outcome.finite`.

        Where progress and learning rate are tensors, nothing waits for the device, and what follows a bad update is
        computed without effect. Else it is left out.
        """
        x, z, known = self.data
        prepared, held_back = self.model.preprocessing, None
        if isinstance(progress, Tensor):
            held_back = torch.zeros((), device=rows.device)
        with self.fabric.autocast():
            seen, latents = prepared(x[rows]), None if z is None else z[rows]
            told = None
            if known is not None and labelled is not None:
                told = Labelled(prepared(known.x[labelled]), known.label[labelled])
            updates = phase.objective.updates(self.model, Batch(seen, progress, told, latents))
        self._names, finite = [], []
        while True:
            with self.fabric.autocast():
                update = next(updates, None)
            if update is None:
                break
            good = self._apply(update, phase.frozen, lr, held_back)
            values = {name: own(value.detach()) for name, value in update.terms.items()}
            sums = {name: self._sum(value) for name, value in values.items()}
            self._names.append(tuple(sums))
            finite += [good, *(total.isfinite() for total in sums.values())]
            if held_back is None and not good:
                break
            for name, total in sums.items():
                count = float(values[name].numel())
                self._add(name, total if held_back is None else torch.where(held_back > 0, 0.0, total))
                self._add(f"count/{name}", count if held_back is None else count * (1 - held_back))
        return torch.stack(finite)

    def _apply(self, update: Update, frozen: frozenset[str], lr: Tensor | float, held_back: Tensor | None) -> Tensor:
        """Carry out one update if its loss and gradient are finite, and say whether they are, ().

        Args:
            update: the update.
            frozen: children that rest.
            lr: the learning rate.
            held_back: 1 where an update before this one was bad, which holds this one back too, and set to 1 if this
                one is; None waits for the device and looks.
        """
        active = [name for name in update.children if name in self.groups and name not in frozen]
        parameters = [parameter for name in active for parameter in self.groups[name]]
        if not parameters:
            return torch.ones((), dtype=torch.bool, device=self.fabric.device)
        for parameter in parameters:
            parameter.grad = None
        loss = mean(update.loss)
        self.fabric.backward(loss, inputs=parameters)
        grads, loss = [parameter.grad for parameter in parameters if parameter.grad is not None], loss.detach()
        self.processes.add_up([*grads, loss])
        norm, clip_norm = torch.nn.utils.get_total_norm(grads), self.schedule.clip_norm
        good = torch.isfinite(loss + norm)
        if held_back is not None:
            held_back.copy_(torch.maximum(held_back, (~good).to(held_back)))
        elif not good:
            return good
        if clip_norm > 0 and (held_back is not None or norm > clip_norm):
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        for name in active:
            optimizer: Any = self.optimizers[name]
            optimizer.param_groups[0]["lr"] = lr
            optimizer.found_inf = held_back  # torch's name for a flag on the device that holds a step back
            optimizer.step()
        return good

    def _add(self, name: str, value: Tensor | float) -> None:
        if name not in self.sums:
            self.sums[name] = self._sum(torch.zeros(1, device=self.fabric.device))
        self.sums[name].add_(value)

    def _sum(self, values: Tensor) -> Tensor:
        """In double precision, which MPS has none of."""
        return values.sum(dtype=torch.float32 if values.device.type == "mps" else torch.float64)
