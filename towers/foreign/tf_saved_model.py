"""tf_saved_model: what TensorFlow has no public way to write into a SavedModel.

A variable's device on a machine that is not this one, and gradients that are
ordinary ones. So the file `saved_model.pb` is changed, with TensorFlow's own
message class, `saved_model_pb2`. `export_test.py` fails when that stops working.
"""

import os
import pathlib
from typing import Any

from tensorflow.core.protobuf import saved_model_pb2


def note_devices(path: str, devices: list[str]) -> None:
    """Notes the variables' devices, and makes gradients ordinary ones.

    The gradients of towers are Python, which is not saved; left in place, the
    reference to them would make the loaded functions impossible to
    differentiate.
    """
    file = os.path.join(path, "saved_model.pb")
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString(pathlib.Path(file).read_bytes())
    (meta,) = saved.meta_graphs
    nodes = meta.object_graph_def.nodes

    def child(node: Any, name: str) -> int:
        return next(c.node_id for c in node.children if c.local_name == name)

    parameters = nodes[child(nodes[0], "parameters")]
    for i, device in enumerate(devices):
        nodes[child(parameters, str(i))].variable.device = device
    for function in meta.graph_def.library.function:
        for node in function.node_def:
            node.attr.pop("_gradient_op_type", None)
    pathlib.Path(file).write_bytes(saved.SerializeToString(deterministic=True))
    fingerprint = os.path.join(path, "fingerprint.pb")
    if os.path.exists(fingerprint):
        os.remove(fingerprint)  # of the file as it was
