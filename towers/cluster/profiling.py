"""profiling: what TensorFlow's profiler hears here and in workers, on one clock.

A worker's profiler starts and stops as its chief asks on the heartbeat, so that it
hears of what the chief runs meanwhile and of nothing else. TensorFlow's own way,
`tf.profiler.experimental.client.trace` on the worker's port, hears for a time
that must be known before.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

from towers.cluster import cluster as clusters
from towers.cluster.heartbeat import LONGEST_LINE, Line, Refused
from towers.foreign import tf_profiler
from towers.foreign.tf_profiler import Event, profiled

_PATIENCE = (
    120.0  # seconds for a worker's profiler to put together what it heard
)
_PINGS = 8  # of which the quickest tells how far clocks are apart
_KEPT = (*tf_profiler.RUN, *tf_profiler.STATS)


@dataclasses.dataclass
class HeardEverywhere:
    """The events of all profilers, and the processes that had one.

    Attributes:
      events: in seconds since this process's profiler started.
      processes: those that were listened to, "" for this one.
    """

    events: list[Event] = dataclasses.field(default_factory=list)
    processes: set[str] = dataclasses.field(default_factory=set)


@contextlib.contextmanager
def profiled_everywhere() -> Iterator[HeardEverywhere]:
    """While open, the profilers of this process and of its workers run.

    A worker that does not answer, or whose profiler runs already, is left out.

    Raises:
      RuntimeError: this process's runs already.
    """
    heard = HeardEverywhere()
    cluster = clusters.connected()
    lines: dict[int, tuple[Line, float]] = {}
    with contextlib.ExitStack() as stack:
        for task, pulse in cluster.pulses().items() if cluster else ():
            with contextlib.suppress(OSError, Refused):
                line = stack.enter_context(pulse.line(_PATIENCE))
                ahead = _ahead(line)
                if "started" in line.ask(profile=True):
                    lines[task] = line, ahead
        with profiled() as here:
            yield heard
        heard.events += here.events
        heard.processes.add("")
        for task, (line, ahead) in lines.items():
            with contextlib.suppress(OSError, Refused):
                process = f"/job:worker/replica:0/task:{task}"
                heard.events += _collected(line, process, ahead + here.began)
                heard.processes.add(process)


def tell(line: Line) -> None:
    """A worker's part: listens until its chief says so, and tells what it heard."""
    try:
        with profiled() as heard:
            line.say(started=True)
            line.waits(None)
    except RuntimeError as error:
        line.say(trouble=str(error))
        return
    if line.hear() is None:
        return
    some: list[Any] = []
    length = 0
    for event in heard.events:
        if not tf_profiler.is_of_executor(event):
            continue
        stats = {k: v for k, v in event.stats.items() if k in _KEPT}
        one = [event.device, event.thread, event.name]
        one += [event.start, event.seconds, stats]
        length += len(json.dumps(one)) + 2
        if length > LONGEST_LINE // 2:
            line.say(events=some)
            some, length = [], len(json.dumps(one)) + 2
        some.append(one)
    line.say(events=some)
    line.say(events=[], began=heard.began)


def _collected(line: Line, process: str, zero: float) -> list[Event]:
    """The events that a worker's profiler collected.

    Args:
      line: to it.
      process: its name.
      zero: when our profiler started, on the worker's clock.

    Raises:
      OSError, Refused: it does not tell all of it.
    """
    events: list[Event] = []
    line.say(stop=True)
    while True:
        words = line.hear()
        if words is None or "events" not in words:
            raise Refused(f"no events, but {words}")
        if not words["events"]:
            later = words["began"] - zero
            return [
                dataclasses.replace(event, start=event.start + later)
                for event in events
            ]
        for device, thread, name, start, seconds, stats in words["events"]:
            if device:
                device = f"{process}/device:{device.removeprefix('/')}"
            events.append(
                Event(
                    *(device, thread, name, start, seconds, stats),
                    process,
                )
            )


def _ahead(line: Line) -> float:
    """By how many seconds a worker's clock is ahead of this one's.

    Half the time that a question takes is not known; clocks that agree within
    that are taken as one, as on one machine they are.
    """
    readings = []
    for _ in range(_PINGS):
        start = time.time()
        there = line.ask(ping=1).get("time")
        here = time.time()
        if there is None:
            raise Refused("a worker of an older towers")
        readings.append(((here - start) / 2, there - (start + here) / 2))
    unknown, ahead = min(readings)
    return ahead if abs(ahead) > unknown else 0.0
