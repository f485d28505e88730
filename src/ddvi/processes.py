"""The processes that train a model together, one for each device.

Each has the whole model, the whole data and the same random state, and computes its part of every batch
(`ddvi.randomness.Shard`). Gradients are summed over them, so that all take the same step, and whatever one of them
decides all decide. Alone, a process has nothing to agree on, and nothing here costs it anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import final

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ddvi.errors import InputError
from ddvi.randomness import Shard, random_state, reduce, set_random_state


@final
class Processes:
    """All processes of a fabric, seen from one of them.

    Args:
        fabric: launched, where it has more than one.

    Raises:
        InputError: it has more than one, and isn't launched.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.several: bool = fabric.world_size > 1
        self.first: bool = fabric.global_rank == 0
        """Whether this one writes and speaks for all."""
        if self.several and not torch.distributed.is_initialized():
            raise InputError(
                f"the fabric has {fabric.world_size} devices but no processes yet; call its launch() first"
            )

    def shard(self, count: int) -> Shard | None:
        """This process's rows of a batch of so many; None where it has all of them."""
        return Shard(count, self.fabric.global_rank, self.fabric.world_size) if self.several else None

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes: one message for all of them."""
        if not self.several or not tensors:
            return
        summed = torch.cat([tensor.flatten() for tensor in tensors])
        reduce(summed)
        for tensor, value in zip(tensors, summed.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(value.view_as(tensor))

    def total(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums over the processes of scalars by name."""
        if not self.several:
            return dict(values)
        summed = [value.clone().to(self.fabric.device) for value in values.values()]
        self.add_up(summed)
        return dict(zip(values, summed, strict=True))

    def any(self, flags: Iterable[bool]) -> list[bool]:
        """Whether each flag is raised in any of the processes."""
        flags = list(flags)
        if not self.several or not flags:
            return flags
        raised = torch.tensor(flags, dtype=torch.uint8, device=self.fabric.device)
        reduce(raised, torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.several:
            self.fabric.barrier()

    @torch.no_grad()
    def start_alike(self, model: nn.Module, sizes: Sequence[int]) -> None:
        """Give every process the weights and the random state of the first.

        Args:
            model: its own.
            sizes: of the data that it was given.

        Raises:
            InputError: the sizes differ from those of the first.
        """
        if not self.several:
            return
        tensors, states, here = [*model.parameters(), *model.buffers()], random_state(), str(self.fabric.device)
        mine = [tensor.detach().cpu() for tensor in tensors], states["cpu"], states.get(here), list(sizes)
        theirs, cpu, device, first_sizes = self.fabric.broadcast(mine)
        if True in self.any([first_sizes != list(sizes)]):
            raise InputError("the processes were given different amounts of data; give each of them all of it")
        for tensor, value in zip(tensors, theirs, strict=True):
            tensor.copy_(value)
        # Of random states those of the CPU and of the process's own device count, which each calls by another name.
        set_random_state({"cpu": cpu} if device is None else {"cpu": cpu, here: device})
