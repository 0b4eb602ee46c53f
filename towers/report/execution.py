"""execution_report: runs a function, and tells what ran where.

It reads the graphs that TensorFlow executed and knows nothing of towers, so
it can tell when they are not where they were put.
"""

import collections
import warnings
from collections.abc import Callable
from typing import Any

from towers.cluster.profiling import profiled_everywhere
from towers.foreign import long_waits
from towers.foreign.tf_profiler import Event
from towers.report.executed import executed
from towers.report.plain import subject_of
from towers.report.profile import times_sent
from towers.report.recording import record
from towers.report.report import ExecutionReport
from towers.report.summary import least_bytes, machine_of
from towers.report.variables import uses

_COLLECTIVES = ("Collective", "Nccl")


def execution_report(
    fn: Callable[..., Any], *args: Any, loops: bool = False, **kwargs: Any
) -> ExecutionReport:
    """Runs `fn(*args, **kwargs)` once and tells what ran where.

    It is read from the graphs that TensorFlow executed, of all functions that
    `fn` calls: a `tf.function`, or anything that uses some, such as a model's
    `fit`. They are optimised and placed anew for it, so `fn` may have been
    called before. TensorFlow tells of its graphs only while it makes them, and
    that is most of what a report takes: of a MobileNetV2's step in two towers 5.3
    of 7.8 CPU seconds, and the step itself 0.5. Variables that changed are put
    back; what else it does (training logs, draws from an iterator, the order in
    which a dataset that shuffles begins anew) is done. Ops that run eagerly, outside of functions, are in `eager`; those of data pipelines
    are not told. A function called under a device of another process is told as it
    went there, not as that optimised it.

    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"])
    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> @tf.function
    ... def apply(x):
    ...     return towers.build_towers(model, x, placement).outputs
    >>> report = towers.execution_report(apply, tf.ones([6, 3]))
    >>> report.assert_runs_on("tower_1", "/CPU:1")
    >>> report.bytes_between["/CPU:0", "/CPU:1"]  # 3 rows of 3, 3 x 2, 2
    68
    >>> report.assert_bytes(at_most=68 + 24)

    A transfer's size is what it was when `fn` ran. It is not known for
    tensors that depend on an iterator made before (give `fn` the data), that
    have another size at each step (report one step), or that cross inside a
    loop, once per iteration, unless `loops` counts them. There is a warning
    then, and one for collective ops, as in MirroredStrategy, whose bytes are
    not counted.

    Args:
      fn: what to run, eagerly.
      *args: what it is called with.
      loops: whether TensorFlow's profiler counts how often transfers inside
        loops happen. It hears of those with an end in this process, or in a
        worker of its `Cluster`.
      **kwargs: what `fn` is called with by name: `batch_size=32` of a `fit`. One
        that is named `loops` needs a function around it.

    Returns:
      An `ExecutionReport`. `print(report)` shows tables.

    Raises:
      TypeError: `fn` cannot be called.
      RuntimeError: called inside a graph; with `loops`, and the profiler runs
        already; or a function was called under a device of another process, and
        is not all on that.
    """
    if not callable(fn):
        raise TypeError(
            f"`fn` must be a function; got {fn!r}. For a model, write "
            "execution_report(model.train_on_batch, x, y)."
        )
    events: list[Event] = []

    def call() -> None:
        if not loops:
            fn(*args, **kwargs)
            return
        with profiled_everywhere() as heard:
            fn(*args, **kwargs)
        events.extend(heard.events)

    name = getattr(fn, "__name__", None) or type(fn).__name__
    with long_waits.announced(f"running {name} for a report"):
        recording = record(call)
    graphs = [g for ran in recording.functions for g in ran.partitions]
    counts = times_sent(graphs, events) if loops else {}
    variables = uses(recording.variables)
    ran = executed(recording, variables, counts)
    report = ExecutionReport(
        ran.nodes,
        ran.transfers,
        variables,
        least_bytes(ran.sent),
        least_bytes(ran.sent, machine_of),
        collections.Counter(recording.eager),
        recording.peak_bytes,
        tuple(graphs),
        ran.moved,
        subject_of(fn, args),
    )
    collectives = {op for _, op in report.ops if op.startswith(_COLLECTIVES)}
    if collectives:
        warnings.warn(
            f"{', '.join(sorted(collectives))} move bytes between devices that "
            "no graph tells of; they are not in total_bytes.",
            stacklevel=2,
        )
    if report.unknown:
        warnings.warn(
            f"Of {len(report.unknown)} transfers the size is not known, so "
            "total_bytes is too small; see the `unknown` of the report.",
            stacklevel=2,
        )
    return report
