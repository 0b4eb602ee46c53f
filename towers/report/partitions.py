"""partitions: one function as it was executed, a graph per device."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.foreign import tf_nodes
from towers.placement.device_names import short
from towers.report.recording import Batches, Ran
from towers.report.tensor_shapes import in_loops, shapes_of, source

_ENDS = (*tf_nodes.ARGUMENTS, *tf_nodes.RESULTS)
_COPIES = ("Identity", "IdentityN", "Snapshot", "StopGradient", "Enter")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A tensor that went from one device to another.

    Attributes:
      source, target: the devices.
      tensor: its name in the executed graph.
      dtype: its `tf.DType`.
      shape: its shape when it was sent, or None if that is not known.
      times: how often it was sent, or None inside a loop.
    """

    source: str
    target: str
    tensor: str
    dtype: tf.DType
    shape: tuple[int, ...] | None
    times: int | None

    @property
    def bytes(self) -> int | None:
        """What all of it came to, in bytes; None where that is not known."""
        if self.shape is None or self.times is None or not self.dtype.size:
            return None
        return self.times * math.prod(self.shape) * self.dtype.size


class Partitions:
    """The partitions of one function, put side by side.

    Attributes:
      nodes: (device, name, op type).
      sends: the nodes that send to other devices.
    """

    def __init__(self, ran: Ran):
        self.nodes: list[tuple[str, str, str]] = []
        self.sends: list[Any] = []
        self._ran = ran
        self._whole = {node.name: node for node in ran.graph.node}
        self._parts: list[dict[str, Any]] = []
        self._looping: list[set[str]] = []
        self._sent_by: dict[Any, tuple[int, Any]] = {}
        self._taken: dict[Any, tuple[Any, int]] = {}
        for i, graph in enumerate(ran.partitions):
            self._parts.append({node.name: node for node in graph.node})
            self._looping.append(in_loops(graph.node))
            library = {f.signature.name: f for f in graph.library.function}
            for device, name, node in _walked(graph.node, library):
                if node.op in tf_nodes.SENDS:
                    self._sent_by[_key(node)] = i, node
                    if _ends(node)[0] != _ends(node)[1]:
                        self.sends.append(node)
                elif node.op not in (
                    *tf_nodes.RECEIVES,
                    *_ENDS,
                ) and not self._only_waits(i, node):
                    self.nodes.append((device, name, _plain(node.op)))
                for k, tensor in enumerate(node.input):
                    received = self._parts[i].get(source(tensor))
                    waits = tensor.startswith("^")
                    if (
                        received
                        and received.op in tf_nodes.RECEIVES
                        and not waits
                    ):
                        self._taken[_key(received)] = node, k

    def _only_waits(self, i: int, node: Any) -> bool:
        """Whether an op was added to wait for another device, where it was cut."""
        if node.op != "Identity" or node.name in self._whole:
            return False
        taken = self._parts[i].get(source(node.input[0]))
        return taken is not None and taken.op in tf_nodes.RECEIVES

    def transfers(self, batches: Sequence[Batches]) -> list[Transfer]:
        """What each send carried."""
        names = [self._in_whole(send) for send in self.sends]
        shapes = shapes_of(self._ran, batches, [n for n in names if n])
        return [
            Transfer(
                *_ends(send),
                name or send.input[0],
                tf.as_dtype(send.attr["T"].type),
                shapes.get(name) if name else self._constant_shape(send),
                None if self._loops(send) else len(self._ran.calls),
            )
            for send, name in zip(self.sends, names)
        ]

    def _in_whole(self, send: Any) -> str | None:
        """What is sent, by its name in the function before it was cut.

        A kernel may do the work of two ops of that, and what it says besides
        is then found by who takes it. None for the empty constants by which
        one device waits for another.
        """
        name = send.input[0]
        here, there = self._made_by(send), self._whole.get(source(name))
        if not there or not here or _plain(here.op) != there.op:
            taker, k = self._taken.get(_key(send), (None, 0))
            known = self._whole.get(taker.name) if taker else None
            if known is None or k >= len(known.input):
                return None
            name = known.input[k]
        return name if ":" in name else f"{name}:0"

    def _made_by(self, send: Any) -> Any:
        i, _ = self._sent_by[_key(send)]
        return self._parts[i].get(source(send.input[0]))

    def _constant_shape(self, send: Any) -> tuple[int, ...] | None:
        made = self._made_by(send)
        if made is None or made.op != "Const":
            return None
        return tuple(d.size for d in made.attr["value"].tensor.tensor_shape.dim)

    def _loops(self, send: Any) -> bool:
        i, _ = self._sent_by[_key(send)]
        return send.name in self._looping[i]

    def origin(self, send: Any) -> tuple[Any, str]:
        """Where the value that is sent was made, and on which device.

        Copies and transfers on its way are passed, and reads of a variable
        are one value.
        """
        i, tensor = self._sent_by[_key(send)][0], send.input[0]
        while True:
            node = self._parts[i].get(source(tensor))
            port = int(tensor.split(":")[1]) if ":" in tensor else 0
            if node is None:
                return (i, tensor), _ends(send)[0]
            if node.op in _COPIES:
                tensor = node.input[port]
            elif node.op in tf_nodes.RECEIVES and _key(node) in self._sent_by:
                i, sent = self._sent_by[_key(node)]
                tensor = sent.input[0]
            elif node.op == "ReadVariableOp":
                tensor = node.input[0]
            else:
                return (i, source(tensor), port), short(node.device)


def _walked(
    nodes: Any, library: Any, caller: str = "", device: str = ""
) -> Any:
    """(device, name, node), into the functions that a node still calls."""
    for node in nodes:
        where = short(node.device) or device
        name = f"{caller}{node.name}"
        yield where, name, node
        for attribute in node.attr.values():
            function = library.get(attribute.func.name)
            if function is not None:
                yield from _walked(
                    function.node_def, library, f"{name}/", where
                )


def _plain(op: str) -> str:
    """A kernel of oneDNN by the name that its op has without that."""
    op = re.sub("^_Mkl(Native)?", "", op)
    return "_" * op.startswith("Fused") + op


def _key(node: Any) -> tuple[Any, ...]:
    """What a send and its receive have in common."""
    return tuple(
        node.attr[name].s
        for name in ("send_device", "recv_device", "tensor_name")
    )


def _ends(send: Any) -> tuple[str, str]:
    start, end, _ = _key(send)
    return short(start.decode()), short(end.decode())
