"""recording: run something once and keep what TensorFlow ran for it.

TensorFlow hands out the graphs that functions were partitioned into
(`tf.summary.trace_on`); `tf_calls` hears which functions those are.
"""

import contextlib
import dataclasses
import gc
import glob
import itertools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign import tf_calls, tf_iterators, tf_nodes, tf_traces
from towers.foreign.patches import optimizing, patched
from towers.placement.device_names import short
from towers.report.remote_functions import remote, remote_partitions

_FRESH = itertools.count(2)
# A function's name; the device of another process that it ran on whole, or "", and
# then the device that each argument came from.
_Call = tuple[str, str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Elements:
    """What an iterator gave.

    Attributes:
      spec: (dtype, static shape) of each flat component.
      elements: the components of one element per list of shapes.
    """

    spec: list[tuple[tf.DType, tf.TensorShape]]
    elements: dict[tuple[tuple[int, ...], ...], Sequence[tf.Tensor]]


@dataclasses.dataclass(frozen=True)
class Ran:
    """A function that ran.

    Attributes:
      name: TensorFlow's name of it.
      graph: it as it was placed, before it was cut, a `GraphDef`.
      partitions: one `GraphDef` per device.
      calls: per call the flat arguments, in the order of its `_Arg` nodes.
      asked: it before it was placed, where TensorFlow tells of that.
    """

    name: str
    graph: Any
    partitions: Sequence[Any]
    calls: list[list[tf.Tensor]]
    asked: Any = None


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a call ran.

    Attributes:
      functions: those that it called.
      batches: what iterators gave.
      variables: those that were read or written.
      eager: (device, op type) of each op that ran outside of functions.
      peak_bytes: by GPU, the most memory that was in use at once.
    """

    functions: list[Ran]
    batches: list[Elements]
    variables: list[tf.Variable]
    eager: list[tuple[str, str]]
    peak_bytes: dict[str, int]


def record(call: Callable[[], Any]) -> Recording:
    """Runs `call()` once, and puts back the variables that it changed.

    Raises:
      RuntimeError: not called eagerly, or TensorFlow gave no graphs for a
        function.
    """
    if not tf.executing_eagerly():
        raise RuntimeError(
            "What ran where is recorded from the outside: expected an eager "
            "call, got one inside a graph. Call it on the tf.function instead."
        )
    called: dict[_Call, tuple[Any, list[list[tf.Tensor]]]] = {}
    arrived: set[tuple[int, str]] = set()
    touched: dict[int, tf.Tensor] = {}
    born: dict[int, tf.Tensor] = {}
    left: list[str] = []
    before = {
        id(v.handle): (v, v.read_value())
        for v in eager_variables()
        if v.is_initialized()
    }

    eager: list[tuple[str, str]] = []
    running: list[bool] = []

    def noted() -> None:
        running.append(True)
        try:
            call()
        finally:
            running.clear()

    def hear(name: str, inputs: list[Any], outputs: list[Any]) -> None:
        handles = [x for x in inputs if x.dtype == tf.resource]
        touched.update({id(x): x for x in handles})
        new = {id(x) for x in handles} - before.keys() - born.keys()
        if name == "AssignVariableOp" and new:
            born[id(inputs[0])] = inputs[1]
        elif new and len(handles) == len(inputs) and not outputs:
            born.update(_first_values(new))  # of those that a function made
        device = remote(tf_calls.device())
        places: tuple[str, ...] = ()
        if device:
            # What left this process stays there as long as it lives.
            places = tuple(
                device if (id(x), device) in arrived else short(x.device)
                for x in inputs
            )
            arrived.update(
                (id(x), device) for x in inputs if not remote(x.device)
            )
        key = name, device, places
        if key not in called:  # its definition may go with it
            definition = tf_calls.definition(name)
            if definition is None:
                ends = [x.device for x in (*outputs, *inputs)]
                if running:  # and not what records it
                    eager.append((short(next(iter(ends), "")), name))
                return
            called[key] = definition, []
        called[key][1].append(inputs)

    try:
        with tempfile.TemporaryDirectory() as folder, tf_traces.aside():
            with _noted_batches(touched) as batches, _instantiated_anew():
                # What ran before is not ours.
                _traced(lambda: None, os.path.join(folder, "before"))
                with _peaks() as peaks, tf_calls.heard(hear):
                    _traced(noted, os.path.join(folder, "call"))
            metadata = _read(os.path.join(folder, "call"))
    finally:
        variables = [v for v in eager_variables() if id(v.handle) in touched]
        for variable in variables:
            key = id(variable.handle)
            if key in before:
                variable.assign(before[key][1])
            elif key in born:
                variable.assign(born[key])
            elif variable.is_initialized():
                left.append(variable.name)
    if left:
        warnings.warn(
            f"Variables that were made by what was recorded, {', '.join(left)}, "
            "stay as that left them, as their first values depend on what it was "
            "called with. Call it once before.",
            stacklevel=3,
        )
    return Recording(
        [
            _ran_there(*function, device, places)
            if device
            else _ran(*function, metadata)
            for (_, device, places), function in called.items()
        ],
        batches,
        variables,
        eager,
        peaks,
    )


def _ran_there(
    definition: Any, calls: Any, device: str, sources: Sequence[str]
) -> Ran:
    """The graphs of a function that another process ran."""
    graphs = remote_partitions(definition, device, sources)
    return Ran(definition.signature.name, *graphs, calls)


def _ran(definition: Any, calls: list[Any], metadata: Any) -> Ran:
    """The function's graphs, found by what its arguments are called."""
    name = definition.signature.name
    names = [
        definition.arg_attr[i].attr[tf_nodes.CALLED].s
        for i in range(len(definition.signature.input_arg))
    ]
    for graphs in metadata.function_graphs:
        arguments = {
            node.attr["index"].i: node.attr[tf_nodes.CALLED].s
            for node in graphs.pre_optimization_graph.node
            if node.op in tf_nodes.ARGUMENTS
        }
        if [arguments[i] for i in sorted(arguments)] == names:
            metadata.function_graphs.remove(graphs)
            return Ran(
                name,
                graphs.post_optimization_graph,
                graphs.partition_graphs,
                calls,
                graphs.pre_optimization_graph,
            )
    raise RuntimeError(
        f"TensorFlow told nothing of what it made of the function {name}, so "
        "there is no telling what ran where."
    )


def eager_variables() -> list[tf.Variable]:
    """All eager variables that are alive."""
    return [
        v
        for v in alive(tf.Variable)
        if hasattr(v, "handle") and hasattr(v.handle, "numpy")
    ]


def _first_values(handles: set[int]) -> dict[int, tf.Tensor]:
    """The values of variables that have just got their first ones."""
    return {
        id(v.handle): v.read_value()
        for v in eager_variables()
        if id(v.handle) in handles and v.is_initialized()
    }


def alive(kind: type | tuple[type, ...]) -> list[Any]:
    """All objects of a class, or of several, that the garbage collector knows of."""
    things = gc.get_objects()
    # Not `isinstance`, which asks proxies what they stand for; and once per
    # type, since there are a million objects.
    own = {t for t in set(map(type, things)) if issubclass(t, kind)}
    return [thing for thing in things if type(thing) in own]


def _instantiated_anew() -> contextlib.AbstractContextManager[None]:
    """While open, functions that ran before are optimised and cut again.

    What a function was made into is kept by the optimizer's options. A
    negative `min_graph_nodes` means the same whatever its value, and a value
    not seen before makes TensorFlow do its work, and tell of it, once more.
    """
    return optimizing(min_graph_nodes=-next(_FRESH))


@contextlib.contextmanager
def _peaks() -> Iterator[dict[str, int]]:
    """While open, GPUs note the most memory that is in use at once."""
    config = tf.config.experimental
    peaks: dict[str, int] = {}
    gpus = [short(d.name) for d in tf.config.list_logical_devices("GPU")]
    gpus = [gpu for gpu in gpus if gpu.startswith("/GPU")]  # of this process
    for gpu in gpus:
        config.reset_memory_stats(gpu[1:])
    yield peaks
    for gpu in gpus:
        peaks[gpu] = config.get_memory_info(gpu[1:])["peak"]


def _traced(call: Callable[[], Any], folder: str) -> None:
    """Writes what TensorFlow made of the functions that `call()` ran."""
    writer = tf.summary.create_file_writer(folder)
    tf.summary.trace_on(graph=True)
    try:
        call()
        with writer.as_default():
            tf.summary.trace_export("call", 0)
    finally:
        tf.summary.trace_off()
    writer.close()


def _read(folder: str) -> Any:
    """The metadata in the event file of a folder."""
    (path,) = glob.glob(os.path.join(folder, "*"))
    metadata = tf.compat.v1.RunMetadata()
    for record in tf.data.TFRecordDataset(path):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            metadata.MergeFromString(value.tensor.string_val[0])
    return metadata


@contextlib.contextmanager
def _noted_batches(held: dict[int, tf.Tensor]) -> Iterator[list[Elements]]:
    """While open, iterators over datasets note what they give.

    A graph that takes batches from an iterator says nothing of their rows. Handles
    that a dataset's functions hold, of random layers for instance, come to `held`:
    what those do with them in threads of TensorFlow's is not heard.
    """
    noted: list[Elements] = []
    original = tf.data.Dataset.__iter__

    def iterated(dataset: tf.data.Dataset) -> Any:
        if not tf.executing_eagerly():
            return original(dataset)
        tensors = tf_iterators.captured(dataset)
        held.update({id(x): x for x in tensors if x.dtype == tf.resource})
        spec = dataset.element_spec
        parts = tf.nest.flatten(spec, expand_composites=True)
        if not all(isinstance(part, tf.TensorSpec) for part in parts):
            return original(dataset)
        batches = Elements([(p.dtype, p.shape) for p in parts], {})
        noted.append(batches)

        def note(*components: tf.Tensor) -> None:
            shapes = tuple(tuple(c.shape) for c in components)
            batches.elements.setdefault(shapes, components)

        @tf.autograph.experimental.do_not_convert
        def passed(*element: Any) -> Any:
            flat = tf.nest.flatten(element, expand_composites=True)
            tf.py_function(note, flat, [])
            return tf.nest.pack_sequence_as(spec, flat, expand_composites=True)

        return original(dataset.map(passed))

    with patched((tf.data.Dataset, "__iter__", iterated)):
        yield noted
