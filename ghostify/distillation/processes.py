"""One process or several: who this one is, and what all of them agree on.

``torchrun`` and ``accelerate launch`` tell a process its place in environment variables; nothing else
is needed. Every process goes through the same batches and takes its own rows of each, so that several
processes learn what one would from the same data, no example lost and none seen twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ghostify.distillation.batches import Batch
from ghostify.distillation.randomness import mix, reseed
from ghostify.errors import InputsError, TrainingError
from ghostify.extras import require


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: The number of this one, from 0.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and reports."""
        return self.rank == 0

    def wrapped(self, student: nn.Module) -> nn.Module:
        """The student with its gradients averaged over the processes; alone, the student itself."""
        return student if self.count == 1 else DistributedDataParallel(student)

    def apart(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """A context in which gradients gather in each process for itself."""
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.count > 1:
            dist.all_reduce(numbers)
        return numbers

    def agree(self, model: nn.Module) -> None:
        """Give every process the first one's buffers: each has seen its own rows."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def check_position(self, epoch: int, step: int, device: torch.device) -> None:
        """See that all processes go on at the same place.

        Args:
            epoch: Where this one does.
            step: Steps of it that are done.
            device: Where the models are.

        Raises:
            TrainingError: They do not: some found another state, or none.
        """
        if self.count == 1:
            return
        places = self._everyones(torch.tensor([epoch, step], device=device))
        for rank, place in enumerate(places):
            if place.tolist() != places[0].tolist():
                raise TrainingError(
                    f"process {rank} goes on at epoch={place[0]}, step={place[1]}, and process 0 at "
                    f"epoch={places[0][0]}, step={places[0][1]}. Give all of them the same folder as out, on a disk "
                    "that all machines share."
                )

    def check_data(self, batch: Batch, name: str) -> None:
        """See that all processes go through the same data.

        Args:
            batch: The first one that this process reads, before anything is shared out.
            name: ``data`` or ``val``, for messages.

        Raises:
            InputsError: They do not, so that rows would be lost, and others learned from twice.
        """
        if self.count == 1:
            return
        everyones = self._everyones(batch_facts(batch))
        for rank, facts in enumerate(everyones):
            if not alike(facts, everyones[0]):
                raise InputsError(
                    f"process {rank} reads another first batch of {name} than process 0. Each goes through all of "
                    f"{name} and takes its own rows of every batch, so give all of them the same: a loader without a "
                    "DistributedSampler, that has not been through accelerator.prepare."
                )

    def _everyones(self, own: Tensor) -> list[Tensor]:
        """The tensor of every process, in the order of their ranks."""
        gathered = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(gathered, own)
        return gathered

    def rows(self, size: int) -> slice:
        """Which of the rows of a batch are this process's: parts of equal size, give or take one.

        Example:
            >>> [Processes(rank, 3).rows(7) for rank in range(3)]
            [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
        """
        each, more = divmod(size, self.count)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))


def batch_facts(batch: Batch) -> Tensor:
    """Four numbers, ``(4,)`` float64, by which the inputs of a batch are told from others, and from another order."""
    size, values = len(batch.inputs), batch.inputs.double()
    places = torch.arange(1, size + 1, dtype=values.dtype, device=values.device)
    squares = values.square().reshape(size, -1).sum(1)  # of each example: in another order they are others
    return torch.stack([places[-1], values.sum(), squares.sum(), squares @ places])


def alike(facts: Tensor, others: Tensor) -> bool:
    """Whether facts are of the same batch; kinds of processors may add up in another order."""
    return torch.allclose(facts, others, rtol=1e-6, equal_nan=True)


def launched(device: torch.device) -> Processes:
    """Find out how this process was started, and join the others.

    Args:
        device: Where the models are.

    Raises:
        MissingExtraError: There are several processes, and accelerate is not installed.
        TrainingError: The models are not where this process should compute.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized():
        return Processes()
    if not dist.is_initialized():  # accelerate knows the launchers, the back ends and the devices
        require("accelerate", extra="scale").PartialState(cpu=device.type == "cpu")
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        raise TrainingError(
            f"student is on {device}, and process {dist.get_rank()} should compute on cuda:"
            f"{torch.cuda.current_device()}. Move both models there: .to(accelerate.PartialState().device)."
        )
    return Processes(dist.get_rank(), dist.get_world_size())


@dataclass(frozen=True)
class Item:
    """What the data gave for one step.

    Attributes:
        step: Its number in the epoch, from 0.
        value: The batch as the data gave it, this process's rows or all of them.
        is_part: Whether it holds this process's rows only.
        counts: Whether it is to be learned from; not where this process has no rows of the batch.
    """

    step: int
    value: Any
    is_part: bool = False
    counts: bool = True


def begin_epoch(data: Iterable[Any], epoch: int, *, seed: int, device: torch.device) -> None:
    """Make all that data may draw from depend on the epoch alone.

    Args:
        data: If it has ``set_epoch``, that is called with the epoch's number from 0. The ``generator`` that a
            ``DataLoader`` or its sampler was given is seeded anew.
        epoch: From 1.
        seed: Of the run.
        device: Where the models are.
    """
    reseed(seed, epoch, 0, device)
    for drawing in (data, getattr(data, "sampler", None)):
        if isinstance(own := getattr(drawing, "generator", None), torch.Generator):
            own.manual_seed(mix(seed, epoch))
    if callable(set_epoch := getattr(data, "set_epoch", None)):
        set_epoch(epoch - 1)


def read_epoch(
    data: Iterable[Any], epoch: int, first: int, *, processes: Processes, seed: int, device: torch.device
) -> Iterator[Item]:
    """The batches of an epoch from number ``first`` on, each read (and learned from) with random numbers of its own.

    What comes later therefore depends on nothing that came before: a run may go on anywhere. Data with
    ``starting_at`` begin there; of others the batches before are read and passed over.

    Args:
        data: If it has ``set_epoch``, that is called with the epoch's number from 0; if it has ``shard``, a
            process reads its own rows only.
        epoch: From 1.
        first: Batches to leave out.
        processes: Who this process is.
        seed: Of the run.
        device: Where the models are.
    """
    shard: Callable[..., Any] | None = getattr(data, "shard", None) if processes.count > 1 else None
    is_part, steps = callable(shard), 0
    if is_part:
        steps = len(data)  # type: ignore[arg-type]  # of all processes; what has shards has a length
        data = shard(processes.rank, processes.count)  # type: ignore[misc]
    begin_epoch(data, epoch, seed=seed, device=device)
    begun = 0
    if first and callable(starting_at := getattr(data, "starting_at", None)):
        # At the last batch at least: a process without rows of the batch to go on with needs another in its place.
        begun = min(first, len(data) - 1) if is_part else first  # type: ignore[arg-type]
        data = starting_at(begun)
    batches, step, value = iter(data), begun, None
    while True:
        reseed(seed, epoch, step + 1, device)
        try:
            value, counts = next(batches), True
        except StopIteration:
            # The last batch of an epoch may have fewer rows than there are processes.
            if value is None or step >= steps:
                return
            counts = False
        if step >= first:
            yield Item(step, value, is_part, counts)
        step += 1
