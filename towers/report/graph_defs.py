"""graph_defs: walks through a `GraphDef`, and what some tensors need of one."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from towers.foreign.tf_nodes import (
    ancestor_nodes,
    library,
    port,
    rendezvous,
    source,
)
from towers.placement.device_names import short

COPY_NODES = ("Identity", "IdentityN", "Snapshot", "StopGradient", "Enter")


def walked(graph: Any) -> Iterator[tuple[str, str, Any]]:
    """(device, name, node), into the functions that a node still calls."""
    functions = library(graph)

    def within(
        nodes: Iterable[Any], caller: str, device: str
    ) -> Iterator[tuple[str, str, Any]]:
        for node in nodes:
            where = short(node.device) or device
            name = f"{caller}{node.name}"
            yield where, name, node
            for attribute in node.attr.values():
                function = functions.get(attribute.func.name)
                if function is not None:
                    yield from within(function.node_def, f"{name}/", where)

    return within(graph.node, "", "")


def ends(send: Any) -> tuple[str, str]:
    """The devices that a send, or a receive, is from and to."""
    start, end, _ = rendezvous(send)
    return short(start.decode()), short(end.decode())


def copied(node: Any, tensor: str) -> str:
    """What a tensor is a copy of, by its node, one of `COPY_NODES` or the like."""
    return str(node.input[port(tensor) if node.op == "IdentityN" else 0])


def in_loops(nodes: Iterable[Any]) -> set[str]:
    """The names of nodes that run once per step of a `tf.while_loop`."""
    nodes = list(nodes)
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(source(name), []).append(node)
    names: set[str] = set()
    ahead = [node for node in nodes if node.op == "Enter"]
    while ahead:
        for node in readers.get(ahead.pop().name, []):
            if node.op != "Exit" and node.name not in names:
                names.add(node.name)
                ahead.append(node)
    return names


def pruned(graph: Any, tensors: Iterable[str]) -> Any:
    """A copy of a graph without what none of some tensors needs.

    Of what an `IdentityN` passes on, also in functions, that is what somebody
    takes: TensorFlow's optimizer leaves out the rest. Here placeholders are there.
    """
    needs = ancestor_nodes({node.name: node for node in graph.node}, tensors)
    names = {name for name, _ in needs}
    kept = tf.compat.v1.GraphDef(versions=graph.versions, library=graph.library)
    for node in graph.node:
        if node.name in names:
            copy = kept.node.add()
            copy.CopyFrom(node)
            kept.node.extend(_left_out(copy, needs))
    for function in kept.library.function:
        body = {node.name: node for node in function.node_def}
        results = [*function.ret.values(), *function.control_ret.values()]
        taken = ancestor_nodes(body, results)
        for node in body.values():
            function.node_def.extend(_left_out(node, taken, ":output:0"))
    return kept


def _left_out(
    node: Any, taken: Mapping[tuple[str, int], Any], port: str = ""
) -> list[Any]:
    """Placeholders, now inputs of an `IdentityN`, for those nobody takes of it.

    Args:
      node: any.
      taken: what somebody does, by the name of its node and the port.
      port: how a node's first result is spelled there.
    """
    if node.op != "IdentityN":
        return []
    placeholders = []
    for k, dtype in enumerate(node.attr["T"].list.type):
        if (node.name, k) not in taken:
            nothing = tf.compat.v1.NodeDef(
                name=f"{node.name}/nothing_{k}",
                op="Placeholder",
                device=node.device,
            )
            nothing.attr["dtype"].type = dtype
            node.input[k] = f"{nothing.name}{port}"
            placeholders.append(nothing)
    return placeholders
