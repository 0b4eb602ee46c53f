"""What a step really ran where: read from its partition graphs."""

import collections
import glob
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

HEAVY = re.compile(
    "Conv|MatMul|MaxPool|AvgPool|While|TensorList|LoopCond|FusedBatchNorm"
)


class Executed:
    """The partition graphs of all functions that `call()` traced and ran."""

    def __init__(self, call: Callable[[], Any]):
        run_metadata(lambda: None)  # what ran before is not ours
        self.nodes = nodes_of(
            graph
            for function in run_metadata(call).function_graphs
            for graph in function.partition_graphs
        )

    def devices(self, pattern: str, op: str = "") -> set[str]:
        """Devices of nodes whose names match, by type if one is given."""
        return {
            device
            for device, name, node in self.nodes
            if re.search(pattern, name) and re.search(op, node.op)
        }

    def heavy(self) -> dict[str, set[str]]:
        """Devices of heavy ops, by the tower their name says."""
        results = collections.defaultdict(set)
        for device, name, node in self.nodes:
            if HEAVY.search(node.op):
                tower = re.search(r"tower_\d+", name)
                results[tower.group() if tower else name].add(device)
        return dict(results)

    def sends(self) -> list[tuple[str, str, str]]:
        """(source, target, tensor) of each transfer."""
        return [
            (
                short(node.attr["send_device"].s.decode()),
                short(node.attr["recv_device"].s.decode()),
                node.attr["tensor_name"].s.decode(),
            )
            for _, _, node in self.nodes
            if node.op in ("_Send", "_HostSend")
        ]


def nodes_of(graphs: Iterable[Any]) -> list[tuple[str, str, Any]]:
    """(device, name, node) of partition graphs and what they call."""
    return [
        each
        for graph in graphs
        for each in _executed(
            graph.node, {f.signature.name: f for f in graph.library.function}
        )
    ]


def run_metadata(call: Callable[[], Any]) -> Any:
    """TensorFlow's record of the functions that `call()` ran."""
    with tempfile.TemporaryDirectory() as folder:
        writer = tf.summary.create_file_writer(folder)
        with writer.as_default():
            tf.summary.trace_on(graph=True)
            call()
            tf.summary.trace_export("step", 0)
        writer.close()
        metadata = tf.compat.v1.RunMetadata()
        (path,) = glob.glob(os.path.join(folder, "*"))
        for record in tf.data.TFRecordDataset(path):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                metadata.MergeFromString(value.tensor.string_val[0])
    return metadata


def _executed(
    nodes: Any, library: dict[str, Any], caller: str = "", device: str = ""
) -> Any:
    """(device, name, node), into the functions that a node still calls."""
    for node in nodes:
        where = short(node.device) or device
        name = f"{caller}{node.name}"
        yield where, name, node
        for attribute in node.attr.values():
            function = library.get(attribute.func.name)
            if function is not None:
                yield from _executed(
                    function.node_def, library, f"{name}/", where
                )


def short(device: str) -> str:
    return "/" + device.split("device:")[-1] if device else ""
