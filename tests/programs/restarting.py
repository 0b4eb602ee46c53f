"""A chief that loses variables with a worker: run by going_on_test.

    python restarting.py ADDRESSES FOLDER EPOCHS DIE_AT

With ADDRESSES "-", starts three workers, kills one while `fit` is running, with
parameters on all of them, goes on from the last checkpoint on the others, one of
which stops then, and on the last. Else uses
the workers there, goes on from what FOLDER has, and dies at a step. As JSON: how
far the weights end from an uninterrupted plain run.
"""

import json
import os
import signal
import sys
import tempfile
import time

import cluster_workers

LOST: list[float] = []
ADDRESSES, FOLDER, EPOCHS, DIE_AT = sys.argv[1:5]
if ADDRESSES == "-":
    WORKERS = cluster_workers.Workers(3)
    ADDRESSES, FOLDER = ",".join(WORKERS.addresses), tempfile.mkdtemp()

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import towers  # noqa: E402


def model():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input([16]),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(4),
        ]
    )


def fit(model, callbacks=()):
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9), "mse", jit_compile=False
    )
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=[80, n]).astype("float32") for n in (16, 4))
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    model.fit(data, epochs=int(EPOCHS), verbose=0, callbacks=list(callbacks))


class At(keras.callbacks.Callback):
    def __init__(self, step, call):
        super().__init__()
        self.step, self.call = step, call

    def on_train_batch_end(self, batch, logs=None):
        self.step -= 1
        if self.step == 0:
            self.call()


def kill():
    if DIE_AT.startswith("chief"):
        os.kill(os.getpid(), signal.SIGKILL)
    if not LOST:
        WORKERS.kill(2)
    elif len(LOST) == 1:
        WORKERS.stop(1)
    LOST.append(time.monotonic())


def touched(towered, placement, workers):
    """Whether what cannot be had says so at once, and names the workers."""
    results = []
    for touch in (
        towered.get_weights,
        lambda: towered.template.weights[0].numpy(),
        lambda: [np.asarray(v) for v in towered.weights],
        lambda: [v.numpy() for v in towered.optimizer.variables],
        lambda: towered.predict(np.ones([3, 16]), verbose=0),
        lambda: towers.TowerModel(towered.template, placement),
    ):
        try:
            touch()
        except towers.WorkerLost as error:
            results.append(error.workers == workers)
    return results


def main():
    cluster = towers.Cluster(ADDRESSES.split(","), heartbeat=2)
    step = int(DIE_AT.removeprefix("chief"))
    attempts, untouched, took = 0, [], []
    while True:
        attempts += 1
        devices = cluster.devices("CPU")
        placement = towers.Placement(
            devices, parameter_device=towers.balanced(devices)
        )
        towered = towers.TowerModel(model(), placement)
        backup = keras.callbacks.BackupAndRestore(FOLDER)
        try:
            fit(towered, [backup, At(step, kill)])
            break
        except towers.WorkerLost as lost:
            took.append(time.monotonic() - LOST[-1])
            untouched += touched(towered, placement, lost.workers)
            cluster.update()
    plain = model()
    fit(plain)
    pairs = zip(plain.get_weights(), towered.get_weights())
    return {
        "weights": float(max(np.abs(a - b).max() for a, b in pairs)),
        "attempts": attempts,
        "towers": len(towered.placement.devices),
        "untouched": untouched,
        "starts": cluster.starts(devices),
        "took": took,
    }


print(json.dumps(main()))
