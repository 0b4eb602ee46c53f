"""remote_functions: what ran whole in another process, as if it were cut here.

A function that is called under a device of another process goes there as it is. That
process places it and says nothing of it. So it is told only where there is but one
way to place it: on the device that it was called under.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.foreign import tf_calls, tf_kernels, tf_nodes
from towers.placement.device_names import process_of, short


def remote(device: str) -> str:
    """The device, by its short name, if it is another process's; else ""."""
    return short(device) if process_of(device) else ""


def remote_partitions(
    definition: Any, device: str, sources: Sequence[str]
) -> tuple[Any, list[Any]]:
    """A function's graph, and a part of it per device.

    Args:
      definition: its `FunctionDef`.
      device: where it was called, in another process.
      sources: the device of each argument.

    Raises:
      RuntimeError: it may not be on this device alone.
    """
    body = tf_calls.graph_def_of(definition)
    _check_alone(definition, body, device, sources)
    graph = tf.compat.v1.GraphDef(versions=body.versions, library=body.library)
    parts = {device: tf.compat.v1.GraphDef(library=body.library)}
    count = len(sources)
    for i, (node, place) in enumerate(zip(body.node, sources)):
        argument = graph.node.add(name=node.name, op=tf_nodes.ARGUMENTS[0])
        argument.attr["index"].i = i
        argument.attr["T"].type = node.attr["dtype"].type
        argument.device = place
        part = parts.setdefault(place, tf.compat.v1.GraphDef())
        part.node.add().CopyFrom(argument)
        if place == device:
            continue
        ends = [
            part.node.add(name=f"{node.name}/send", op=tf_nodes.SENDS[0]),
            parts[device].node.add(name=node.name, op=tf_nodes.RECEIVES[0]),
        ]
        ends[0].input.append(node.name)
        for end in ends:
            end.attr["T"].type = node.attr["dtype"].type
            end.attr["send_device"].s = place.encode()
            end.attr["recv_device"].s = device.encode()
            end.attr["tensor_name"].s = node.name.encode()
        ends[0].device, ends[1].device = place, device
    for node in list(body.node)[count:]:
        for target in (graph, parts[device]):
            copy = target.node.add()
            copy.CopyFrom(node)
            copy.device = device
    return graph, list(parts.values())


def _check_alone(
    definition: Any, body: Any, device: str, sources: Sequence[str]
) -> None:
    """Raises unless all ops of a function are where it was called."""
    name = definition.signature.name
    for node, place in zip(body.node, sources):
        if node.attr["dtype"].type == tf.resource and place != device:
            _refuse(name, device, f"the variable {node.name!r} is on {place}")
    kind = tf.DeviceSpec.from_string(device).device_type
    for graph in [body, *map(tf_calls.graph_def_of, body.library.function)]:
        for node in graph.node:
            wish = node.device and short(node.device)
            if wish and wish != device:
                _refuse(name, device, f"the op {node.name!r} is for {wish}")
        if kind == "CPU":  # which has kernels for all ops
            continue
        with tf.Graph().as_default() as imported:
            tf.graph_util.import_graph_def(graph, name="")
        for op in imported.get_operations():
            if op.type != "Placeholder" and not tf_kernels.kernel(op, kind):
                _refuse(name, device, f"the op {op.name!r} has no kernel there")


def _refuse(name: str, device: str, why: str) -> None:
    raise RuntimeError(
        f"The function {name} was called under {device}, so it went to that "
        "process whole, which tells of it nothing. Expected all of it to be on "
        f"that device, but {why}. Call it outside of tf.device, with the devices "
        "inside of it."
    )
