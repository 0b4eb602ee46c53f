"""plan_graphs: what is to be planned, as a graph of a machine that is not here."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from towers.report.recording import eager_variables
from towers.report.values import Held
from towers.report.variables import VariableUse
from towers.wrapper.tower_model import TowerModel

v1 = tf.compat.v1
STEPS = ("train", "test", "predict")
_HOST = "/device:CPU:0"
_PASSES = ("IdentityN",)


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

    def held(self, uses: Sequence[VariableUse]) -> dict[str, Held]:
        """What is told of the variables, by their ops."""
        return {
            name: Held(use, math.prod(variable.shape))
            for name, use, variable in zip(self.handles, uses, self.variables)
        }


def of_graph(graph: tf.Graph, fetches: Sequence[Any]) -> Planned:
    """A graph of `tf.compat.v1`, and what is fetched of it; None is all."""
    wanted = [
        graph.as_graph_element(fetch, allow_tensor=True, allow_operation=True)
        for fetch in tf.nest.flatten(list(fetches))
    ]
    ops = [x if isinstance(x, tf.Operation) else x.op for x in wanted]
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
        given = outer.get(key)
        if id(given) in variables:
            variable = variables[id(given)]
            used[tensor.op.name] = variable
            device = device_of(variable)
            stand_ins[tensor.op.name] = _handle(variable, device)
        else:
            stand_ins[tensor.op.name] = _argument(given)
    targets = [x.op.name for x in graph.outputs]
    targets += [op.name for op in graph.control_outputs]
    pruned = _pruned(graph.as_graph_def(), targets, stand_ins)
    for node in pruned.node:
        if not node.device and node.op in ("Identity", "NoOp"):
            node.device = default
    return Planned(
        pruned,
        graph,
        list(dict.fromkeys(targets)),
        list(used.values()),
        device_of,
        list(used),
    )


def _captures(function: Any) -> list[tf.Tensor]:
    """The tensors of a function's graph that stand for what it captured."""
    count = len(function.captured_inputs)
    return list(function.graph.inputs)[-count:] if count else []


def _handle(variable: tf.Variable, device: str) -> Callable[[Any], None]:
    """Makes a node the variable itself, on a device."""

    def make(node: Any) -> None:
        node.op, node.device = "VarHandleOp", device
        node.attr.clear()
        node.attr["dtype"].type = variable.dtype.as_datatype_enum
        node.attr["shape"].shape.CopyFrom(variable.shape.as_proto())
        node.attr["shared_name"].s = node.name.encode()

    return make


def _argument(given: Any) -> Callable[[Any], None]:
    """Leaves a node what it is, on the device of what it stands for."""

    def put(node: Any) -> None:
        node.device = getattr(given, "device", None) or _HOST

    return put


def _pruned(
    graph: Any,
    targets: Iterable[str],
    stand_ins: Mapping[str, Callable[[Any], None]],
) -> Any:
    """The graph without what no target needs, as a function has it.

    Of what an `IdentityN` passes on, that is what somebody takes: TensorFlow's
    optimizer leaves out the rest, which stand-ins are for here.
    """
    nodes = {node.name: node for node in graph.node}
    wanted = []
    for name in targets:
        count = len(nodes[name].attr["T"].list.type)
        several = range(count) if nodes[name].op in _PASSES else [0]
        wanted += [f"{name}:{port}" for port in several]
    needed, taken = _needed(nodes, wanted)
    kept = v1.GraphDef(versions=graph.versions, library=graph.library)
    for node in graph.node:
        if node.name in needed:
            copy = kept.node.add()
            copy.CopyFrom(node)
            if node.name in stand_ins:
                stand_ins[node.name](copy)
            if node.op in _PASSES:
                for nothing in _left_out(copy, taken[node.name]):
                    kept.node.add().CopyFrom(nothing)
            copy.attr.pop(tf_nodes.GRADIENT, None)
    for function in kept.library.function:
        body = {node.name: node for node in function.node_def}
        ends = [*function.ret.values(), *function.control_ret.values()]
        _, taken = _needed(body, ends)
        for node in body.values():
            if node.op in _PASSES:
                found = _left_out(
                    node, taken.get(node.name, set()), ":output:0"
                )
                function.node_def.extend(found)
    return kept


def _needed(
    nodes: Mapping[str, Any], wanted: Iterable[str]
) -> tuple[set[str], dict[str, set[int]]]:
    """What some tensors need: nodes, and which ports of each `IdentityN`.

    Args:
      nodes: of a graph or a function, by name; what is none is an argument.
      wanted: tensors of them, as "a:0", "a:output:0" or "^a".
    """
    ahead, needed = list(wanted), set()
    taken: dict[str, set[int]] = {}
    while ahead:
        name, *place = ahead.pop().removeprefix("^").split(":")
        node, port = nodes.get(name), int(place[-1]) if place else 0
        if node is None:
            continue
        if node.op in _PASSES:
            if port not in taken.setdefault(name, set()):
                taken[name].add(port)
                ahead.append(node.input[port])
            ahead += [x for x in node.input if x.startswith("^")] * (
                name not in needed
            )
        elif name not in needed:
            ahead += node.input
        needed.add(name)
    return needed, taken


def _left_out(node: Any, taken: set[int], port: str = "") -> list[Any]:
    """Nodes in the place of what nobody takes of an `IdentityN`, which gets them.

    Args:
      node: it.
      taken: which of its ports somebody takes.
      port: how a node's first result is spelled there.
    """
    made = []
    for k, dtype in enumerate(node.attr["T"].list.type):
        if k not in taken:
            nothing = v1.NodeDef(
                name=f"{node.name}/nothing_{k}",
                op="Placeholder",
                device=node.device,
            )
            nothing.attr["dtype"].type = dtype
            node.input[k] = f"{nothing.name}{port}"
            made.append(nothing)
    return made


def saved_model_path(value: Any) -> str | None:
    """The folder of a SavedModel, if that is what is named."""
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    return None
