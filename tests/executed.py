"""What a step really ran where: read from its partition graphs."""

import collections
import glob
import os
import re
import tempfile
from collections.abc import Callable
from typing import Any

import tensorflow as tf

HEAVY = re.compile(
    "Conv|MatMul|MaxPool|AvgPool|While|TensorList|LoopCond|FusedBatchNorm"
)


class Executed:
    """The partition graphs of all functions that `call()` traced and ran."""

    def __init__(self, call: Callable[[], Any]):
        with tempfile.TemporaryDirectory() as folder:
            writer = tf.summary.create_file_writer(folder)
            with writer.as_default():
                tf.summary.trace_on(graph=True)
                call()
                tf.summary.trace_export("step", 0)
            writer.close()
            metadata = tf.compat.v1.RunMetadata()
            (path,) = glob.glob(os.path.join(folder, "*"))
            for event in tf.compat.v1.train.summary_iterator(path):
                for value in event.summary.value:
                    metadata.MergeFromString(value.tensor.string_val[0])
        graphs = [
            graph
            for function in metadata.function_graphs
            for graph in function.partition_graphs
        ]
        self.nodes = [
            (short(node.device), node)
            for graph in graphs
            for nodes in (
                graph.node,
                *(f.node_def for f in graph.library.function),
            )
            for node in nodes
        ]

    def devices(self, pattern: str, op: str = "") -> set[str]:
        """Devices of nodes whose names match, by type if one is given."""
        return {
            device
            for device, node in self.nodes
            if re.search(pattern, node.name) and re.search(op, node.op)
        }

    def heavy(self) -> dict[str, set[str]]:
        """Devices of heavy ops, by the tower their name says."""
        found = collections.defaultdict(set)
        for device, node in self.nodes:
            if HEAVY.search(node.op):
                tower = re.search(r"tower_\d+", node.name)
                found[tower.group() if tower else "none"].add(device)
        return dict(found)

    def sends(self) -> list[tuple[str, str, str]]:
        """(source, target, tensor) of each transfer."""
        return [
            (
                short(node.attr["send_device"].s.decode()),
                short(node.attr["recv_device"].s.decode()),
                node.attr["tensor_name"].s.decode(),
            )
            for _, node in self.nodes
            if node.op in ("_Send", "_HostSend")
        ]


def short(device: str) -> str:
    return "/" + device.split("device:")[-1] if device else ""
