"""A plan of what K-FAC in several processes sends, holds and waits for, from the shapes of the layers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kfac2.division import owners_of
from kfac2.processes.group import WIDTH

SHARES = ("all", "inverses", 0.5, "gradients")
Share = str | float
KINDS = ("ordinary", "statistics", "inverses")
FLOAT = 4  # bytes of a number of factors, inverses, gradients


class Work(NamedTuple):
    """A network.

    Attributes:
        title: for tables.
        layers: (blocks, d_out, d_in) of each handled layer.
        parameters: numbers of all parameters.
        coarse_maps: rows of each matrix of sums; 0 with one level.
    """

    title: str
    layers: Sequence[tuple[int, int, int]]
    parameters: int
    coarse_maps: int = 0


class Link(NamedTuple):
    """What connects the processes.

    Attributes:
        title: for tables.
        bandwidth: bytes a second, of one process.
        latency: seconds of one message to a neighbour.
    """

    title: str
    bandwidth: float
    latency: float


class Device(NamedTuple):
    """What inverts.

    Attributes:
        rate: multiplications and additions a second, of a Cholesky inverse, which has 2 n³.
    """

    rate: float


class Message(NamedTuple):
    """A collective: every process that takes part hands in, or receives, so many bytes.

    Attributes:
        collective: its name in torch.distributed.
        size: bytes.
        members: how many processes take part; None: all.
    """

    collective: str
    size: float
    members: int | None = None

    def sent(self, processes: int) -> float:
        """Return bytes that a process sends, in the mean over all: a ring, or a tree.

        An all-reduce passes each part around twice. Of a broadcast each member but one receives everything once.
        """
        others = (self.members or processes) - 1
        shares = {"all_reduce": 2 * others, "broadcast": others, "all_gather": others * processes}
        return shares[self.collective] / processes * self.size

    def hops(self, processes: int) -> float:
        """Return messages to a neighbour that follow each other."""
        others = (self.members or processes) - 1
        return {"all_reduce": 2, "broadcast": 1, "all_gather": 1}[self.collective] * others


def half(d: int) -> int:
    """Return numbers of an upper triangle."""
    return d * (d + 1) // 2


def shares_of(processes: int) -> list[Share]:
    """Return what `share` may be, but for a number that is one of the words."""
    return [share for share in SHARES if isinstance(share, str) or share * processes > 1]


def holders_of(share: Share, processes: int) -> int:
    """Return how many processes have the inverse of a layer."""
    if isinstance(share, str):
        return 1 if share == "gradients" else processes
    return round(share * processes)


def messages(work: Work, share: Share, kind: str, processes: int) -> list[Message]:
    """Return what is sent in a step of K-FAC, one level with `kl_bound` and Cholesky inverses.

    Args:
        work: the network.
        share: who inverts.
        kind: of the step; one with new inverses has new statistics, too.
        processes: how many.
    """
    result = []
    factors = sum(blocks * (half(d_in) + half(d_out)) for blocks, d_out, d_in in work.layers)
    if kind != "ordinary":
        counts = 8 * (5 * len(work.layers) + 2)
        pairs = 2 * half(work.coarse_maps) * FLOAT
        result += [
            Message("all_gather", 8 * WIDTH),
            Message("all_reduce", counts),
            Message("all_reduce", factors * FLOAT + pairs),
            Message("all_reduce", 16),  # the measured divergence
        ]
    if kind == "inverses" and share != "all":
        result.append(Message("all_reduce", 16 * len(work.layers)))
    holders = holders_of(share, processes)
    columns = processes // holders
    if kind == "inverses" and share != "all" and holders > 1:  # from each owner along its column
        sizes = owned(work, processes, factors_of)
        result += [Message("broadcast", size * FLOAT, holders) for size in sizes if size]
    if columns > 1:  # from each column along all rows
        sizes = held(work, processes, columns, matrix_of)
        result += [Message("broadcast", size * FLOAT, columns) for size in sizes if size for _ in range(holders)]
    return result


def taken_part_in(messages: Sequence[Message], processes: int) -> int:
    """Return of how many collectives a process is a member, in the mean."""
    return round(sum((m.members or processes) / processes for m in messages))


def factors_of(layer: tuple[int, int, int]) -> int:
    """Return numbers of both factors of a layer as they are held, and of both inverses as they are sent."""
    blocks, d_out, d_in = layer
    return blocks * (half(d_out) + half(d_in))


def matrix_of(layer: tuple[int, int, int]) -> int:
    """Return numbers of a layer's gradient."""
    blocks, d_out, d_in = layer
    return blocks * d_out * d_in


def held_by(layer: tuple[int, int, int]) -> int:
    """Return numbers of both inverses of a layer as they are held."""
    blocks, d_out, d_in = layer
    return blocks * (d_out**2 + d_in**2)


def cubes(layer: tuple[int, int, int]) -> int:
    """Return n³ of both factors."""
    blocks, d_out, d_in = layer
    return blocks * (d_out**3 + d_in**3)


def owned(work: Work, processes: int, size_of: Callable[[tuple[int, int, int]], int]) -> list[float]:
    """Return by owner the sum of a size over its layers."""
    owners = owners_of([cubes(layer) for layer in work.layers], processes)
    sizes = [0.0] * processes
    for layer, owner in zip(work.layers, owners, strict=True):
        sizes[owner] += size_of(layer)
    return sizes


def held(work: Work, processes: int, columns: int, size_of: Callable[[tuple[int, int, int]], int]) -> list[float]:
    """Return by column of holders the sum of a size over its layers."""
    sizes = owned(work, processes, size_of)
    return [sum(sizes[column::columns]) for column in range(columns)]


class Plan(NamedTuple):
    """What one process does.

    Attributes:
        sent: bytes by kind of step.
        messages: collectives by kind of step.
        seconds: that it sends, by kind of step; none of it hidden behind other work.
        inverting: seconds of the slowest one in an update of inverses.
        memory: bytes of factors, inverses and the largest message, of the one that has most.
    """

    sent: dict[str, float]
    messages: dict[str, int]
    seconds: dict[str, float]
    inverting: float
    memory: float

    def mean(self, cov_every: int = 5, inv_every: int = 10) -> float:
        """Return seconds of sending and inverting in the mean step."""
        weights = {"inverses": 1 / inv_every, "statistics": 1 / cov_every - 1 / inv_every}
        weights["ordinary"] = 1 - sum(weights.values())
        return sum(weights[kind] * self.seconds[kind] for kind in KINDS) + self.inverting / inv_every


def plan(work: Work, share: Share, processes: int, link: Link, device: Device) -> Plan:
    """Return the plan of one strategy."""
    of_kind = {kind: messages(work, share, kind, processes) for kind in KINDS}
    sent = {kind: sum(m.sent(processes) for m in own) for kind, own in of_kind.items()}
    seconds = {
        kind: sent[kind] / link.bandwidth + _hops(own, processes) * link.latency for kind, own in of_kind.items()
    }
    loads = [sum(map(cubes, work.layers))] if share == "all" else owned(work, processes, cubes)
    factors = sum(map(factors_of, work.layers)) * FLOAT  # as they are sent: one triangle of each
    columns = processes // holders_of(share, processes)
    inverses = max(held(work, processes, columns, held_by)) * FLOAT
    largest = max((m.size for own in of_kind.values() for m in own), default=0)
    return Plan(
        sent,
        {kind: taken_part_in(own, processes) for kind, own in of_kind.items()},
        seconds,
        2 * max(loads) / device.rate,
        factors + inverses + largest,
    )


def _hops(messages: Sequence[Message], processes: int) -> float:
    """Return messages to a neighbour that follow each other; broadcasts are all on their way together."""
    broadcasts = [m.hops(processes) for m in messages if m.collective == "broadcast"]
    return sum(m.hops(processes) for m in messages if m.collective != "broadcast") + max(broadcasts, default=0)


def gradients(work: Work, processes: int) -> float:
    """Return bytes that a process sends for DistributedDataParallel's mean of gradients, each step."""
    return Message("all_reduce", work.parameters * FLOAT).sent(processes)
