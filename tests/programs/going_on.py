"""A chief that trains while workers die and come back: run by going_on_test.

    python going_on.py KILLS RETURNS

As JSON: how far weights and history end from an uninterrupted plain run.
"""

import dataclasses
import json
import random
import sys
import threading
import time
import warnings

from cluster_workers import Workers, wait_until

WORKERS = Workers(3)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import towers  # noqa: E402

KILLS, RETURNS = map(int, sys.argv[1:3])
EPOCHS, STEPS, ROWS = 6, 20, 16


def model():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input([12, 12, 3]),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.BatchNormalization(synchronized=True),
            keras.layers.SpatialDropout2D(0.2),
            keras.layers.Flatten(),
            keras.layers.GaussianNoise(0.1),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10),
        ]
    )


def fit(model, callbacks=()):
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=[STEPS * ROWS - 3, 12, 12, 3]).astype("float32")
    y = rng.integers(0, 10, len(x))
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(ROWS)
    return model.fit(
        data,
        epochs=EPOCHS,
        validation_data=data.take(3),
        verbose=0,
        callbacks=list(callbacks),
    ).history


class Kills(keras.callbacks.Callback):
    """Kills workers at random moments, and starts some again."""

    def __init__(self, cluster):
        super().__init__()
        self.random = random.Random(3)
        self.at = sorted(
            self.random.sample(range(8, EPOCHS * STEPS - 8), KILLS)
        )
        self.cluster, self.steps, self.took, self.last = cluster, 0, [], 0.0
        self.dead, self.returned, self.towers = [], 0, set()
        self.timers = []

    def on_epoch_begin(self, epoch, logs=None):
        if self.dead and self.returned < RETURNS:
            for timer in self.timers:
                timer.join()  # which may come late
            i = self.dead.pop(0)
            WORKERS.start(i)
            wait_until(lambda: WORKERS.addresses[i] in self.cluster.alive())
            self.returned += 1

    def on_train_batch_begin(self, batch, logs=None):
        self.last = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        self.took.append(time.monotonic() - self.last)
        self.towers.add(len(self.model.placement.devices))
        self.steps += 1
        left = [i for i in range(3) if i not in self.dead]
        if self.steps in self.at and len(left) > 1:
            i = self.random.choice(left)
            self.dead.append(i)
            delay = self.random.random() * 1.5 * float(np.median(self.took))
            self.timers.append(threading.Timer(delay, WORKERS.kill, [i]))
            self.timers[-1].start()


def train_on_batch(placement=None):
    """Losses of two batches, as they come from no iterator."""
    network = model()
    if placement is not None:
        network = towers.TowerModel(network, placement, on_lost="continue")
    network.compile("sgd", "mse", jit_compile=False)
    rng = np.random.default_rng(1)
    x = rng.normal(size=[7, 12, 12, 3]).astype("float32")
    y = rng.normal(size=[7, 10]).astype("float32")
    losses = [
        network.train_on_batch(x, y),
        network.train_on_batch(x[:5], y[:5]),
    ]
    return [
        *losses,
        network.predict(x, verbose=0).sum(),
        network.evaluate(x, y, verbose=0),
    ]


class OwnStep(keras.Model):
    def call(self, x):
        return x

    def train_step(self, data):
        return {"loss": tf.reduce_sum(self(data[0]))}


def refused(placement):
    """What is said of that with which one cannot go on."""
    replace = dataclasses.replace
    devices = placement.devices
    small = keras.Sequential(
        [keras.Input([2]), keras.layers.Dense(1, name="a")]
    )
    own = OwnStep()
    own.build([None, 2])
    results = []
    for template, other, compiled in (
        (small, replace(placement, parameter_device=devices[0]), {}),
        (
            small,
            replace(placement, parameter_device=towers.balanced(devices)),
            {},
        ),
        (small, replace(placement, layer_devices={"a": devices[0]}), {}),
        (small, replace(placement, output_device=devices[0]), {}),
        (small, placement, {"steps_per_execution": 2}),
        (small, placement, {"run_eagerly": True}),
        (own, placement, {}),
    ):
        try:
            towered = towers.TowerModel(template, other, on_lost="continue")
            towered.compile("sgd", "mse", **compiled)
            towered.fit(np.ones([4, 2]), np.ones([4, 1]), verbose=0)
        except ValueError as error:
            results.append(str(error))
    return results


def mistaken(placement):
    """What is raised of a batch with which an op on a worker can do nothing."""
    x = np.zeros([6, 2])
    x[5] = 7
    kinds = []
    for on_lost in ("raise", "continue"):
        model = keras.Sequential(
            [keras.Input([2]), keras.layers.Embedding(3, 1)]
        )
        model = towers.TowerModel(model, placement, on_lost=on_lost)
        model.compile("sgd", "mse")
        try:
            model.fit(x, np.ones([6, 2, 1]), verbose=0)
        except Exception as error:
            kinds.append(type(error).__name__)
    return kinds


def at_an_open_end(placement):
    """How far weights end from plain `fit`, which begins a step there."""
    x = np.random.default_rng(2).normal(size=[11, 12, 12, 3]).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, x[:, 0, :, 0])).batch(4)
    data = data.filter(lambda x, y: True)
    there = dataclasses.replace(placement, output_device=placement.devices[0])
    weights = []
    for where, on_lost in (
        (None, ""),
        (placement, "continue"),
        (there, "raise"),
    ):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input([12, 12, 3]),
                keras.layers.Flatten(),
                keras.layers.Dropout(0.3),
                keras.layers.Dense(12),
            ]
        )
        if where is not None:
            model = towers.TowerModel(model, where, on_lost=on_lost)
        model.compile("adam", "mse")
        model.fit(data, epochs=2, verbose=0)
        weights.append(model.get_weights())
    return [
        float(max(np.abs(a - b).max() for a, b in zip(weights[0], other)))
        for other in weights[1:]
    ]


def main():
    plain = model()
    expected = fit(plain)
    cluster = towers.Cluster(WORKERS.addresses)
    placement = towers.Placement.workers(cluster, weights=[2, 1, 1])
    towered = towers.TowerModel(model(), placement, on_lost="continue")
    kills = Kills(cluster)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        history = fit(towered, [kills])
    by_batch = train_on_batch(), train_on_batch(placement)
    pairs = zip(plain.get_weights(), towered.get_weights())
    return {
        "weights": float(max(np.abs(a - b).max() for a, b in pairs)),
        "history": float(
            max(
                np.abs(np.subtract(history[k], expected[k])).max()
                for k in expected
            )
        ),
        "steps": int(towered.optimizer.iterations.numpy()),
        "kills": KILLS - len([k for k in kills.at if k > kills.steps]),
        "by batch": float(np.abs(np.subtract(*by_batch)).max()),
        "refused": refused(towered.placement),
        "mistaken": mistaken(towered.placement),
        "open ends": at_an_open_end(towered.placement),
        "dead": [WORKERS.addresses[i] for i in kills.dead],
        "warned": [str(w.message) for w in warned],
        "returned": kills.returned,
        "towers": sorted(kills.towers),
        "slowest": max(kills.took[2:]),
    }


print(json.dumps(main()))
