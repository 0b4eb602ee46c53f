"""slices: which tower, pass and layer a device was at, and when."""

import dataclasses
import re
from collections.abc import Callable, Sequence

from towers.placement.scopes import is_backward, layer_of, tower_of
from towers.report.profile import Op

_TAPES = re.compile(r"^(gradients(_\d+)?|gradient_tape)/")
_DEEP = 2  # scopes of an op outside of towers, "sequential_1/replicate"


@dataclasses.dataclass(frozen=True)
class Slice:
    """A time in which a device was at one thing.

    Attributes:
      device: which.
      name: of the thing: "tower_0", "tower_0 backward", "tower_0/dense backward".
      start: in seconds.
      end: likewise.
      count: how many ops.
    """

    device: str
    name: str
    start: float
    end: float
    count: int = 1


def tower_name(op: Op) -> str:
    """ "tower_0", or "" of an op that is no tower's."""
    tower = tower_of(op.name)
    return f"tower_{tower[0]}" if tower else ""


def pass_name(op: Op) -> str:
    """ "tower_0 forward", or "" of an op that is no tower's."""
    tower = tower_name(op)
    return tower and f"{tower} {_way(op)}"


def layer_name(op: Op) -> str:
    """ "tower_0/dense forward"; of an op outside of towers, its scopes."""
    tower = tower_of(op.name)
    if tower is None:
        return "/".join(_TAPES.sub("", op.name).split("/")[:-1][:_DEEP])
    layer = layer_of(tower[1])
    return f"tower_{tower[0]}/{layer} {_way(op)}" if layer else ""


def _way(op: Op) -> str:
    return "backward" if is_backward(op.name) else "forward"


def slices(ops: Sequence[Op], named: Callable[[Op], str]) -> list[Slice]:
    """Ops of one name that followed each other on a device, as one.

    Args:
      ops: in order of time.
      named: what an op is of; "" leaves it out.

    Returns:
      In the order in which they began.
    """
    parts: list[Slice] = []
    latest: dict[tuple[str, str], int] = {}  # by device and name
    last: dict[str, str] = {}  # by device the name that began last
    for op in ops:
        name, end = named(op), op.start + op.seconds
        if not name:
            continue
        k = latest.get((op.device, name))
        if k is not None and (
            last[op.device] == name or op.start <= parts[k].end
        ):
            parts[k] = dataclasses.replace(
                parts[k], end=max(parts[k].end, end), count=parts[k].count + 1
            )
        else:
            latest[op.device, name] = len(parts)
            parts.append(Slice(op.device, name, op.start, end))
        last[op.device] = name
    return parts
