"""machines: by which of a machine's devices a value goes to its towers.

A machine is a process. What several devices of another one want crosses the network
to one of them, the relay, and goes on from there; gradients are summed there on
their way back. Relays are shared out by bytes, so that no device carries all that
its machine is sent.
"""

import collections
from collections.abc import Sequence

from towers.placement.device_names import process_of


class Relays:
    """Chooses relays, each time of those devices that have carried least."""

    def __init__(self) -> None:
        self._carried: dict[str, int] = collections.defaultdict(int)

    def ways(self, home: str, places: Sequence[str], size: int) -> list[str]:
        """Where a value crosses to, for each of those who want it.

        Args:
          home: the device where it is.
          places: per tower, the device that wants it.
          size: bytes, a relay's load.

        Returns:
          Per tower its own device, or the relay of its machine, which is the
          device of one of that machine's towers.
        """
        here = process_of(home)
        machines = collections.defaultdict(list)
        for place in dict.fromkeys(places):
            machines[process_of(place)].append(place)
        relays = {}
        for machine, devices in machines.items():
            if machine != here and len(devices) > 1:
                least = min(devices, key=lambda device: self._carried[device])
                self._carried[least] += size
                relays[machine] = least
        return [relays.get(process_of(place), place) for place in places]
