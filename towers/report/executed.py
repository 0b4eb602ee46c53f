"""executed: what recorded functions ran, sent, and how they call it."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign import tf_nodes
from towers.foreign.tf_nodes import rendezvous
from towers.report.graph_defs import walked
from towers.report.moved import Moved, moved
from towers.report.partitions import Partitions, Transfer
from towers.report.recording import Ran, Recording
from towers.report.sent_kinds import Kinds
from towers.report.values import SizedVariable
from towers.report.variables import VariableUse

# A function that was called once in one that was nothing but its call.
_CALL = re.compile(r"^(ConstantFolding/)?(?:(?:Stateful)?PartitionedCall/)+")
_BESIDE = ("ReadVariableOp", "Resource", "Assign", "VarHandle", "VarIs")
_BACKWARD = "__backward_"


@dataclasses.dataclass(frozen=True)
class Executed:
    """What ran.

    Attributes:
      nodes: (device, name, op type).
      transfers: what crossed.
      sent: bytes by value, the device that made it, and one that received it.
      moved: ops that are elsewhere than they were asked to be.
      carried: the transfers, by the `rendezvous` of their send.
    """

    nodes: tuple[tuple[str, str, str], ...]
    transfers: tuple[Transfer, ...]
    sent: Mapping[tuple[Any, str, str], int]
    moved: tuple[Moved, ...]
    carried: Mapping[Any, Transfer]


def executed(
    recording: Recording,
    uses: Sequence[VariableUse],
    counts: Mapping[Any, int],
) -> Executed:
    """The ops, transfers and variables of all functions of a recording.

    Args:
      recording: has them.
      uses: what its variables are, in their order.
      counts: how often sends in loops happened, where that was counted.
    """
    held = {
        id(variable.handle): SizedVariable(use, math.prod(variable.shape))
        for variable, use in zip(recording.variables, uses)
    }
    nodes: list[tuple[str, str, str]] = []
    transfers: list[Transfer] = []
    sent: dict[tuple[Any, str, str], int] = {}
    strays: list[Moved] = []
    carried: dict[Any, Transfer] = {}
    for i, ran in enumerate(recording.functions):
        wishes = _wishes(ran)
        # Towers are made layer by layer, and cut in any order.
        order = {name: k for k, name in enumerate(wishes)}
        parts = Partitions(ran)
        crossings = parts.crossings(
            recording.batches, counts, _kinds(ran, held)
        )
        named = outside_of_call(
            [name for _, name, _ in parts.nodes]
            + [t.tensor for t, _ in crossings]
        )
        ran_first = sorted(
            parts.nodes, key=lambda n: order.get(n[1], len(order))
        )
        nodes += [(device, named(name), op) for device, name, op in ran_first]
        own = [
            dataclasses.replace(t, tensor=named(t.tensor)) for t, _ in crossings
        ]
        transfers += own
        carried.update(zip(map(rendezvous, parts.sends), own))
        strays += [
            dataclasses.replace(m, op=named(m.op))
            for m in moved(parts.nodes, wishes)
        ]
        for transfer, values in crossings:
            for (value, home), size in values.items():
                sent[(i, value), home, transfer.target] = size
    return Executed(
        tuple(nodes), tuple(transfers), sent, tuple(strays), carried
    )


def _wishes(ran: Ran) -> dict[str, str]:
    """Devices by op, "" where it is beside a variable, whatever it asks for."""
    if ran.asked is None:
        return {}
    return {
        name: "" if node.op.startswith(_BESIDE) else device
        for device, name, node in walked(ran.asked)
    }


def _kinds(ran: Ran, held: Mapping[int, SizedVariable]) -> Kinds:
    """What a function's tensors are."""
    handles = {
        node.name: held[id(argument)]
        for node in ran.graph.node
        if node.op in tf_nodes.ARGUMENTS
        and node.attr["T"].type == tf.resource.as_datatype_enum
        for argument in [ran.calls[0][node.attr["index"].i]]
        if id(argument) in held
    }
    return Kinds(ran.graph.node, handles, held.values(), _BACKWARD in ran.name)


def outside_of_call(names: Iterable[str]) -> Callable[[str], str]:
    """Takes from names the call that they are of, where they stay apart.

    Keras calls the function of a step in another, as its `fit` does.
    """
    every = set(names)
    count = collections.Counter(_CALL.sub(r"\1", name) for name in every)

    def named(name: str) -> str:
        bare = _CALL.sub(r"\1", name)
        return bare if count[bare] < 2 else name

    return named
