"""Several processes, each with a part of the windows: ``torchrun --nproc-per-node N -m kvq.cli calibrate ...``."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kvq.errors import KvqError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process's number and how many there are. One process alone talks to nobody."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """The GPU of this process; None leaves the choice to the loader."""
        if self.world > 1 and torch.cuda.is_available():
            return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"
        return None

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's consecutive part of the items; all parts together are the items, and differ by one at most."""
        start, stop = (len(items) * r // self.world for r in (self.rank, self.rank + 1))
        return items[start:stop]

    def agree(self, value: Any) -> Any:
        """The first process's value, in all processes."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, work: Callable[[], Result]) -> list[Result]:
        """Do each process's work, and return all results to the first process, in order of rank; [] to the others.

        If the work fails anywhere it fails in every process, with the first rank's error.
        """
        try:
            outcome: tuple[Any, KvqError | None] = (work(), None)
        except KvqError as error:
            outcome = (None, error)
        if self.world == 1:
            result, error = outcome
            if error is not None:
                raise error
            return [result]
        errors = [None] * self.world
        dist.all_gather_object(errors, outcome[1])
        for error in errors:
            if error is not None:
                raise error
        found = [None] * self.world if self.is_first else None
        dist.gather_object(outcome[0], found, dst=0)
        return found or []


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """Join the process group that torchrun describes in the environment; without torchrun, one process alone.

    Statistics travel between CPUs, so the group is gloo with any device.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), world)
    finally:
        dist.destroy_process_group()
