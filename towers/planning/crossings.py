"""crossings: what would go from device to device in a graph that was placed."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign import tf_nodes
from towers.foreign.tf_nodes import full, op_of_kernel, source
from towers.placement.device_names import short
from towers.report.graph_defs import COPY_NODES, copied, in_loops, walked
from towers.report.partitions import Transfer
from towers.report.sent_kinds import Kinds
from towers.report.tensor_shapes import known_shapes
from towers.report.values import SizedVariable


class PlacedGraph:
    """A placed graph, not cut yet.

    Args:
      placed: a `GraphDef`, all nodes with a device.
      graph: what it was made of, which knows shapes.
      handles: its variables, by the ops that those are.

    Attributes:
      nodes: (device, name, op type).
    """

    def __init__(
        self, placed: Any, graph: tf.Graph, handles: Mapping[str, SizedVariable]
    ):
        self._graph = graph
        self._kinds = Kinds(placed.node, handles)
        self._placed = placed
        self.nodes = [
            (device, name, op_of_kernel(node.op))
            for device, name, node in walked(placed)
        ]
        self._nodes = {node.name: node for node in placed.node}
        spelled = functools.cache(short)
        self._where = {
            name: spelled(node.device) for name, node in self._nodes.items()
        }

    @functools.cached_property
    def transfers(self) -> list[Transfer]:
        """Each value once to each device that takes it, as TensorFlow sends.

        Whatever waits for ops of another device only, waits for all of them at once.
        """
        tensors: dict[tuple[str, str], str] = {}
        for name, node in self._nodes.items():
            for tensor in map(full, node.input):
                there, here = self._where[source(tensor)], self._where[name]
                what = f"^{there}" if tensor.startswith("^") else tensor
                if there != here:
                    tensors.setdefault((what, here), tensor)
        sent = [(tensor, target) for (_, target), tensor in tensors.items()]
        looping = in_loops(self._nodes.values())
        crossing = [tensor for tensor, _ in sent if tensor[0] != "^"]
        values = [x for tensor in crossing for x in self._kinds.pieces(tensor)]
        shapes = self._shapes(list(dict.fromkeys([*crossing, *values])))
        transfers = [
            Transfer(
                self._where[source(tensor)],
                target,
                tensor,
                self._dtype(tensor),
                # To wait for an op, an empty constant is sent.
                (0,) if tensor.startswith("^") else shapes.get(tensor),
                None if source(tensor) in looping else 1,
            )
            for tensor, target in sent
        ]
        return [
            dataclasses.replace(t, parts=self._kinds.parts(t, shapes))
            for t in transfers
        ]

    @property
    def sent(self) -> dict[tuple[Any, str, str], int]:
        """Bytes by value, the device that made it, and one that received it."""
        sizes = {}
        for transfer in self.transfers:
            origin = self._origin(transfer.tensor)
            home = self._where[source(origin)]
            sizes[origin, home, transfer.target] = transfer.bytes or 0
        return sizes

    def taken(self) -> Iterator[tuple[str, str]]:
        """The names of nodes, and of the tensors that each takes."""
        for name, node in self._nodes.items():
            for tensor in node.input:
                if not tensor.startswith("^"):
                    yield name, full(tensor)

    def device_of(self, name: str) -> str:
        """Where a node is, or what makes a tensor."""
        return self._where[source(name)]

    def is_float(self, tensor: str) -> bool:
        """Whether a tensor is of floats."""
        return self._dtype(tensor).is_floating

    def sizes(self, tensors: Sequence[str]) -> dict[str, int | None]:
        """Bytes of tensors; None where a shape is not known beforehand."""
        shapes = self._shapes(tensors)
        return {
            x: math.prod(shapes[x]) * self._dtype(x).size
            if x in shapes
            else None
            for x in tensors
        }

    def buffer(self, tensor: str, aliases: Sequence[str]) -> str:
        """Where a value's bytes were made, past copies and ops that alias them."""
        while True:
            tensor = self._origin(tensor)
            node = self._nodes[source(tensor)]
            if node.op not in aliases:
                return tensor
            tensor = full(node.input[0])

    def _shapes(self, values: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Of tensors, where they are known beforehand."""
        # What a function that was inlined takes is known outside of it.
        origins = {tensor: self._origin(tensor) for tensor in values}
        shapes = known_shapes(self._graph, [*values, *origins.values()])
        for tensor, origin in origins.items():
            if origin in shapes and not self._is_read(origin):
                shapes.setdefault(tensor, shapes[origin])
        inlined = [x for x in values if x not in shapes and not self._knows(x)]
        if inlined:
            shapes.update(known_shapes(self._inlined, inlined))
        return shapes

    def _origin(self, tensor: str) -> str:
        """Where a value was made, past copies of it."""
        while not tensor.startswith("^"):
            node = self._nodes[source(tensor)]
            if node.op in COPY_NODES:
                tensor = full(copied(node, tensor))
            elif node.op == "ReadVariableOp":
                return full(node.input[0])
            else:
                break
        return tensor

    def _is_read(self, tensor: str) -> bool:
        """Whether this is a variable's handle, which is itself a scalar."""
        return self._nodes[source(tensor)].op == "VarHandleOp"

    def _dtype(self, tensor: str) -> tf.DType:
        if tensor.startswith("^"):
            return tf.float32
        graph = self._graph if self._knows(tensor) else self._inlined
        return graph.get_tensor_by_name(tensor).dtype

    def _knows(self, tensor: str) -> bool:
        """Whether the graph has a tensor itself, and no inlined function."""
        return source(tensor) in self._names

    @functools.cached_property
    def _names(self) -> set[str]:
        return {op.name for op in self._graph.get_operations()}

    @functools.cached_property
    def _inlined(self) -> tf.Graph:
        """The placed graph, of which TensorFlow infers dtypes and shapes."""
        whole = tf.compat.v1.GraphDef()
        whole.CopyFrom(self._placed)
        for node in whole.node:  # neither says anything of shapes
            node.device = ""
            node.attr.pop(tf_nodes.BESIDE, None)
        with tf.Graph().as_default() as inferred:
            tf.graph_util.import_graph_def(whole, name="")
        return inferred
