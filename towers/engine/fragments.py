"""fragments: pieces of a graph, and whether two are the same but for their tower."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.engine.host import host_of
from towers.foreign import tf_nodes


@dataclasses.dataclass(frozen=True)
class Fragment:
    """A part of the graph that was made of `inputs`, on one device.

    Attributes:
      inputs: the tensors that it was made of.
      ops: what its results need, in the order in which they were made.
      results: a nest of tensors, or of None.
      device: in full.
      scope: the name scope of its tower, with its slash.
      kind: what it was compared with.
      copied: whether it is a copy.
    """

    inputs: Sequence[tf.Tensor]
    ops: Sequence[tf.Operation]
    results: Any
    device: str
    scope: str
    kind: Any = None
    copied: bool = False

    @functools.cached_property
    def places(self) -> dict[str, Any]:
        """Tensors and ops by name: where in the part they are."""
        places: dict[str, Any] = {
            tensor.name: ("input", i) for i, tensor in enumerate(self.inputs)
        }
        for i, op in enumerate(self.ops):
            places[op.name] = i
            for k, tensor in enumerate(op.outputs):
                places[tensor.name] = ("op", i, k)
        return places


def needed_ops(
    candidates: Sequence[tf.Operation], results: Any
) -> list[tf.Operation]:
    """Those ops that results depend on, and those that must not be left out.

    Not placeholders: what a function takes from outside is one for all parts, though
    it came in with one of them.
    """
    flat = tf.nest.flatten(results, expand_composites=True)
    needed = {x.op.name for x in flat if x is not None}
    ops = []
    for op in reversed(candidates):
        if op.type == "Placeholder":
            continue
        if op.name in needed or not can_be_copied(op):
            needed.update(x.op.name for x in op.inputs)
            needed.update(x.name for x in op.control_inputs)
            ops.append(op)
    return ops[::-1]


def are_alike(one: Fragment, other: Fragment) -> bool:
    """Whether two parts differ only in names, devices and inputs."""
    if one.device == other.device or len(one.ops) != len(other.ops):
        return False  # on one device, one that a layer names would not show
    places, others = one.places, other.places
    return _leaf_places(one, places) == _leaf_places(other, others) and all(
        can_be_copied(a)
        and _is_own(a, one)
        and _is_own(b, other)
        and (a.device == one.device) == (b.device == other.device)
        and _sources(a, places) == _sources(b, others)
        and all(x.name in places for x in a.control_inputs)
        and bare_node(a) == bare_node(b)
        for a, b in zip(one.ops, other.ops)
    )


def stands_alone(part: Fragment) -> bool:
    """Whether a part is made of nothing but its inputs, on its device."""
    places = part.places
    return all(
        can_be_copied(op)
        and _is_own(op, part)
        and all(x.name in places for x in [*op.inputs, *op.control_inputs])
        for op in part.ops
    ) and all(
        x is None or x.name in places
        for x in tf.nest.flatten(part.results, expand_composites=True)
    )


def fingerprint(part: Fragment) -> tuple[Any, ...]:
    """All of a part but its tower, and the names that are one op's own."""
    places, lines = part.places, []
    for op in part.ops:
        node = bare_node(op)
        node.attr.pop(tf_nodes.GRADIENT, None)
        functions = [a.name for a in op.op_def.attr if "func" in a.type]
        for name in ("seed", "seed2", *functions):
            node.attr.pop(name, None)
        text = node.SerializeToString(deterministic=True)
        lines.append((text, *_sources(op, places)))
    return tuple(lines)


def can_be_copied(op: tf.Operation) -> bool:
    """Not where a copy would be something else than building it again.

    Random ops have a seed each, or numbers of their tower's, a custom gradient speaks of the tensors that it
    was made with, and the gradient of a loop or of a function's call changes the
    op that it is of.
    """
    return not (
        op.op_def.is_stateful
        or any("func" in attribute.type for attribute in op.op_def.attr)
        or {tf_nodes.GRADIENT, tf_nodes.OWN} & {*op.node_def.attr}
    )


def _is_own(op: tf.Operation, part: Fragment) -> bool:
    """Whether an op is on the part's device, or on the host of that."""
    return op.device == part.device or op.device == host_of(part.device)


def _sources(op: tf.Operation, places: dict[str, Any]) -> list[Any]:
    """What an op takes and waits for; what is not of the part, by name."""
    taken = [*op.inputs, *op.control_inputs]
    return [places.get(x.name, x.name) for x in taken]


def _leaf_places(part: Fragment, places: dict[str, Any]) -> Any:
    return tf.nest.map_structure(
        lambda x: None if x is None else str(places.get(x.name, x.name)),
        part.results,
        expand_composites=True,
    )


def bare_node(op: tf.Operation) -> tf.compat.v1.NodeDef:
    """The op without what tells its tower."""
    node = op.node_def
    for field in ("name", "device", "input"):
        node.ClearField(field)
    node.attr.pop(tf_nodes.BESIDE, None)  # beside what: the device says that
    return node
