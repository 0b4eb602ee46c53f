"""Exports towers for devices, and serves them in a process without towers.

python examples/serve.py
"""

import os
import subprocess
import sys
import tempfile

import keras
import numpy as np
import tensorflow as tf
from absl import app

import towers

SERVER = """
import sys, numpy as np, tensorflow as tf
sys.modules["towers"] = None  # not to be had here
cpu = tf.config.list_physical_devices("CPU")[0]
one = tf.config.LogicalDeviceConfiguration()
tf.config.set_logical_device_configuration(cpu, [one] * 2)
loaded = tf.saved_model.load("model")
for rows in (1, 7, 64):
    x = np.load(f"x_{rows}.npy")
    np.save(f"y_{rows}.npy", loaded.serve(x))
graph = loaded.signatures["serving_default"].graph.as_graph_def()
nodes = [n for f in graph.library.function for n in f.node_def]
for node in nodes:
    if node.op == "MatMul":
        print("MatMul on", node.device)
"""


def main(_: list[str]) -> None:
    placement = towers.Placement.cpus(2)
    keras.utils.set_random_seed(0)
    model = towers.TowerModel(
        keras.Sequential([keras.Input([8]), keras.layers.Dense(3)]), placement
    )
    folder = tempfile.mkdtemp()
    model.export(os.path.join(folder, "model"))

    # The same for four GPUs, which this machine need not have, or for any.
    gpus = towers.Placement(
        [f"/GPU:{i}" for i in range(4)],
        parameter_device="/GPU:0",
        available="any",
    )
    model.export(os.path.join(folder, "for_gpus"), placement=gpus)
    model.export(os.path.join(folder, "plain"), placement=None)

    rng = np.random.default_rng(0)
    batches = {n: rng.normal(size=[n, 8]).astype("f") for n in (1, 7, 64)}
    for n, x in batches.items():
        np.save(os.path.join(folder, f"x_{n}.npy"), x)
    subprocess.run([sys.executable, "-c", SERVER], cwd=folder, check=True)
    for n, x in batches.items():
        served = np.load(os.path.join(folder, f"y_{n}.npy"))
        apart = np.abs(served - model.predict(x, verbose=0)).max()
        print(f"{n:2d} rows served, {apart:.0e} from the model's outputs")
    for name in ("for_gpus", "plain"):
        loaded = tf.saved_model.load(os.path.join(folder, name))
        print(name, loaded.serve(batches[7]).shape)


if __name__ == "__main__":
    app.run(main)
