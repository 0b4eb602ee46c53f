"""trace_events: a timeline in the format that Perfetto and Chrome open.

The format: "Trace Event Format" of the Chromium project. A process per device,
whose threads are lanes: ops that ran at once stand in lanes of their own, below
the towers, passes and layers that they are of.
"""

from collections.abc import Sequence
from typing import Any

from towers.planning.slices import (
    layer_name,
    pass_name,
    slices,
    tower_name,
)
from towers.report.profile import Crossing, Op

# The first lanes of each kind, and of the next device: Perfetto takes threads of
# one number for one, and the number 0 for the process's own.
_NAMES = {"towers": tower_name, "passes": pass_name, "layers": layer_name}
_KINDS = {
    "towers": 0,
    "passes": 1000,
    "layers": 2000,
    "ops": 3000,
    "sent": 4000,
    "arrived": 5000,
}
_DEVICE = 10_000
_MOMENT = 1000  # nanoseconds, for what has a time and no length
# Viewers drop what overlaps in a lane, and some read times as floating point.
_APART = 2


def trace_events(
    devices: Sequence[str],
    ops: Sequence[Op],
    crossings: Sequence[Crossing],
    start: float,
    unseen: Sequence[str] = (),
) -> dict[str, Any]:
    """All of it as one object, fit for JSON; times from `start` on."""
    number = {device: i for i, device in enumerate(devices, 1)}
    lanes = _Lanes()
    events: list[dict[str, Any]] = []
    for device, i in number.items():
        mark = " (not seen)" if device in unseen else ""
        events.append(_named("process_name", i, 0, device + mark))
        order = _event("M", "process_sort_index", i, 0)
        events.append({**order, "args": {"sort_index": i}})
    for kind, named in _NAMES.items():
        for part in slices(ops, named):
            begin = _nanoseconds(part.start - start)
            end = max(begin, _nanoseconds(part.end - start))
            process = number.get(part.device, 0)
            lane = lanes.of(process, kind, begin, end)
            events.append(
                {
                    **_event("X", part.name, process, lane),
                    "cat": kind,
                    **_times(begin, end),
                    "args": {"ops": part.count},
                }
            )
    for op in ops:
        begin = _nanoseconds(op.start - start)
        end = max(begin, _nanoseconds(op.start + op.seconds - start))
        process = number.get(op.device, 0)
        lane = lanes.of(process, "ops", begin, end)
        events.append(
            {
                **_event("X", op.name, process, lane),
                "cat": op.kind,
                **_times(begin, end),
                "args": {"type": op.kind},
            }
        )
    events += _crossed(crossings, number, lanes, start)
    events += [
        _named("thread_name", process, lane, kind)
        for process, lane, kind in lanes.used()
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


class _Lanes:
    """Rows of a device in which nothing overlaps: the first that is free."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, str], list[int]] = {}

    def of(self, process: int, kind: str, begin: int, end: int) -> int:
        """The number of the lane, for what is asked for in order of time."""
        ends = self._ends.setdefault((process, kind), [])
        lane = next(
            (k for k, last in enumerate(ends) if last + _APART <= begin),
            len(ends),
        )
        ends[lane : lane + 1] = [end]
        return process * _DEVICE + _KINDS[kind] + lane

    def used(self) -> list[tuple[int, int, str]]:
        """Processes, with their lanes and kinds."""
        return [
            (process, process * _DEVICE + _KINDS[kind] + k, kind)
            for (process, kind), ends in self._ends.items()
            for k in range(len(ends))
        ]


def _crossed(
    crossings: Sequence[Crossing],
    number: dict[str, int],
    lanes: _Lanes,
    start: float,
) -> list[dict[str, Any]]:
    """A moment at each end, and the arrow from one to the other."""
    ends: list[tuple[float, str, str, int, bool]] = []
    for k, crossing in enumerate(crossings):
        sent, both = crossing.sent, crossing.source in number
        if sent is not None and both:
            ends.append((sent, "s", crossing.source, k, both))
        both = both and sent is not None
        ends.append((crossing.arrived, "f", crossing.target, k, both))
    events = []
    for time, phase, device, k, both in sorted(ends, key=lambda end: end[0]):
        crossing, process = crossings[k], number.get(device, 0)
        begin = _nanoseconds(time - start)
        end = begin + _MOMENT
        kind = "sent" if phase == "s" else "arrived"
        lane = lanes.of(process, kind, begin, end)
        event = {
            **_event("X", crossing.tensor, process, lane),
            "cat": "transfer",
            **_times(begin, end),
        }
        details = {
            "from": crossing.source,
            "to": crossing.target,
            "bytes": crossing.bytes,
            "holds": crossing.holds,
        }
        args = {k: v for k, v in details.items() if v not in (None, "")}
        events.append({**event, "args": args})
        if both:
            del event["dur"]
            arrow = {**event, "ph": phase, "id": k}
            events.append({**arrow, "bp": "e"} if phase == "f" else arrow)
    return events


def _named(kind: str, process: int, lane: int, name: str) -> dict[str, Any]:
    return {**_event("M", kind, process, lane), "args": {"name": name}}


def _event(phase: str, name: str, process: int, lane: int) -> dict[str, Any]:
    return {"ph": phase, "name": name, "pid": process, "tid": lane}


def _times(begin: int, end: int) -> dict[str, float]:
    """In microseconds, as the format has it."""
    return {"ts": begin / 1e3, "dur": (end - begin) / 1e3}


def _nanoseconds(seconds: float) -> int:
    return round(max(seconds, 0.0) * 1e9)
