"""Trains towers in two worker processes: `chief.py CLUSTER_JSON`.

Prints, as JSON, the largest difference from the plain model's weights, and the
bytes a step on the loopback device over the least possible, and over what
`execution_report` says.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import towers

STEPS = 10


def model() -> keras.Model:
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input([32, 32, 3]),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(4),
            keras.layers.Flatten(),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def loopback() -> int:
    with open("/proc/net/dev") as lines:
        (line,) = (line for line in lines if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def from_generators(x: np.ndarray, y: np.ndarray) -> float:
    """The largest difference, with parameters and outputs on the workers.

    A step waits for Python's generator; Python must not wait for the step.
    """
    devices = [f"/job:worker/task:{i}/device:CPU:0" for i in range(2)]
    placement = towers.Placement(devices, towers.balanced(devices))

    def batches() -> Iterator[Any]:
        for _ in range(3):
            time.sleep(0.2)  # the step has begun
            yield x, y

    spec = (tf.TensorSpec(x.shape), tf.TensorSpec(y.shape))
    plain, towered = model(), towers.TowerModel(model(), placement)
    for m in (plain, towered):
        data = tf.data.Dataset.from_generator(batches, output_signature=spec)
        m.compile(keras.optimizers.SGD(0.01), "mse")
        m.fit(data, verbose=0)
        m.evaluate(data, verbose=0)
        m.predict(data.map(lambda x, y: x), verbose=0)
    return max(
        float(np.abs(a - b).max())
        for a, b in zip(plain.get_weights(), towered.get_weights())
    )


def main() -> None:
    cluster = tf.train.ClusterSpec(json.loads(sys.argv[1]))
    tf.config.experimental_connect_to_cluster(cluster)
    placement = towers.Placement(
        [f"/job:worker/task:{i}/device:CPU:0" for i in range(2)]
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=[64, 32, 32, 3]).astype("float32")
    y = rng.normal(size=[64, 10]).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(64).repeat()
    plain, towered = model(), towers.TowerModel(model(), placement)
    for m in (plain, towered):
        m.compile(keras.optimizers.SGD(0.01), "mse")
        m.fit(data, steps_per_epoch=3, verbose=0)
    difference = max(
        np.abs(a - b).max()
        for a, b in zip(plain.get_weights(), towered.get_weights())
    )
    batches = iter(data)
    measured = []
    for _ in range(3):  # other programs talk on this device, too
        before = loopback()
        for _ in range(STEPS):
            towered.train_function(batches)
        measured.append((loopback() - before) / STEPS)
    told = towers.execution_report(
        lambda: towered.fit(data, steps_per_epoch=1, verbose=0)
    )
    parameters = sum(w.nbytes for w in plain.get_weights())
    # Per worker: parameters down, gradients up. Once: x, outputs, gradients.
    least = 2 * 2 * parameters + x.nbytes + 2 * y.nbytes
    report = {
        "difference": float(difference),
        "difference from generators": from_generators(x, y),
        "bytes over least": min(measured) / least,
        "bytes over reported": min(measured) / told.total_bytes,
    }
    print(json.dumps(report))


main()
