"""partitions: one function as it was executed, a graph per device."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign import tf_nodes
from towers.foreign.tf_nodes import (
    full,
    op_of_kernel,
    port,
    rendezvous,
    source,
)
from towers.placement.device_names import short
from towers.report.graph_defs import COPY_NODES, copied, ends, in_loops, walked
from towers.report.parts import Part, parts_in_words
from towers.report.recording import Elements, Ran
from towers.report.sent_kinds import Kinds
from towers.report.tensor_shapes import shapes_of

_ENDS = (*tf_nodes.ARGUMENTS, *tf_nodes.RESULTS)
# A value, in a place of a graph: its port, and the device that made it.
_Origin = tuple[tuple[Any, ...], str]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A tensor that went from one device to another.

    Attributes:
      source, target: the devices.
      tensor: its name in the executed graph.
      dtype: its `tf.DType`.
      shape: its shape when it was sent, or None if that is not known.
      times: how often it was sent, or None inside a loop.
      parts: what it holds, by kind, layer and variable.
    """

    source: str
    target: str
    tensor: str
    dtype: tf.DType
    shape: tuple[int, ...] | None
    times: int | None
    parts: tuple[Part, ...] = ()

    @property
    def holds(self) -> str:
        """What it holds in words: "weights of dense/kernel"."""
        return parts_in_words(self.parts)

    @property
    def bytes(self) -> int | None:
        """What all of it came to, in bytes; None where that is not known."""
        once = self.bytes_once
        return None if once is None or self.times is None else self.times * once

    @property
    def bytes_once(self) -> int | None:
        """The bytes of one sending, or None if they are unknown."""
        if self.shape is None or not self.dtype.size:
            return None
        return math.prod(self.shape) * self.dtype.size

    def to_dict(self) -> dict[str, Any]:
        """All of it, fit for JSON."""
        return {
            **dataclasses.asdict(self),
            "dtype": self.dtype.name,
            "shape": None if self.shape is None else list(self.shape),
            "bytes": self.bytes,
        }


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
            for device, name, node in walked(graph):
                if node.op in tf_nodes.SENDS:
                    self._sent_by[rendezvous(node)] = i, node
                    if ends(node)[0] != ends(node)[1]:
                        self.sends.append(node)
                elif node.op not in (
                    *tf_nodes.RECEIVES,
                    *_ENDS,
                ) and not self._only_waits(i, node):
                    self.nodes.append((device, name, op_of_kernel(node.op)))
                for k, tensor in enumerate(node.input):
                    received = self._parts[i].get(source(tensor))
                    waits = tensor.startswith("^")
                    if (
                        received
                        and received.op in tf_nodes.RECEIVES
                        and not waits
                    ):
                        self._taken[rendezvous(received)] = node, k

    def _only_waits(self, i: int, node: Any) -> bool:
        """Whether an op was added to wait for another device, where it was cut."""
        if node.op != "Identity" or node.name in self._whole:
            return False
        taken = self._parts[i].get(source(node.input[0]))
        return taken is not None and taken.op in tf_nodes.RECEIVES

    def transfers(self, batches: Sequence[Elements]) -> list[Transfer]:
        """What each send carried."""
        return [transfer for transfer, _ in self.crossings(batches)]

    def crossings(
        self,
        batches: Sequence[Elements],
        counts: Mapping[Any, int] | None = None,
        kinds: Kinds | None = None,
    ) -> list[tuple[Transfer, dict[_Origin, int]]]:
        """What each send carried, and the bytes of each value in there.

        Several small ones may be joined for their way. Copies and transfers on
        it are passed, and reads of a variable are one value. `counts` are how
        often sends in loops happened, by `rendezvous`; `kinds` says what things are.
        """
        counts = counts or {}
        names = [self._in_whole(send) for send in self.sends]
        values = [self._origins(*self._start(send)) for send in self.sends]
        asked = [n for n in names if n]
        asked += [name for each in values for _, name in each if name]
        if kinds:
            asked += [x for n in names if n for x in kinds.pieces(n)]
        shapes = shapes_of(self._ran, batches, asked)
        transfers = []
        for send, name, each in zip(self.sends, names, values):
            transfer = Transfer(
                *ends(send),
                name or send.input[0],
                tf.as_dtype(send.attr["T"].type),
                shapes.get(name) if name else self._constant_shape(send),
                counts.get(rendezvous(send))
                if self._loops(send)
                else len(self._ran.calls),
            )
            if kinds:
                held_there = kinds.parts(transfer, shapes)
                transfer = dataclasses.replace(transfer, parts=held_there)
            parts = [
                dataclasses.replace(transfer, shape=shapes.get(part)).bytes or 0
                for _, part in each
                if part
            ]
            if len(each) > 1 and sum(parts) == transfer.bytes:
                held = dict(zip([origin for origin, _ in each], parts))
            else:
                ((whole, _),) = self._origins(*self._start(send), apart=False)
                held = {whole: transfer.bytes or 0}
            transfers.append((transfer, held))
        return transfers

    def _in_whole(self, send: Any) -> str | None:
        """What is sent, by its name in the function before it was cut.

        A kernel may do the work of two ops of that, and what it says besides
        is then found by who takes it. None for the empty constants by which
        one device waits for another.
        """
        name = send.input[0]
        here, there = self._made_by(send), self._whole.get(source(name))
        if not there or not here or op_of_kernel(here.op) != there.op:
            taker, k = self._taken.get(rendezvous(send), (None, 0))
            original = self._whole.get(taker.name) if taker else None
            if original is None or k >= len(original.input):
                return None
            name = original.input[k]
        return full(name)

    def _made_by(self, send: Any) -> Any:
        i, _ = self._sent_by[rendezvous(send)]
        return self._parts[i].get(source(send.input[0]))

    def _constant_shape(self, send: Any) -> tuple[int, ...] | None:
        node = self._made_by(send)
        if node is None or node.op != "Const":
            return None
        return tuple(d.size for d in node.attr["value"].tensor.tensor_shape.dim)

    def _loops(self, send: Any) -> bool:
        i, _ = self._sent_by[rendezvous(send)]
        return send.name in self._looping[i]

    def _maker(self, i: int, tensor: str) -> tuple[int, str]:
        """The partition, and what there made a tensor, by its name."""
        while True:
            node = self._parts[i].get(source(tensor))
            if node is None:
                return i, tensor
            if node.op in COPY_NODES:
                tensor = copied(node, tensor)
            elif (
                node.op in tf_nodes.RECEIVES
                and rendezvous(node) in self._sent_by
            ):
                i, sent = self._sent_by[rendezvous(node)]
                tensor = sent.input[0]
            elif node.op in ("ReadVariableOp", "Reshape"):
                tensor = node.input[0]
            elif node.op == "SplitV":
                j, joined = self._maker(i, node.input[0])
                whole = self._parts[j].get(source(joined))
                count = node.attr["num_split"].i
                if whole is None or len(self._joined(whole)) != count:
                    return i, tensor
                i, tensor = j, whole.input[port(tensor)]
            else:
                return i, tensor

    def _joined(self, node: Any) -> list[str]:
        """The names, in the whole function, of what one op joins."""
        original = self._whole.get(node.name)
        if node.op != "ConcatV2" or original is None or original.op != node.op:
            return []
        names = list(original.input)[: original.attr["N"].i]
        return names if node.attr["N"].i == len(names) else []

    def _start(self, send: Any) -> tuple[int, str, str]:
        return self._sent_by[rendezvous(send)][0], send.input[0], ends(send)[0]

    def _origins(
        self, i: int, tensor: str, device: str, apart: bool = True
    ) -> list[tuple[_Origin, str]]:
        """The values in a tensor, and what they are called when joined.

        Args:
          i: the partition that sends it.
          tensor: its name there.
          device: the partition's.
          apart: whether one that is joined is several values.
        """
        i, tensor = self._maker(i, tensor)
        node = self._parts[i].get(source(tensor))
        names: list[str] = []
        if node is not None:
            device = short(node.device)
            names = self._joined(node) if apart else []
        if node is None or not names:
            return [(((i, source(tensor), port(tensor)), device), "")]
        return [
            (origin, deeper or full(name))
            for part, name in zip(node.input, names)
            for origin, deeper in self._origins(i, part, device)
        ]
