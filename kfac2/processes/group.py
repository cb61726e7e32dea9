"""A group of processes of torch.distributed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed

from kfac2.draws import drawn_apart
from kfac2.processes.base import Part, Processes, Told
from kfac2.processes.buckets import in_buckets
from kfac2.processes.fingerprints import fingerprint

OCCASIONS = ("statistics", "rows", "nothing", "accumulate", "closure", "state_dict", "share")
WIDTH = 8  # numbers of a rank at a meeting, whatever the occasion: so no two messages have different sizes
_PARTS: WeakKeyDictionary[distributed.ProcessGroup, dict[object, distributed.ProcessGroup]] = WeakKeyDictionary()
"""Groups of some processes of a group, by their ranks: they last as long as that, made once for all optimizers."""


class Group(Processes):
    """Processes that talk through a process group, which has DDP's messages, too.

    Args:
        group: the process group.
        device: of the layers.

    Attributes:
        traffic: bytes that were handed to each kind of collective, and how many there were.

    Raises:
        ValueError: if the group cannot send tensors of that device.
    """

    def __init__(self, group: distributed.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        self._device = _device_for_numbers(group, device)
        self.traffic: Counter[tuple[str, str]] = Counter()
        with self._named("broadcast of the seed of drawn labels"):
            seed = torch.tensor(torch.initial_seed() % 2**63, device=self._device)
            distributed.broadcast(seed, group=group, group_src=0)
        self.seed = int(seed)

    def _check_is_there(self) -> None:
        try:
            is_there = distributed.is_initialized() and bool(distributed.get_process_group_ranks(self._group))
        except (RuntimeError, ValueError, KeyError):
            is_there = False
        if not is_there:
            raise RuntimeError(
                "process_group must stay as long as the optimizer trains, got one that was destroyed: build the "
                "optimizer anew, and load its state"
            )

    def labels(self, moment: int, number: int) -> AbstractContextManager[None]:
        """Seed torch's generators by seed, moment, number and rank; afterwards they are as they were.

        So nothing but the seed is to be saved, and a run that is resumed draws the same labels.
        """
        return drawn_apart(self.seed, moment, number, self.rank)

    def added(self, what: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Add up tensors of all ranks: one all-reduce for each dtype, the next copied while the last is on its way."""

        def begin(flat: Tensor) -> Callable[[], None]:
            return self._begin("all_reduce", f"all-reduce of {what}", flat)

        return in_buckets(tensors, begin)

    def parts(self, ranks: Sequence[Sequence[int]]) -> Part:
        """Make groups, of which all processes of torch.distributed make each; or return those that were made."""
        world = distributed.get_world_size()
        if self.size != world:
            raise ValueError(
                f"process_group must have all {world} processes of torch.distributed, or share must be 'all', "
                f"'inverses' or 'gradients', got a group of {self.size}: all processes have to make the smaller groups"
            )
        known, key = _PARTS.setdefault(self._group, {}), repr(ranks)
        if key not in known:
            numbers = distributed.get_process_group_ranks(self._group)
            backends, timeout = distributed.get_backend_config(self._group), _timeout(self._group, self._device)
            with self._named("making of groups of processes"):
                made = [
                    distributed.new_group([numbers[rank] for rank in own], timeout, backends)  # in one order in all
                    for own in ranks
                ]
            known[key] = next(group for own, group in zip(ranks, made, strict=True) if self.rank in own)
        return known[key]

    def send(self, what: str, flat: Tensor, owner: int, part: Part = None) -> Callable[[], None]:
        """Begin a broadcast."""
        source = distributed.get_global_rank(self._group, owner)
        group = part if isinstance(part, distributed.ProcessGroup) else self._group
        return self._begin("broadcast", f"broadcast of {what} by rank {owner}", flat, group=group, src=source)

    def _begin(
        self, collective: str, what: str, flat: Tensor, group: distributed.ProcessGroup | None = None, **source: int
    ) -> Callable[[], None]:
        self._count(collective, flat)
        with self._named(what):
            work = getattr(distributed, collective)(flat, group=group or self._group, async_op=True, **source)

        def wait() -> None:
            with self._named(what):
                work.wait()

        return wait

    def meet(self, occasion: str, facts: Callable[[], Mapping[str, object]], own: Mapping[str, float]) -> Told:
        """Gather one row of numbers from each rank, of the same size on every occasion: all facts are one of them."""
        self._check_is_there()
        known = facts()
        numbers = [OCCASIONS.index(occasion), fingerprint(sorted(known.items())), *own.values()]
        row = torch.zeros(WIDTH, dtype=torch.float64)
        row[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
        row = row.to(self._device)
        rows = torch.empty(self.size, WIDTH, dtype=torch.float64, device=self._device)
        self._count("all_gather", rows)
        with self._named(f"all-gather of what is agreed on ({occasion})"):
            distributed.all_gather([*rows.unbind()], row, group=self._group)
        table = rows.tolist()
        if len({tuple(row[:2]) for row in table}) > 1:  # they all know by now that something is not alike
            self._differ([OCCASIONS[int(row[0])] for row in table], known)
        columns = list(zip(*(row[2:] for row in table), strict=True))
        return Told(dict(zip(own, columns, strict=False)))

    def _differ(self, occasions: Sequence[str], facts: Mapping[str, object]) -> NoReturn:
        told = [f"what they meet for is {_by_rank(occasions)}"] if len({*occasions}) > 1 else []
        told += self._different(facts)
        hint = ""
        if any("checksum" in one for one in told):
            hint = " (before each step, gradients must have been averaged over them, as DistributedDataParallel does)"
        raise RuntimeError(f"all ranks must train alike, got other values on some of them: {'; '.join(told)}{hint}")

    def _different(self, facts: Mapping[str, object]) -> list[str]:
        """Compare facts with those of the other ranks; return sentences about those that differ."""
        gathered: list[Mapping[str, object]] = [{} for _ in range(self.size)]
        with self._named("all-gather of settings"):
            distributed.all_gather_object(gathered, dict(facts), group=self._group)
        names = dict.fromkeys(name for one in gathered for name in one)
        columns = {name: [one.get(name, "nothing") for one in gathered] for name in names}
        return [f"{name} is {_by_rank(own)}" for name, own in columns.items() if len({*map(repr, own)}) > 1]

    def check_alike(self, facts: Callable[[], Mapping[str, object]]) -> None:
        """Compare facts with those of the other ranks."""
        told = self._different(facts())
        if told:
            raise ValueError(
                f"all ranks must be built alike, got other values on some of them: {'; '.join(told)}. Models that "
                "differ are made alike by DistributedDataParallel, or by broadcasting their parameters, before the "
                "optimizer is built"
            )

    def _count(self, collective: str, tensor: Tensor) -> None:
        self.traffic[collective, "bytes"] += tensor.numel() * tensor.element_size()
        self.traffic[collective, "messages"] += 1

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Say which collective it was that failed."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"the {what} failed on rank {self.rank} of {self.size}: another process has ended, or did not come "
                f"within the group's timeout. Start all of them again from the last checkpoint ({error})"
            ) from error


def _device_for_numbers(group: distributed.ProcessGroup, device: torch.device) -> torch.device:
    """Return where what is read by the host may lie: on the CPU if the group sends from there."""
    backends = _backends(group)
    backend = backends.get(device.type)
    if backend is None or (device.type == "cuda" and backend == "gloo"):
        wanted = "nccl" if device.type == "cuda" else "gloo"
        raise ValueError(
            f"process_group must have a backend for {device.type}, where the layers are, got {backends}: take "
            f"init_process_group('{device.type}:{wanted}'), or process_group=None to train each process by itself"
        )
    return torch.device("cpu") if "cpu" in backends else device


def _timeout(group: distributed.ProcessGroup, device: torch.device) -> timedelta | None:
    """Return the timeout of a group, which groups of its processes are to have, too; None: torch's own."""
    return getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)


def _backends(group: distributed.ProcessGroup) -> dict[str, str]:
    """Return the backend of each type of device."""
    backends = {}
    for device in ("cpu", "cuda"):
        try:
            name = type(group._get_backend(torch.device(device))).__name__
        except RuntimeError:
            continue
        backends[device] = name.removeprefix("ProcessGroup").strip("_").lower()
    return backends


def _by_rank(values: Sequence[object]) -> str:
    """Write values with the ranks that have them; many ranks that have the same in one."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(repr(value), []).append(rank)
    told = []
    for value, own in ranks.items():
        shown = ", ".join(map(str, own[:8])) + (", ..." if len(own) > 8 else "")
        told.append(f"{value} on rank{'s' if len(own) > 1 else ''} {shown}")
    return " and ".join(told)
