"""A process that cannot import towers, and serves what it wrote.

python serve.py FOLDER N_DEVICES: for the model in each folder of FOLDER, reads
inputs_*.npz there, writes outputs and prints, as JSON, devices of variables and
of what was executed.
"""

import glob
import json
import os
import sys


class _Refused:
    """An importer that has no towers."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.split(".")[0] == "towers":
            raise ImportError(f"{name} is not installed here")


sys.meta_path.insert(0, _Refused())

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from executed import Executed  # noqa: E402

root, n = sys.argv[1], int(sys.argv[2])
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * n,
)


def serve(folder: str) -> dict[str, object]:
    options = tf.saved_model.LoadOptions(
        experimental_variable_policy="save_variable_devices"
    )
    loaded = tf.saved_model.load(os.path.join(folder, "model"), options=options)
    signature = loaded.signatures["serving_default"]
    step = None
    for file in sorted(glob.glob(os.path.join(folder, "inputs_*.npz"))):
        inputs = {k: tf.constant(v) for k, v in np.load(file).items()}
        if step is None:  # what a function runs is recorded the first time only
            step = Executed(lambda inputs=inputs: signature(**inputs))
        outputs = signature(**inputs)
        np.savez(file.replace("inputs_", "outputs_"), **outputs)
    with tf.GradientTape() as tape:
        answers = signature(**inputs).values()
        total = tf.add_n([tf.reduce_sum(y) for y in answers])
    gradients = tape.gradient(total, loaded.parameters)
    graph = signature.graph.as_graph_def()
    return {
        "variables": [v.device for v in loaded.parameters],
        "differentiable": any(g is not None for g in gradients),
        "asked": sorted(
            {
                node.device
                for function in graph.library.function
                for node in function.node_def
            }
        ),
        "executed": {
            str(i): sorted(step.devices(f"tower_{i}/", "Conv|MatMul"))
            for i in range(n)
        },
    }


said = {name: serve(os.path.join(root, name)) for name in os.listdir(root)}
assert "towers" not in sys.modules
print(json.dumps(said))
