"""write_graph: executed graphs as one, for TensorBoard."""

import os
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.foreign import tf_nodes
from towers.foreign.tf_nodes import library, rendezvous
from towers.report.executed import outside_of_call


def write_graph(graphs: Sequence[Any], logdir: str | os.PathLike) -> None:
    """Writes partitions to a folder that TensorBoard looks at.

    Args:
      graphs: a `GraphDef` per function and device.
      logdir: the folder.
    """
    writer = tf.summary.create_file_writer(os.fspath(logdir))
    with writer.as_default(step=0):
        tf.summary.graph(joined(graphs))
    writer.close()


def joined(graphs: Sequence[Any]) -> Any:
    """One `GraphDef`, in which a receive comes after its send.

    Names that several functions have get a number in front, and those of a function
    that was called in another are told without the call.
    """
    whole = tf.compat.v1.GraphDef()
    whole.library.function.extend(library(*graphs).values())
    sends: dict[Any, str] = {}
    partitions: dict[str, int] = {}
    copies: list[Any] = []
    for i, graph in enumerate(graphs):
        names = [node.name for node in graph.node]
        named = outside_of_call(names)
        renamed = {
            name: f"partition_{i}/{named(name)}" * (named(name) in partitions)
            or named(name)
            for name in names
        }
        partitions.update(dict.fromkeys(map(named, names), i))
        for original in graph.node:
            node = whole.node.add()
            node.CopyFrom(original)
            node.name = renamed.get(node.name, node.name)
            node.input[:] = [_renamed(name, renamed) for name in node.input]
            copies.append(node)
            if node.op in tf_nodes.SENDS:
                sends[rendezvous(node)] = node.name
    for node in copies:
        if node.op in tf_nodes.RECEIVES and rendezvous(node) in sends:
            node.input.append(f"^{sends[rendezvous(node)]}")
    return whole


def _renamed(tensor: str, renamed: dict[str, str]) -> str:
    """An input ("a", "a:1" or "^a") after its node has another name."""
    before = "^" if tensor.startswith("^") else ""
    name, colon, port = tensor.removeprefix("^").partition(":")
    return f"{before}{renamed.get(name, name)}{colon}{port}"
