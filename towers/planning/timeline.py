"""timeline: what ran when, on which device, and what it waited for."""

import collections
import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.cluster.profiling import profiled_everywhere
from towers.foreign import long_waits
from towers.foreign.patches import patched
from towers.foreign.tf_profiler import Event
from towers.placement.device_names import few, process_of
from towers.placement.scopes import tower_of
from towers.planning.timeline_page import timeline_html, timeline_short_form
from towers.planning.trace_events import trace_events
from towers.planning.waits import Wait, longest_waits
from towers.report.executed import executed, outside_of_call
from towers.report.partitions import Transfer
from towers.report.plain import subject_of
from towers.report.profile import (
    Crossing,
    Interval,
    Op,
    Profile,
    partition_devices,
    profile,
    union,
)
from towers.report.recording import record
from towers.report.variables import uses

_SESSIONS = (tf.compat.v1.Session, tf.compat.v1.InteractiveSession)


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What ran when, see `timeline`. All times are in seconds.

    Attributes:
      devices: those that had a part in it.
      ops: what ran, in the order of time.
      crossings: tensors that crossed between devices.
      start: when the first op began, on the profiler's clock.
      seconds: from there until the last op ended.
      unseen: those of the devices whose process told nothing of what it ran.
      subject: what ran, with which versions, and when.
    """

    devices: tuple[str, ...]
    ops: tuple[Op, ...]
    crossings: tuple[Crossing, ...]
    start: float
    seconds: float
    unseen: tuple[str, ...] = ()
    subject: str = dataclasses.field(default="", compare=False)

    @functools.cached_property
    def busy(self) -> dict[str, float]:
        """By device that is seen, the time in which it ran at least one op."""
        return {d: _length(self._running[d]) for d in self._seen_devices}

    @functools.cached_property
    def towers(self) -> dict[str, float]:
        """By tower ("tower_0"), the time in which one of its ops ran."""
        return {t: _length(i) for t, i in self._towers.items()}

    @functools.cached_property
    def overlap(self) -> float:
        """The time in which ops of two towers or more ran at once."""
        ends = [
            (time, change)
            for intervals in self._towers.values()
            for start, end in intervals
            for time, change in ((start, 1), (end, -1))
        ]
        total, running, since = 0.0, 0, 0.0
        for time, change in sorted(ends):
            total += (time - since) * (running > 1)
            running, since = running + change, time
        return total

    @functools.cached_property
    def waits(self) -> dict[str, float]:
        """By device, the time in which it ran nothing until a tensor came."""
        seconds = dict.fromkeys(self._seen_devices, 0.0)
        for wait in self.longest_waits:
            seconds[wait.device] += wait.seconds
        return seconds

    @functools.cached_property
    def longest_waits(self) -> tuple[Wait, ...]:
        """Every wait, the longest first."""
        return longest_waits(self._running, self.crossings, self.start)

    def save(self, path: Any) -> None:
        """Writes a page, or JSON in the format of trace events.

        Perfetto (ui.perfetto.dev) and chrome://tracing open the latter: a process
        per device, with towers, passes, layers and ops, and transfers as arrows.
        The page opens in any browser, without a network.

        Args:
          path: such as "step.html", or "step.json", which any other ending
            than .html gives.
        """
        if os.path.splitext(os.fspath(path))[1].lower() in (".html", ".htm"):
            with open(os.fspath(path), "w", encoding="utf-8") as file:
                file.write(timeline_html(self))
            return
        events = trace_events(
            self.devices,
            self.ops,
            self.crossings,
            self.start,
            self.unseen,
        )
        with open(os.fspath(path), "w", encoding="utf-8") as file:
            json.dump(events, file)

    def _repr_html_(self) -> str:
        """Answers and drawing, which notebooks show."""
        return timeline_short_form(self)

    def __repr__(self) -> str:
        return (
            f"<Timeline: {1e3 * self.seconds:.3f} ms, {len(self.ops):,} ops on "
            f"{few(self.devices)}>"
        )

    def __str__(self) -> str:
        def ms(seconds: float) -> str:
            return f"{1e3 * seconds:10.3f} ms"

        def share(seconds: float) -> str:
            return f"{seconds / self.seconds:7.1%}" if self.seconds else ""

        lines = [f"{ms(self.seconds)} from the first op to the end of the last"]
        lines += [
            f"{ms(self.busy[d])} {share(self.busy[d])}  {d} busy, "
            f"{1e3 * self.waits[d]:.3f} ms waiting"
            for d in self._seen_devices
        ]
        lines += [
            f"     not seen  {d}, whose process tells nothing of what it ran"
            for d in self.unseen
        ]
        lines += [f"{ms(s)} {share(s)}  {t}" for t, s in self.towers.items()]
        if len(self.towers) > 1:
            lines.append(
                f"{ms(self.overlap)} {share(self.overlap)}  two towers or more "
                "at once"
            )
        lines += [
            f"{ms(w.seconds)}  {w.device} waited for {w.what} of {w.source}"
            for w in self.longest_waits[:10]
        ]
        return "\n".join(lines)

    @functools.cached_property
    def _seen_devices(self) -> list[str]:
        return [d for d in self.devices if d not in self.unseen]

    @functools.cached_property
    def _running(self) -> dict[str, list[Interval]]:
        return _intervals(self.ops, lambda op: op.device)

    @functools.cached_property
    def _towers(self) -> dict[str, list[Interval]]:
        def tower(op: Op) -> str:
            place = tower_of(op.name)
            return f"tower_{place[0]}" if place else ""

        towers = _intervals(self.ops, tower)
        towers.pop("", None)
        return dict(sorted(towers.items(), key=lambda p: int(p[0][6:])))


def timeline(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Timeline:
    """Runs `fn(*args, **kwargs)` and tells what ran when, per device and tower.

    TensorFlow's profiler hears of each op that is executed, and the graphs that
    were executed tell where. `fn` runs twice, as what runs first is optimised
    and placed anew; the second time counts, and the variables that changed are
    put back. With a `tf.compat.v1.Session` in it, in graph mode, it runs once,
    and what it changed stays.

    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"])
    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> @tf.function
    ... def apply(x):
    ...     return towers.build_towers(model, x, placement).outputs
    >>> timeline = towers.timeline(apply, tf.ones([6, 3]))
    >>> sorted(timeline.busy), sorted(timeline.towers)
    (['/CPU:0', '/CPU:1'], ['tower_0', 'tower_1'])
    >>> timeline.longest_waits[0].device in timeline.devices
    True
    >>> folder = tempfile.mkdtemp()
    >>> timeline.save(os.path.join(folder, "step.html"))  # a page
    >>> timeline.save(os.path.join(folder, "step.json"))  # for Perfetto

    Logical CPU devices share the threads and the cores of a machine: an op of
    one may be late as another's has the core, which shows as neither busy nor
    waiting. Workers of a `Cluster` tell what they ran, on the clock of this
    process: theirs are compared over their heartbeats, and are right to half of
    the time that a question takes. Devices of other processes that this one is
    connected to are `unseen`; what arrives from them is known.

    Args:
      fn: what to run: a `tf.function`, a model's `train_on_batch` or `fit`, or
        a function that runs a Session.
      *args, **kwargs: what it is called with.

    Returns:
      A `Timeline`. `print(timeline)` shows a table.

    Raises:
      TypeError: `fn` cannot be called.
      RuntimeError: the profiler runs already, or nothing ran in a graph.
    """
    if not callable(fn):
        raise TypeError(
            f"`fn` must be a function; got {fn!r}. For a model, write "
            "timeline(model.train_on_batch, x, y)."
        )
    events: list[Event] = []
    processes: set[str] = set()
    sent: Mapping[Any, Transfer] = {}

    def heard() -> None:
        with profiled_everywhere() as profiled:
            call(*args, **kwargs)
        events.extend(profiled.events)
        processes.update(profiled.processes)

    def twice() -> None:
        call(*args, **kwargs)
        heard()

    name = getattr(fn, "__name__", None) or type(fn).__name__
    announced = long_waits.announced(f"running {name} for a timeline")
    with announced, _sessions() as graphs:
        # A Session's bound `run` was bound before it was replaced.
        session = isinstance(getattr(fn, "__self__", None), _SESSIONS)
        call = fn.__self__.run if session else fn  # type: ignore[attr-defined]
        if tf.executing_eagerly():
            recording = record(twice)
            for ran in recording.functions:
                graphs.extend(ran.partitions)
            sent = executed(recording, uses(recording.variables), {}).carried
        else:
            heard()
    trace = _named(profile(graphs, events, sent))
    if not trace.ops:
        raise RuntimeError(
            "`fn` ran no op in a graph, so there is no telling what ran when. "
            "Expected a tf.function, a Keras model's step, or a Session's run."
        )
    start = min(op.start for op in trace.ops)
    devices = tuple(partition_devices(graphs))
    heard_of = {op.device for op in trace.ops}
    return Timeline(
        devices,
        trace.ops,
        trace.crossings,
        start,
        max(op.start + op.seconds for op in trace.ops) - start,
        tuple(
            d
            for d in devices
            if d not in heard_of and process_of(d) not in processes
        ),
        subject_of(fn, args),
    )


@contextlib.contextmanager
def _sessions() -> Iterator[list[Any]]:
    """While open, notes the graphs that Sessions execute, one per device."""
    v1 = tf.compat.v1
    graphs: list[Any] = []
    original = v1.Session.run

    def run(
        session: Any,
        fetches: Any,
        feed_dict: Any = None,
        options: Any = None,
        run_metadata: Any = None,
    ) -> Any:
        asking = v1.RunOptions()
        if options is not None:
            asking.CopyFrom(options)
        asking.output_partition_graphs = True
        metadata = v1.RunMetadata() if run_metadata is None else run_metadata
        result = original(session, fetches, feed_dict, asking, metadata)
        graphs.extend(metadata.partition_graphs)
        return result

    with patched(*((session, "run", run) for session in _SESSIONS)):
        yield graphs


def _named(trace: Profile) -> Profile:
    """The same, with the names that a report has, without the step's call."""
    ops, crossings = trace.ops, trace.crossings
    named = outside_of_call(
        [*(op.name for op in ops), *(c.tensor for c in crossings)]
    )
    return Profile(
        tuple(dataclasses.replace(op, name=named(op.name)) for op in ops),
        tuple(
            dataclasses.replace(c, tensor=named(c.tensor)) for c in crossings
        ),
    )


def _intervals(
    ops: Sequence[Op], kind: Callable[[Op], str]
) -> dict[str, list[Interval]]:
    spans: dict[str, list[Interval]] = collections.defaultdict(list)
    for op in ops:
        spans[kind(op)].append((op.start, op.start + op.seconds))
    return collections.defaultdict(
        list, {k: union(intervals) for k, intervals in spans.items()}
    )


def _length(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in intervals)
