"""tf_profiler: what TensorFlow's profiler hears while something runs.

`tf.profiler.experimental` is public, and writes a file per session. What the file
means is not: it is read with the `XSpace` message that TensorFlow brings along,
and executors name their events and their numbers as they please.
`tf_profiler_test.py` fails when one of them changes.
"""

import contextlib
import dataclasses
import glob
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign.tf_nodes import op_of_kernel

# What an executor does on a thread, and a receive that is issued and answered.
PROCESS = "ExecutorState::Process"
ISSUED = "ExecutorState::ProcessAsync::Start"
ARRIVED = "ExecutorState::ProcessAsync::Done"
# The stats by which events belong together: the run, the executor, the node.
RUN, EXECUTOR, NODE = ("id", "step_id"), "_c", "name"
# What a GPU's kernels say of the op that they are of: "name:type".
OP_OF_KERNEL = "tf_op"
STATS = (EXECUTOR, NODE, OP_OF_KERNEL)
_HOST = "/host:CPU"
_MARK = "towers: what time is it"
_MARKS = 8  # of which the quickest tells when the profiler started
Interval = tuple[float, float]
_GPU = re.compile(r"^/device:(\w+:\d+)")


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that took time.

    Attributes:
      device: "" for what was heard on the host, else a GPU ("/GPU:0").
      thread: where, as a number.
      name: what; ops are "name:type", oneDNN's kernels by the op's own type.
      start: in seconds since the profiler started.
      seconds: how long.
      stats: further things that are said of it.
      process: "" for this one, else the worker's task.
    """

    device: str
    thread: int
    name: str
    start: float
    seconds: float
    stats: dict[str, Any]
    process: str = ""


@dataclasses.dataclass
class Heard:
    """What the profiler heard.

    Attributes:
      events: in no order.
      began: when it started, on the clock of `time.time()`.
    """

    events: list[Event] = dataclasses.field(default_factory=list)
    began: float = 0.0


def is_of_executor(event: Event) -> bool:
    """Whether it is an op's, or of what carries tensors to it."""
    return (
        bool(event.device)
        or event.name in (PROCESS, ISSUED, ARRIVED)
        or ":" in event.name
    )


@contextlib.contextmanager
def profiled() -> Iterator[Heard]:
    """While open, TensorFlow's profiler runs; what it heard is there at the end.

    Raises:
      RuntimeError: it runs already.
    """
    heard = Heard()
    options = tf.profiler.experimental.ProfilerOptions(
        host_tracer_level=3, python_tracer_level=0, device_tracer_level=1
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            tf.profiler.experimental.start(folder, options)
        except tf.errors.AlreadyExistsError as error:
            raise RuntimeError(
                "TensorFlow's profiler runs already, and there is only one. "
                "Stop it first (a TensorBoard callback starts it, too)."
            ) from error
        asked = [_marked() for _ in range(_MARKS)]
        try:
            yield heard
        finally:
            tf.profiler.experimental.stop()
        for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
            heard.events += _read(path)
        heard.began = _began(asked, heard.events)


def _marked() -> Interval:
    """Between which times a mark was made that the profiler hears of."""
    before = time.time()
    with tf.profiler.experimental.Trace(_MARK):
        pass
    return before, time.time()


def _began(asked: Sequence[Interval], events: Sequence[Event]) -> float:
    """When the profiler started, by the mark that took least to make.

    On a busy machine a thread may have to wait before it makes one.
    """
    marks = sorted(e.start for e in events if e.name == _MARK)
    readings = [(b - a, a - mark) for (a, b), mark in zip(asked, marks)]
    return min(readings, default=(0.0, asked[0][0]))[1]


def _read(path: str | os.PathLike) -> Iterator[Event]:
    # Not before it is needed: TensorFlow may do without.
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    with open(path, "rb") as file:
        space = xplane_pb2.XSpace.FromString(file.read())
    for plane in space.planes:
        gpu = _GPU.match(plane.name)
        if not gpu and plane.name != _HOST:
            continue
        names = {k: _named(m.name) for k, m in plane.event_metadata.items()}
        kinds = {k: m.name for k, m in plane.stat_metadata.items()}
        for line in plane.lines:
            for event in line.events:
                stats = {
                    kinds.get(s.metadata_id, ""): _value(s, kinds)
                    for s in event.stats
                }
                yield Event(
                    f"/{gpu[1]}" if gpu else "",
                    line.id,
                    names.get(event.metadata_id, ""),
                    (line.timestamp_ns + event.offset_ps / 1e3) / 1e9,
                    event.duration_ps / 1e12,
                    stats,
                )


def _named(event: str) -> str:
    """An event's name, in which an op's kernel is the op."""
    name, colon, kind = event.rpartition(":")
    return f"{name}{colon}{op_of_kernel(kind)}"


def _value(stat: Any, kinds: dict[int, str]) -> Any:
    value = getattr(stat, stat.WhichOneof("value") or "str_value")
    # Strings that come often are told by number.
    return kinds.get(value, "") if stat.HasField("ref_value") else value
