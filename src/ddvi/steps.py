"""One step of training: the updates that an objective makes of a batch, carried out.

A bad update, whose loss or gradient isn't finite, changes nothing, nor do those after it in its step. On a GPU steps
can be recorded (`ddvi.recording`); then nothing waits for the device, and what became of a step is known when the next
one is already on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, final

import torch
from lightning_fabric import Fabric
from torch import Tensor

from ddvi.model import LatentVariableModel
from ddvi.objectives.base import Batch, Labelled, Update
from ddvi.processes import Processes
from ddvi.randomness import mean, own, part
from ddvi.recording import Recorded, Recorder
from ddvi.schedule import Phase, Schedule

Names = list[tuple[str, ...]]
"""Of the terms of each of a step's updates."""


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

    names: Names
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
        recorder: how steps are recorded, of a process that trains alone; None carries them out operation by operation.
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
        self.recorder: Recorder | None = None if processes.several else recorder
        self.groups: dict[str, list[torch.nn.Parameter]] = model.groups()
        self.fused: bool = kind in ("cpu", "cuda")
        options: dict[str, Any] = {"fused": self.fused, "capturable": kind == "cuda"}
        self.optimizers: dict[str, torch.optim.Adam] = {
            name: torch.optim.Adam(parameters, lr=schedule.lr, **options) for name, parameters in self.groups.items()
        }
        self.sums: dict[str, Tensor] = {}
        """Of each term over the examples since `clear`, as far as this process counts them, and their number."""
        self._phase: Phase | None = None
        self._carry_out: Callable[..., Tensor] | None = None
        self._names: dict[int, Names] = {}  # by size of the batch, each of which is recorded for itself
        self._total: torch.dtype = torch.float32 if kind == "mps" else torch.float64  # MPS has no doubles

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

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Go on from sums that a process had, on whatever device."""
        self.sums = {name: self.fabric.to_device(value.to(self._total)) for name, value in sums.items()}

    def release(self) -> None:
        """Let go of recordings, gradients and all else that only further steps would need."""
        self._phase = self._carry_out = None
        for name, parameters in self.groups.items():
            optimizer: Any = self.optimizers[name]
            optimizer.grad_scale = optimizer.found_inf = None
            optimizer.param_groups[0]["lr"] = self.schedule.lr
            for parameter in parameters:
                parameter.grad = None

    def __call__(self, rows: Tensor, progress: float, labelled: Tensor | None) -> Outcome:
        """One step.

        Args:
            rows: of the whole batch, (B,).
            progress: how much of training is over, 0 … 1.
            labelled: those of the labelled examples beside it, (B,), or None without any.
        """
        assert self._carry_out is not None, "begin comes first"
        mine, lr = part(rows), self.schedule.learning_rate(progress)
        told = () if labelled is None else (part(labelled),)
        if self.recorded:
            now = self._scalar(progress, torch.float64), self._scalar(lr, torch.float32)
            finite = self._carry_out(mine, *now, *told)
        else:
            finite = self._carry_out(mine, progress, lr, *told)
        self._add(["examples"], self._scalar(len(own(mine)), self._total))
        names = self._names[len(mine)]
        if not self.recorded:
            return Outcome(names, finite, None)
        # The next step writes into the same tensor.
        ready = torch.cuda.Event() if finite.is_cuda else None
        finite = finite.to("cpu", non_blocking=True, copy=True)
        if ready is not None:
            ready.record()
        return Outcome(names, finite, ready)

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
            held_back = self._scalar(0.0, torch.float32)
        with self.fabric.autocast():
            seen, latents = prepared(x[rows]), None if z is None else z[rows]
            told = None
            if known is not None and labelled is not None:
                told = Labelled(prepared(known.x[labelled]), known.label[labelled])
            updates = phase.objective.updates(self.model, Batch(seen, progress, told, latents))
        names: Names = []
        finite: list[Tensor] = []
        self._names[len(rows)] = names
        while True:
            with self.fabric.autocast():
                update = next(updates, None)
            if update is None:
                break
            good = self._apply(update, phase.frozen, lr, held_back)
            values = {name: own(value.detach()) for name, value in update.terms.items()}
            names.append(tuple(values))
            # A step has dozens of terms and counts: each operation is for as many of them as can be.
            totals = torch.stack([self._scalar(0.0, self._total), *(self._sum(value) for value in values.values())])[1:]
            finite += [good[None], totals.isfinite()]
            if held_back is None and not good:
                break
            kept = self._scalar(1.0, self._total)
            if held_back is not None:
                totals, kept = torch.where(held_back > 0, 0.0, totals), kept - held_back
            self._add(values, totals)
            for count in dict.fromkeys(value.numel() for value in values.values()):
                self._add([f"count/{name}" for name, value in values.items() if value.numel() == count], kept * count)
        return torch.cat(finite) if finite else self._scalar(True, torch.bool).expand(0)

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
            return self._scalar(True, torch.bool)
        for parameter in parameters:
            parameter.grad = None
        loss = mean(update.loss)
        self.fabric.backward(loss, inputs=parameters)
        grads, loss = [parameter.grad for parameter in parameters if parameter.grad is not None], loss.detach()
        self.processes.add_up([*grads, loss])
        norm, clip_norm = _total_norm(grads), self.schedule.clip_norm
        good = torch.isfinite(loss + norm)
        if held_back is not None:
            held_back.copy_(torch.maximum(held_back, (~good).to(held_back)))
        elif not good:
            return good
        scale = None
        if clip_norm > 0 and (held_back is not None or norm > clip_norm):
            scale = (norm / clip_norm).clamp(min=1.0).float()
        if scale is not None and not self.fused:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
            scale = None
        for name in active:
            optimizer: Any = self.optimizers[name]
            optimizer.param_groups[0]["lr"] = lr
            # Torch's names for what a fused step does besides: it divides by the one, and the other holds it back.
            optimizer.grad_scale, optimizer.found_inf = scale, held_back
            optimizer.step()
        return good

    def _add(self, names: Iterable[str], values: Tensor) -> None:
        """Add values (N,) to the sums of N names, or one value () to each of them."""
        for name in names:
            if name not in self.sums:
                self.sums[name] = self._scalar(0.0, self._total)
        if sums := [self.sums[name] for name in names]:
            torch._foreach_add_(sums, list(values.expand(len(sums)).unbind()))

    def _sum(self, values: Tensor) -> Tensor:
        return values.sum(dtype=self._total)

    def _scalar(self, value: float, dtype: torch.dtype) -> Tensor:
        """On the device, which isn't waited for."""
        return torch.full((), value, dtype=dtype, device=self.fabric.device)


def _total_norm(grads: list[Tensor]) -> Tensor:
    """The norm of all gradients together, (); on a CPU row by row, which is faster there."""
    by_row = torch.linalg.vector_norm
    return torch.nn.utils.get_total_norm(
        [by_row(grad.flatten(1), dim=1) if grad.is_cpu and grad.dim() > 1 else grad for grad in grads]
    )
