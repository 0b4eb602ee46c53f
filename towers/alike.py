"""alike: a part of the graph is built for some towers, copied for the rest.

Building a tower op by op is most of what tracing costs, and towers of one kind
of shard come out the same. Whether they do is not assumed: each is built, and
compared with the one before, op by op. Once two of them differ in nothing but
names, devices and what they were given, the next ones are copies. Where that is
known beforehand, as TensorFlow makes the same gradients for the same ops, one is
enough.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the graph that was made of `inputs`, on one device.

    Attributes:
      inputs: the tensors that it was made of.
      ops: what its results need, in the order in which they were made.
      results: a nest of tensors, or of None.
      device: in full.
      scope: the name scope of its tower, with its slash.
      copied: whether it is a copy.
    """

    inputs: Sequence[tf.Tensor]
    ops: Sequence[tf.Operation]
    results: Any
    device: str
    scope: str
    copied: bool = False


class Maker:
    """Makes one part for each tower."""

    def __init__(self) -> None:
        self._last: dict[Any, Part] = {}
        self._proven: dict[Any, Part] = {}
        self._pairs: list[Part] = []

    def make(
        self,
        function: Callable[[], Any],
        inputs: Sequence[tf.Tensor],
        device: str,
        scope: str,
        kind: Any = (),
        sure: bool = False,
    ) -> Part:
        """What `function()` makes of `inputs`.

        Args:
          function: builds the part, under the device; returns a nest.
          inputs: the tensors that are another tower's for another tower.
          device: in full.
          scope: the name scope of the tower.
          kind: parts of different kinds are never compared.
          sure: whether what is made depends on the kind and the inputs only.
        """
        graph = tf.compat.v1.get_default_graph()
        kind = (id(graph), kind, *((x.dtype, str(x.shape)) for x in inputs))
        if kind in self._proven:
            return _copy(self._proven[kind], inputs, device, scope)
        before = len(graph.get_operations())
        results = function()
        made = graph.get_operations()[before:]
        part = Part(inputs, _needed(made, results), results, device, scope)
        last = self._last.get(kind)
        if last is not None and _alike(last, part):
            self._proven[kind] = part
            self._pairs += [last, part]
        elif sure and _stands_alone(part):
            self._proven[kind] = part
        self._last[kind] = part
        return part

    def shared(self, part: Part) -> bool:
        """Whether the part is known to be as others of its kind."""
        return part.copied or any(part is x for x in self._pairs)

    def looks(self, part: Part) -> tuple[Any, ...]:
        """What tells the part from others of its kind: nothing, if shared."""
        return () if self.shared(part) else _looks(part)


def _needed(made: Sequence[tf.Operation], results: Any) -> list[tf.Operation]:
    """Those ops that results depend on, and those that must not be left out."""
    flat = tf.nest.flatten(results, expand_composites=True)
    needed = {x.op.name for x in flat if x is not None}
    ops = []
    for op in reversed(made):
        if op.name in needed or not _can_be_copied(op):
            needed.update(x.op.name for x in op.inputs)
            needed.update(x.name for x in op.control_inputs)
            ops.append(op)
    return ops[::-1]


def _alike(one: Part, other: Part) -> bool:
    """Whether two parts differ only in names, devices and inputs."""
    if one.device == other.device or len(one.ops) != len(other.ops):
        return False  # on one device, one that a layer names would not show
    places, others = _places(one), _places(other)
    return _leaf_places(one, places) == _leaf_places(other, others) and all(
        _can_be_copied(a)
        and (a.device, b.device) == (one.device, other.device)
        and _sources(a, places) == _sources(b, others)
        and all(x.name in places for x in a.control_inputs)
        and _bare(a) == _bare(b)
        for a, b in zip(one.ops, other.ops)
    )


def _stands_alone(part: Part) -> bool:
    """Whether a part is made of nothing but its inputs, on its device."""
    places = _places(part)
    return all(
        _can_be_copied(op)
        and op.device == part.device
        and all(x.name in places for x in [*op.inputs, *op.control_inputs])
        for op in part.ops
    ) and all(
        x is None or x.name in places
        for x in tf.nest.flatten(part.results, expand_composites=True)
    )


def _looks(part: Part) -> tuple[Any, ...]:
    """All of a part but its tower, and the names that are one op's own."""
    places, looks = _places(part), []
    for op in part.ops:
        node = _bare(op)
        node.attr.pop("_gradient_op_type", None)
        functions = [a.name for a in op.op_def.attr if "func" in a.type]
        for name in ("seed", "seed2", *functions):
            node.attr.pop(name, None)
        said = node.SerializeToString(deterministic=True)
        looks.append((said, *_sources(op, places)))
    return tuple(looks)


def _can_be_copied(op: tf.Operation) -> bool:
    """Not where a copy would be something else than building it again.

    Random ops have a seed each, a custom gradient speaks of the tensors that it
    was made with, and the gradient of a loop or of a function's call changes the
    op that it is of.
    """
    return not (
        op.op_def.is_stateful
        or any("func" in attribute.type for attribute in op.op_def.attr)
        or "_gradient_op_type" in op.node_def.attr
    )


def _places(part: Part) -> dict[str, Any]:
    """Tensors and ops by name: where in the part they are."""
    places: dict[str, Any] = {
        tensor.name: ("input", i) for i, tensor in enumerate(part.inputs)
    }
    for i, op in enumerate(part.ops):
        places[op.name] = i
        for k, tensor in enumerate(op.outputs):
            places[tensor.name] = ("op", i, k)
    return places


def _sources(op: tf.Operation, places: dict[str, Any]) -> list[Any]:
    """What an op takes and waits for; what is not of the part, by name."""
    taken = [*op.inputs, *op.control_inputs]
    return [places.get(x.name, x.name) for x in taken]


def _leaf_places(part: Part, places: dict[str, Any]) -> Any:
    return tf.nest.map_structure(
        lambda x: None if x is None else str(places.get(x.name, x.name)),
        part.results,
        expand_composites=True,
    )


def _bare(op: tf.Operation) -> tf.compat.v1.NodeDef:
    """The op without what tells its tower."""
    node = op.node_def
    for field in ("name", "device", "input"):
        node.ClearField(field)
    node.attr.pop("_class", None)  # beside what: the device says that
    return node


def _copy(
    part: Part, inputs: Sequence[tf.Tensor], device: str, scope: str
) -> Part:
    """The part for other inputs, on another device."""
    graph = tf.compat.v1.get_default_graph()
    own = re.compile(f"(^|/){re.escape(part.scope)}")

    def renamed(name: str) -> str:
        return own.sub(lambda match: f"{match[1]}{scope}", name)

    places = _places(part)
    names: dict[str, str] = {}
    same: dict[bytes, str] = {}
    given: dict[str, tf.Tensor] = {}
    copy = tf.compat.v1.GraphDef(versions=graph.graph_def_versions)
    for op in part.ops:
        node = _bare(op)
        for tensor in op.inputs:
            place = places.get(tensor.name, ("outside",))
            if place[0] == "op":
                name = f"{names[tensor.op.name]}:{tensor.value_index}"
            else:
                name = tensor.name
                given[name] = inputs[place[1]] if place[1:] else tensor
            node.input.append(name)
        node.input.extend(f"^{names[x.name]}" for x in op.control_inputs)
        name = renamed(op.name)
        names[op.name] = same.setdefault(
            node.SerializeToString(deterministic=True), name
        )
        if names[op.name] == name:  # else the same is there, once is enough
            node.name = name
            copy.node.append(node)
    with tf.device(device):
        ops = tf.graph_util.import_graph_def(
            copy, given, list(names.values()), name=""
        )

    def of_copy(tensor: tf.Tensor | None) -> tf.Tensor | None:
        if tensor is None:
            return None
        place = places.get(tensor.name, ("outside",))
        if place[0] != "op":
            return inputs[place[1]] if place[1:] else tensor
        result = ops[place[1]].outputs[place[2]]
        result.set_shape(tensor.shape)
        return result

    results = tf.nest.map_structure(
        of_copy, part.results, expand_composites=True
    )
    return Part(inputs, ops, results, device, scope, True)
