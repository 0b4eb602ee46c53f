"""relays: one copy of a value per tower, which crosses to each machine once.

A machine is a process. What several devices of another one want crosses the network
to one of them, the relay, and goes on from there; gradients are summed there on
their way back. So is what else towers say that becomes one (`units_of`). Relays are
shared out by bytes, so that no device carries all that its machine is sent.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from towers.engine.host import host_of
from towers.placement.device_names import process_of
from towers.verbs.replicate import replicate

# By device, for each tower None, or whether it had rows, see `Rows.kept`.
Kept = Callable[[str], Sequence[tf.Tensor | None]]


@dataclasses.dataclass
class Relays:
    """Chooses relays, each time of those devices that have carried least.

    Attributes:
      carried: bytes by device.
    """

    carried: dict[str, int] = dataclasses.field(default_factory=dict)

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
                least = min(devices, key=lambda name: self.carried.get(name, 0))
                self.carried[least] = self.carried.get(least, 0) + size
                relays[machine] = least
        return [relays.get(process_of(place), place) for place in places]


def units_of(places: Sequence[str], home: str) -> list[list[int]]:
    """Which towers' values are put together before they cross.

    Those of several towers of another machine, on one of its devices; others
    cross by themselves.

    Args:
      places: per tower, the device of its value.
      home: the device where all are wanted.
    """
    here = process_of(home)
    units: dict[Any, list[int]] = {}
    for i, place in enumerate(places):
        machine = process_of(place)
        units.setdefault(i if machine == here else machine, []).append(i)
    return [*units.values()]


def replicate_between(
    value: tf.Tensor,
    device: str,
    places: Sequence[str],
    relays: Relays,
    kept: Kept,
    half: tf.DType | None = None,
) -> list[tf.Tensor]:
    """As `replicate`, but once to each other machine.

    Args:
      value: of any dtype, on `device`.
      device: where it is.
      places: per tower, where it is wanted.
      relays: choose by what way it goes.
      kept: as for `replicate`, by device.
      half: as for `replicate`.
    """
    ways = relays.ways(device, places, size_of(value, half))
    if ways == list(places):
        return replicate(value, device, kept(device), half)

    def within(
        values: Sequence[tf.Tensor], home: str, _: Sequence[str], kept: Kept
    ) -> list[list[tf.Tensor]]:
        return [replicate(value, home, kept(home), half) for value in values]

    (column,) = by_relays([value], device, places, ways, kept, within)
    return column


def by_relays(
    values: Sequence[tf.Tensor],
    home: str,
    places: Sequence[str],
    ways: Sequence[str],
    kept: Kept,
    within: Callable[..., list[list[tf.Tensor]]],
) -> list[list[tf.Tensor]]:
    """Copies to those that are sent them, and of those to who they are for.

    Args:
      values: on `home`.
      home: where they are.
      places: where each tower takes its copies.
      ways: where they cross to, see `Relays`.
      kept: of the towers.
      within: `within(values, home, places, kept)` gives each value's copies, one
        per place, whose gradients are summed on `home`.

    Returns:
      For each value its copies, one per tower.
    """
    units: dict[Any, list[int]] = {}  # of towers that one copy is sent for
    for i, way in enumerate(ways):
        relayed = any(w == way != p for p, w in zip(places, ways))
        units.setdefault(way if relayed else i, []).append(i)

    def of_units(device: str) -> list[tf.Tensor | None]:
        flags = kept(device)
        return [flags[u[0]] if len(u) == 1 else None for u in units.values()]

    sent_to = [ways[unit[0]] for unit in units.values()]
    columns = within(values, home, sent_to, of_units)
    by_tower: list[dict[int, tf.Tensor]] = [{} for _ in values]
    for k, (relay, unit) in enumerate(zip(sent_to, units.values())):
        copies = [column[k] for column in columns]
        served = [[copy] for copy in copies]
        if len(unit) > 1:
            of_unit = functools.partial(_of_unit, kept, unit)
            arrived = [at_relay(relay, copy) for copy in copies]
            own = [places[i] for i in unit]
            served = within(arrived, relay, own, of_unit)
        for of_value, column in zip(by_tower, served):
            of_value.update(zip(unit, column))
    return [[of_value[i] for i in range(len(places))] for of_value in by_tower]


def _of_unit(
    kept: Kept, unit: Sequence[int], device: str
) -> list[tf.Tensor | None]:
    flags = kept(device)
    return [flags[i] for i in unit]


def at_relay(relay: str, value: tf.Tensor) -> tf.Tensor:
    """The value on a relay; strings, which no GPU has, on its host."""
    with tf.device(host_of(relay) if value.dtype == tf.string else relay):
        return tf.identity(value)


def size_of(value: tf.Tensor, dtype: tf.DType | None = None) -> int:
    """Bytes, in a dtype if not in its own; 0 if nobody knows."""
    return (value.shape.num_elements() or 0) * (dtype or value.dtype).size
