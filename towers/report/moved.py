"""moved: ops that are elsewhere than they were asked to be."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import tensorflow as tf

from towers.placement.device_names import agrees, short
from towers.report.summary import HERE


@dataclasses.dataclass(frozen=True)
class Moved:
    """An op that soft placement puts elsewhere than asked.

    Attributes:
      op: its name.
      kind: its type.
      asked, got: the devices.
    """

    op: str
    kind: str
    asked: str
    got: str


def moved(
    nodes: Iterable[tuple[str, str, str]], asked: Mapping[str, str]
) -> list[Moved]:
    """Ops that are not where they were asked to be.

    Args:
      nodes: (device, name, op type) of those that there are.
      asked: devices by the names of ops, maybe of others; "" for any.
    """
    return [
        Moved(name, kind, short(asked[name]), device)
        for device, name, kind in nodes
        if asked.get(name) and not _agrees(asked[name], device)
    ]


@functools.cache
def _agrees(wish: str, device: str) -> bool:
    here = tf.DeviceSpec.from_string(HERE)
    asked, got = (
        here.make_merged_spec(tf.DeviceSpec.from_string(name))
        for name in (wish, device)
    )
    return agrees(asked, got)
