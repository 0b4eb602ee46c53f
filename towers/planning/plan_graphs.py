"""plan_graphs: what is to be planned, as a graph of a machine that is not here."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign import (
    keras_compile,
    keras_layers,
    specs,
    tf_autograph,
    tf_nodes,
)
from towers.foreign.patches import patched
from towers.foreign.tf_saved_model import noted_devices
from towers.placement.placement import Placement
from towers.report import graph_defs
from towers.report.recording import eager_variables
from towers.report.values import SizedVariable
from towers.report.variables import VariableUse
from towers.wrapper.tower_model import TowerModel

v1 = tf.compat.v1
STEPS = ("train", "test", "predict")
_HOST = "/device:CPU:0"


@dataclasses.dataclass(frozen=True)
class Planned:
    """A graph that could run on the machine by itself.

    Attributes:
      graph: a `GraphDef`; its variables are ops in it.
      shapes: a graph with tensors of the same names, which knows shapes.
      targets: names of the nodes for the sake of which it would run.
      variables: those that it reads or writes, if they are known.
      device_of: where such a variable is to be.
      handles: the names of the ops that those are, in the same order.
    """

    graph: Any
    shapes: tf.Graph
    targets: list[str]
    variables: Sequence[tf.Variable] = ()
    device_of: Callable[[Any], str] = keras_layers.device_of
    handles: Sequence[str] = ()

    def held(self, uses: Sequence[VariableUse]) -> dict[str, SizedVariable]:
        """What is told of the variables, by their ops."""
        return {
            name: SizedVariable(use, math.prod(variable.shape))
            for name, use, variable in zip(self.handles, uses, self.variables)
        }


def of_graph(graph: tf.Graph, fetches: Sequence[Any]) -> Planned:
    """A graph of `tf.compat.v1`, and what is fetched of it; None is all."""
    elements = [
        graph.as_graph_element(fetch, allow_tensor=True, allow_operation=True)
        for fetch in tf.nest.flatten(list(fetches))
    ]
    ops = [x if isinstance(x, tf.Operation) else x.op for x in elements]
    return Planned(
        graph.as_graph_def(),
        graph,
        [op.name for op in ops or graph.get_operations()],
    )


def of_function(function: Any, args: Sequence[Any]) -> Planned:
    """A function, traced anew: for this machine it is another one."""
    if hasattr(function, "python_function"):
        function = tf.function(
            function.python_function,
            input_signature=function.input_signature,
            autograph=tf_autograph.is_on(function),
        )
    elif not hasattr(function, "captured_inputs"):
        function = tf.function(function)
    if hasattr(function, "get_concrete_function"):
        function = function.get_concrete_function(*args)
    return of_traced(function)


def of_saved_model(path: str, signature: str) -> Planned:
    """A signature of a SavedModel, with variables where it notes them."""
    loaded = tf.saved_model.load(path)
    if signature not in loaded.signatures:
        raise ValueError(
            f"The SavedModel has no signature {signature!r}. Expected "
            f"`signature` to be one of {sorted(loaded.signatures)}."
        )
    noted = noted_devices(path, loaded)
    return of_traced(
        loaded.signatures[signature], lambda v: noted.get(id(v), "")
    )


def of_model(model: keras.Model, args: Sequence[Any], step: str) -> Planned:
    """A step that Keras would take with a batch.

    Args:
      model: a `TowerModel`, or any.
      args: inputs, targets and sample weights, or their specs.
      step: one of `STEPS`.
    """
    if step not in STEPS:
        raise ValueError(
            f"`step` is {step!r}. Expected one of {', '.join(STEPS)}."
        )
    if step != "predict" and not model.compiled:
        raise ValueError(
            f"`step` is {step!r}, but the model is not compiled, so there is "
            'no loss. Call compile() before; or plan step="predict".'
        )
    if any(isinstance(one, Placement) for one in args):
        raise TypeError(
            "A step of a model takes a batch, or its specs; got a Placement. Plan "
            "TowerModel(model, placement), with inputs and targets."
        )
    if isinstance(model, TowerModel) and step == "train":
        model.tower_functions.build_slots()
    take = {
        "train": model.train_step,
        "test": model.test_step,
        "predict": model.predict_step,
    }[step]
    batch = tf.nest.map_structure(specs.of, tuple(args))
    own = [
        (layer, "supports_jit", layer.supports_jit)
        for layer in keras_layers.all_layers(model)
    ]
    with patched(*own):
        traced = tf.function(
            lambda *data: take(data), autograph=False
        ).get_concrete_function(*batch)
    default = ""
    if isinstance(model, TowerModel) and step == "train":
        default = str(model.placement.output_device)  # under which it is called
    return of_traced(traced, _placing(model), default)


def _placing(model: keras.Model) -> Callable[[Any], str]:
    """Where a model's variables are to be, those of its metrics too.

    Some metrics are made in the first step, and moved before the next.
    """
    table = {}
    if isinstance(model, TowerModel):
        table = {
            id(keras_layers.raw(v)): str(model.placement.output_device)
            for v in keras_compile.metric_variables(model)
        }
    return lambda v: table.get(id(v)) or keras_layers.device_of(v)


def of_traced(
    function: Any,
    device_of: Callable[[Any], str] = keras_layers.device_of,
    default: str = "",
) -> Planned:
    """A traced function, as a graph with variables of its own.

    Arguments come from the host, and captured tensors from where they are.

    Args:
      function: a concrete one.
      device_of: where its variables are to be.
      default: the device under which it is called, where its results are.
    """
    graph = function.graph
    inner = {id(x): x for x in graph.inputs}
    outer = dict(zip(map(id, _captures(function)), function.captured_inputs))
    variables = {id(v.handle): v for v in eager_variables()}
    used: dict[str, tf.Variable] = {}
    stand_ins: dict[str, Callable[[Any], None]] = {}
    for key, tensor in inner.items():
        captured = outer.get(key)
        if id(captured) in variables:
            variable = variables[id(captured)]
            used[tensor.op.name] = variable
            device = device_of(variable)
            stand_ins[tensor.op.name] = _handle(variable, device)
        else:
            stand_ins[tensor.op.name] = _argument(captured)
    targets = [x.op for x in graph.outputs] + list(graph.control_outputs)
    names = [x.name for op in targets for x in op.outputs or [op]]
    planned = graph_defs.pruned(graph.as_graph_def(), names)
    for node in planned.node:
        if node.name in stand_ins:
            stand_ins[node.name](node)
        node.attr.pop(tf_nodes.GRADIENT, None)
        if not node.device and node.op in ("Identity", "NoOp"):
            node.device = default
    return Planned(
        planned,
        graph,
        list(dict.fromkeys(op.name for op in targets)),
        list(used.values()),
        device_of,
        list(used),
    )


def _captures(function: Any) -> list[tf.Tensor]:
    """The tensors of a function's graph that stand for what it captured."""
    count = len(function.captured_inputs)
    return list(function.graph.inputs)[-count:] if count else []


def _handle(variable: tf.Variable, device: str) -> Callable[[Any], None]:
    """A function that makes a node a variable's handle, on a device."""

    def make(node: Any) -> None:
        node.op, node.device = "VarHandleOp", device
        node.attr.clear()
        node.attr["dtype"].type = variable.dtype.as_datatype_enum
        node.attr["shape"].shape.CopyFrom(variable.shape.as_proto())
        node.attr["shared_name"].s = node.name.encode()

    return make


def _argument(origin: Any) -> Callable[[Any], None]:
    """A function that puts an argument's node where the argument is."""

    def note(node: Any) -> None:
        node.device = getattr(origin, "device", None) or _HOST

    return note


def saved_model_path(value: Any) -> str | None:
    """The folder of a SavedModel, if that is what is named."""
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    return None
