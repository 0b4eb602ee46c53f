"""A chief that trains on two workers of several devices: run by once_per_machine_test.

    python once_per_machine.py DEVICES MODEL...
    python once_per_machine.py DEVICES counted

As JSON, by model and place of parameters: how far the weights end from the plain
model's, the bytes of a step that all processes send and the least of them, the same
two as a report tells them, and, of two models, the bytes as planned. Of `counted`, for
two placements, that difference, and what a worker sends in a step, counted by kind.
"""

import collections
import contextlib
import json
import sys
from unittest import mock

from cluster_workers import Workers

DEVICES = int(sys.argv[1])
WORKERS = Workers(2, devices=DEVICES)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from sent_bytes import of_a_step  # noqa: E402

import towers  # noqa: E402
from towers.keras_model import tower  # noqa: E402
from towers.keras_model.halves import Halves  # noqa: E402

layers = keras.layers
ROWS, STEPS = 16, 5
HERE = "/job:localhost/replica:0/task:0/device:CPU:0"
PLACES = [
    f"/job:worker/task:{i}/device:CPU:{k}"
    for i in range(2)
    for k in range(DEVICES)
]


def cnn():
    """A kernel of 1 MB, and batch norms of all rows."""
    return [
        keras.Input([16, 16, 3]),
        layers.Conv2D(32, 3, activation="relu"),
        layers.BatchNormalization(synchronized=True),
        layers.MaxPooling2D(2),
        layers.Flatten(),
        layers.Dense(160, activation="relu"),
        layers.Dense(4),
    ]


def lstm():
    return [
        keras.Input([5, 32]),
        layers.LSTM(128, return_sequences=True),
        layers.LSTM(128),
        layers.Dense(4),
    ]


def small():
    """60 small variables."""
    hidden = [layers.Dense(90, activation="tanh") for _ in range(29)]
    return [keras.Input([64]), *hidden, layers.Dense(4)]


def embedding():
    """A table that goes down whole, of which few rows come back."""
    return [
        keras.Input([3], dtype="int32"),
        layers.Embedding(5000, 64),
        layers.Flatten(),
        layers.Dense(4),
    ]


def frozen():
    model = small()
    model[3].trainable = False
    return model


def mixed():
    """Weights that go down in half, of which sums of float32 come back."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        return small()
    finally:
        keras.config.set_dtype_policy("float32")


class Counted(layers.Layer):
    """Counts its rows, and adds a loss."""

    def build(self, shape):
        self.seen = self.add_weight(
            name="seen", dtype="int32", initializer="zeros", trainable=False
        )
        towers.merge_state_by(self.seen, "sum")

    def call(self, x):
        self.seen.assign_add(keras.ops.shape(x)[0])
        self.add_loss(keras.ops.mean(x**2))
        return x


def counted():
    """Maxima of float8, a counter, and losses."""
    model = keras.Sequential(
        [
            keras.Input([6]),
            layers.Dense(5, use_bias=False),
            Counted(),
            layers.Dense(4),
        ]
    )
    model.layers[0].quantize("float8")
    return model


def merged(weights):
    """[difference from plain, what a worker sends in a step by kind]."""
    placement = towers.Placement(
        PLACES, parameter_device=HERE, output_device=HERE, weights=weights
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=[2, 11, 6]), rng.normal(size=[2, 11, 4])
    keras.utils.set_random_seed(1)
    plain = counted()
    keras.utils.set_random_seed(1)
    towered = towers.TowerModel(counted(), placement, loss_on_towers=True)
    for m in (plain, towered):
        m.compile("sgd", "mse", weighted_metrics=["mae"], jit_compile=False)
        # The last batch is of 3 rows.
        m.fit(x[0], y[0], batch_size=4, shuffle=False, verbose=0)
    pairs = zip(plain.get_weights(), towered.get_weights())
    difference = float(max(np.abs(a - b).max() for a, b in pairs))
    report = towers.execution_report(towered.train_on_batch, x[0], y[0])
    sent = collections.Counter(
        t.holds.split()[0]
        for t in report.transfers
        if "worker/replica:0/task:0" in t.source and "worker" not in t.target
    )
    return [difference, sent]


def full():
    """While open, all weights and inputs cross as they are."""
    return mock.patch.object(tower, "halves_of", lambda *_: Halves())


def model(factory):
    keras.utils.set_random_seed(1)
    return keras.Sequential(factory())


def batch(factory):
    rng = np.random.default_rng(0)
    shape = [ROWS, *factory()[0].shape[1:]]
    x = rng.normal(size=shape).astype("float32")
    if factory is embedding:
        x = rng.integers(0, 5000, shape).astype("int32")
    return x, rng.normal(size=[ROWS, 4]).astype("float32")


def trained(factory, where, weights):
    """[difference from plain, bytes of a step, least, both as reported, planned]."""
    home = HERE if where == "chief" else towers.balanced(PLACES)
    placement = towers.Placement(
        PLACES, parameter_device=home, output_device=HERE, weights=weights
    )
    x, y = batch(factory)
    data = tf.data.Dataset.from_tensors((x, y)).repeat()
    plain, towered = (
        model(factory),
        towers.TowerModel(model(factory), placement),
    )
    if factory is mixed:  # rounded by shards
        plain = towers.TowerModel(plain, placement)
    for m in (plain, towered):
        m.compile(
            keras.optimizers.SGD(0.01, momentum=0.9), "mse", jit_compile=False
        )
        with full() if m is plain else contextlib.nullcontext():
            m.fit(data, steps_per_epoch=3, verbose=0)
    pairs = zip(plain.get_weights(), towered.get_weights())
    difference = float(max(np.abs(a - b).max() for a, b in pairs))
    batches = iter(data)
    least = 2 * x.nbytes + 2 * y.nbytes
    machines = 2 if where == "chief" else 1
    for v in plain.variables:
        size = v.numpy().nbytes
        back = size if v.trainable else 0
        if factory is embedding and v.shape[0] == 5000:
            back = x.size * (64 * 4 + 4)
        down = size // 2 if factory is mixed else size
        least += machines * (down + back)
    towered.make_train_function()
    bytes_sent = of_a_step(
        lambda: towered.train_function(batches), WORKERS.pids.values(), STEPS
    )
    report = towers.execution_report(towered.train_on_batch, x, y)
    reported = sum(report.between_machines.values())
    result: tuple[int, ...] = reported, report.least_between_machines
    if factory in (cnn, mixed):
        machines = [{"CPU": DEVICES}] * 2
        plan = towers.placement_plan(towered, x, y, machine=machines)
        result += (sum(plan.between_machines.values()),)
    return [difference, bytes_sent, least, *result]


def main():
    spec = {"worker": WORKERS.addresses}
    tf.config.experimental_connect_to_cluster(tf.train.ClusterSpec(spec))
    n = len(PLACES)
    if sys.argv[2:] == ["counted"]:
        return [merged(None), merged([2, *[1] * (n - 2), 0])]
    return {
        f"{model.__name__} {where} {weights}": trained(model, where, weights)
        for model in map(globals().get, sys.argv[2:])
        for where, weights in (
            ("chief", None),
            ("balanced", None),
            ("chief", [2, *[1] * (n - 2), 0]),
        )
        if model is cnn or weights is None
    }


if __name__ == "__main__":
    print(json.dumps(main()))
