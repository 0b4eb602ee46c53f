"""waits: time in which devices ran nothing until something came."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from towers.report.profile import Crossing, Interval


@dataclasses.dataclass(frozen=True)
class Wait:
    """Time in which a device ran nothing, until a tensor arrived.

    Attributes:
      device: which waited.
      tensor: for what, by its name, as an `ExecutionReport` has it.
      source: the device that this came from.
      seconds: how long.
      start: since when, in seconds from the beginning.
      holds: what the tensor holds in words; "" if unknown.
    """

    device: str
    tensor: str
    source: str
    seconds: float
    start: float
    holds: str = ""

    @property
    def what(self) -> str:
        """What was waited for: in words, where these are known."""
        return self.holds or self.tensor


def longest_waits(
    running: Mapping[str, Sequence[Interval]],
    crossings: Sequence[Crossing],
    start: float,
) -> tuple[Wait, ...]:
    """Every wait, the longest first.

    Args:
      running: by device when it ran something.
      crossings: what crossed between devices, in the order of arrival.
      start: when the first op began, on the same clock.
    """
    arrived: dict[str, list[Crossing]] = collections.defaultdict(list)
    for crossing in crossings:
        arrived[crossing.target].append(crossing)
    waits = []
    for device, intervals in running.items():
        gap = start
        for begun, end in intervals:
            # What came last before the device went on is what it lacked.
            arrivals = [c for c in arrived[device] if gap < c.arrived <= begun]
            if arrivals:
                last = arrivals[-1]
                waits.append(
                    Wait(
                        *(device, last.tensor, last.source),
                        *(last.arrived - gap, gap - start, last.holds),
                    )
                )
            gap = end
    return tuple(sorted(waits, key=lambda wait: -wait.seconds))
