"""Two workers, a core each; one shares it with another process.

Prints, as JSON, the shares that were measured, those of the rows that each does
in the same time while both work, and a step's time over that of equal shares.
"""

import dataclasses
import json
import os

from chiefs import busy, interleaved, pin
from cluster_workers import Workers

WORKERS = Workers(2)  # before TensorFlow starts

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import towers  # noqa: E402

ROWS = 256


def model() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input([16, 16, 8]),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(32, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4),
        ]
    )


def train_step(placement: towers.Placement, x: tf.Tensor, y: tf.Tensor):
    towered = towers.TowerModel(model(), placement)
    towered.compile("sgd", "mse")
    return lambda: towered.train_on_batch(x, y)


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    other = busy(cores[-1])
    try:
        cluster = towers.Cluster(WORKERS.addresses)
        placement = towers.Placement.workers(cluster)
        for i in range(2):
            pin(WORKERS.pids[i], cores[-i % len(cores)])
        rng = np.random.default_rng(0)
        x = rng.normal(size=[ROWS, 16, 16, 8]).astype("float32")
        y = rng.normal(size=[ROWS, 4]).astype("float32")
        plain = model()
        plain.compile("sgd", "mse")
        measured = towers.measure_weights(plain, placement, x, y)
        print(measured)
        alone = [
            train_step(dataclasses.replace(placement, devices=[d]), x, y)
            for d in placement.devices
        ]
        speeds = [1 / seconds for seconds in interleaved(alone)]
        equal, unequal = interleaved(
            [train_step(placement, x, y), train_step(measured, x, y)]
        )
    finally:
        os.kill(other, 9)
        os.waitpid(other, 0)
    results = {
        "shares": measured.weights,
        "expected": [speed / sum(speeds) for speed in speeds],
        "over equal": unequal / equal,
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
