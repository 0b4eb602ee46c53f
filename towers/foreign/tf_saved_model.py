"""tf_saved_model: what TensorFlow has no public way to write into a SavedModel.

A variable's device on a machine that is not this one, and gradients that are
ordinary ones. So the file `saved_model.pb` is changed, with TensorFlow's own
message class, `saved_model_pb2`. `export_test.py` fails when that stops working.
"""

import os
import pathlib
from typing import Any

import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from towers.foreign import tf_nodes


def noted_devices(path: str, loaded: Any) -> dict[int, str]:
    """For each variable of what was loaded, by its id, the device noted for it.

    Args:
      path: the SavedModel.
      loaded: what `tf.saved_model.load` made of it.
    """
    nodes = _read(path).meta_graphs[0].object_graph_def.nodes
    devices: dict[int, str] = {}
    ids: set[int] = set()
    ahead = [(0, loaded)]
    while ahead:
        number, value = ahead.pop()
        if number in ids:
            continue
        ids.add(number)
        if nodes[number].HasField("variable"):
            devices[id(value)] = nodes[number].variable.device
        children = tf.train.TrackableView.children(value)
        ahead += [
            (child.node_id, children[child.local_name])
            for child in nodes[number].children
            if child.local_name in children
        ]
    return devices


def _read(path: str) -> Any:
    saved = saved_model_pb2.SavedModel()
    file = os.path.join(path, "saved_model.pb")
    saved.ParseFromString(pathlib.Path(file).read_bytes())
    return saved


def note_devices(path: str, devices: list[str]) -> None:
    """Notes the variables' devices, and makes gradients ordinary ones.

    The gradients of towers are Python, which is not saved; left in place, the
    reference to them would make the loaded functions impossible to
    differentiate.
    """
    file = os.path.join(path, "saved_model.pb")
    saved = _read(path)
    (meta,) = saved.meta_graphs
    nodes = meta.object_graph_def.nodes

    def child(node: Any, name: str) -> int:
        return next(c.node_id for c in node.children if c.local_name == name)

    parameters = nodes[child(nodes[0], "parameters")]
    for i, device in enumerate(devices):
        nodes[child(parameters, str(i))].variable.device = device
    for node in tf_nodes.all_nodes(meta.graph_def):
        node.attr.pop(tf_nodes.GRADIENT, None)
    pathlib.Path(file).write_bytes(saved.SerializeToString(deterministic=True))
    fingerprint = os.path.join(path, "fingerprint.pb")
    if os.path.exists(fingerprint):
        os.remove(fingerprint)  # of the file as it was
