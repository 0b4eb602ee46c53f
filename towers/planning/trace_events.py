"""trace_events: a timeline in the format that Perfetto and Chrome open.

The format: "Trace Event Format" of the Chromium project. A process per device,
whose threads are lanes: ops that ran at once stand in lanes of their own.
"""

from collections.abc import Sequence
from typing import Any

from towers.report.profile import Crossing, Op

_SENT, _ARRIVED = 1000, 1001  # lanes of their own, below all others
_MOMENT = 1.0  # microseconds, for what has a time and no length


def trace_events(
    devices: Sequence[str],
    ops: Sequence[Op],
    crossings: Sequence[Crossing],
    start: float,
    unseen: Sequence[str] = (),
) -> dict[str, Any]:
    """All of it as one object, fit for JSON; times from `start` on."""
    number = {device: i for i, device in enumerate(devices)}
    found: list[dict[str, Any]] = []
    for device, i in number.items():
        said = " (not seen)" if device in unseen else ""
        found += [
            _named("process_name", i, 0, device + said),
            _named("thread_name", i, _SENT, "sent"),
            _named("thread_name", i, _ARRIVED, "arrived"),
        ]
    free: dict[str, list[float]] = {device: [] for device in devices}
    for op in ops:
        lanes = free.setdefault(op.device, [])
        lane = next(
            (k for k, end in enumerate(lanes) if end <= op.start), len(lanes)
        )
        lanes[lane : lane + 1] = [op.start + op.seconds]
        found.append(
            {
                **_event("X", op.name, number.get(op.device, 0), lane),
                "cat": op.kind,
                "ts": _microseconds(op.start - start),
                "dur": _microseconds(op.seconds),
                "args": {"type": op.kind},
            }
        )
    for k, crossing in enumerate(crossings):
        found += _crossing(k, crossing, number, start)
    return {"traceEvents": found, "displayTimeUnit": "ms"}


def _crossing(
    k: int, crossing: Crossing, number: dict[str, int], start: float
) -> list[dict[str, Any]]:
    """A moment at each end, and the arrow from one to the other."""
    ends = [("f", crossing.target, _ARRIVED, crossing.arrived)]
    if crossing.sent is not None and crossing.source in number:
        ends.insert(0, ("s", crossing.source, _SENT, crossing.sent))
    found = []
    for phase, device, lane, time in ends:
        event = {
            **_event("X", crossing.tensor, number.get(device, 0), lane),
            "cat": "transfer",
            "ts": _microseconds(time - start),
        }
        details = {"from": crossing.source, "to": crossing.target}
        found.append({**event, "dur": _MOMENT, "args": details})
        if len(ends) == 2:
            arrow = {**event, "ph": phase, "id": k}
            found.append({**arrow, "bp": "e"} if phase == "f" else arrow)
    return found


def _named(kind: str, process: int, lane: int, name: str) -> dict[str, Any]:
    return {**_event("M", kind, process, lane), "args": {"name": name}}


def _event(phase: str, name: str, process: int, lane: int) -> dict[str, Any]:
    return {"ph": phase, "name": name, "pid": process, "tid": lane}


def _microseconds(seconds: float) -> float:
    return round(max(seconds, 0.0) * 1e6, 3)
