"""summary: what a report comes to, by device, pair of devices and machine.

Text, page, drawing and figure only show it. A machine is a process, as a worker is
one with all its GPUs.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from towers.placement.device_names import process_of
from towers.report.partitions import Transfer
from towers.report.parts import WITHIN, Part
from towers.report.variables import VariableUse

# What variables are, and what people call those of a kind.
KINDS = {"parameter": "parameters", "slot": "slots", "state": "state"}
HERE = "/job:localhost/replica:0/task:0"


@dataclasses.dataclass(frozen=True)
class Summary:
    """Sums of a report.

    Attributes:
      devices: all that it speaks of, those of a machine together.
      ran: how many ops, by device.
      held: bytes of variables, by (device, kind).
      crossed: how many transfers, by (source, target).
      bytes_between: their bytes; 0 for what is not known.
      by_layer: the same bytes, by (layer, kind of what crossed).
    """

    devices: tuple[str, ...]
    ran: collections.Counter
    held: collections.Counter
    crossed: collections.Counter
    bytes_between: dict[tuple[str, str], int]
    by_layer: dict[tuple[str, str], int] = dataclasses.field(
        default_factory=dict
    )

    @property
    def by_kind(self) -> dict[str, int]:
        """Bytes by what crossed, most first."""
        totals: collections.Counter = collections.Counter()
        for (_, kind), count in self.by_layer.items():
            totals[kind] += count
        return dict(totals.most_common())

    @property
    def within_towers(self) -> int:
        """Bytes that one part of a tower sent to another, which is pinned."""
        return sum(self.by_kind.get(kind, 0) for kind in WITHIN)

    @property
    def machines(self) -> dict[str, list[str]]:
        """The devices of each machine, which is called by its task."""
        by_task: dict[str, list[str]] = {}
        for device in self.devices:
            by_task.setdefault(machine_of(device), []).append(device)
        return by_task

    @property
    def between_machines(self) -> dict[tuple[str, str], int]:
        """Bytes by (source, target), for tasks that are not the same."""
        totals: collections.Counter = collections.Counter()
        for (source, target), count in self.bytes_between.items():
            link = machine_of(source), machine_of(target)
            if link[0] != link[1]:
                totals[link] += count
        return dict(totals)

    @property
    def busiest_link(self) -> tuple[str, int, int] | None:
        """The machine that has most to send and to receive, and the bytes of both."""
        sent: collections.Counter = collections.Counter()
        received: collections.Counter = collections.Counter()
        for (source, target), count in self.between_machines.items():
            sent[source] += count
            received[target] += count
        if not sent:
            return None
        most = max(
            sorted({*sent, *received}), key=lambda m: sent[m] + received[m]
        )
        return most, sent[most], received[most]

    def of_kind(self, kind: str) -> dict[str, int]:
        """Bytes of variables of a kind, by device."""
        return {
            device: count
            for (device, its), count in self.held.items()
            if its == kind
        }


def summed(
    nodes: Iterable[tuple[str, str, str]],
    transfers: Sequence[Transfer],
    variables: Sequence[VariableUse],
) -> Summary:
    """The sums of what a report is made of."""
    ran = collections.Counter(device for device, _, _ in nodes)
    held: collections.Counter = collections.Counter()
    for variable in variables:
        held[variable.device, variable.kind] += variable.bytes
    crossed: collections.Counter = collections.Counter()
    between: collections.Counter = collections.Counter()
    by_layer: collections.Counter = collections.Counter()
    for t in transfers:
        crossed[t.source, t.target] += 1
        between[t.source, t.target] += t.bytes or 0
        for part in t.parts or (Part("rest", bytes=t.bytes),):
            if part.bytes:
                by_layer[part.layer, part.kind] += part.bytes
    devices = {
        *ran,
        *(d for d, _ in held),
        *(d for pair in crossed for d in pair),
    }
    return Summary(
        tuple(sorted(devices, key=lambda d: (process_of(d), d))),
        ran,
        held,
        crossed,
        dict(between),
        dict(by_layer.most_common()),
    )


def machine_of(device: str) -> str:
    """The task that a device is of, by its full name."""
    return process_of(device) or HERE


def size(count: float) -> str:
    """Bytes in three digits: "1.23 MB"."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            value = count / 10**power
            return f"{value:.{max(0, 2 - (len(str(int(value))) - 1))}f} {unit}"
    return f"{count:.0f} B"


def least_bytes(
    sent: Mapping[tuple[Any, str, str], int],
    place: Callable[[str], str] = lambda device: device,
) -> int:
    """The bytes if each value crossed once to each place that received it.

    Args:
      sent: bytes by value, the device that made it, and one that received it.
      place: what a device counts as: itself, or its machine.
    """
    once = {
        (value, place(target)): count
        for (value, home, target), count in sent.items()
        if place(home) != place(target)
    }
    return sum(once.values())
