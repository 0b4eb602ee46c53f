"""A chief that has a large table on a worker: run by large_tables_test.

As JSON: how far from plain the outputs are after a first step, and after weights
were set; a step does not wait for what is still on its way. And what a step sends,
over what its report says, and that over ids, rows and their gradients.
"""

import json

from cluster_workers import Workers

WORKERS = Workers(2)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from sent_bytes import of_a_step  # noqa: E402

import towers  # noqa: E402

WORDS, WIDTH = 1_000_000, 64  # 256 MB


def model():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input([10], dtype="int32"),
            keras.layers.Embedding(WORDS, WIDTH, name="words"),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )


def main():
    cluster = towers.Cluster(WORKERS.addresses)
    workers = cluster.devices()
    where = towers.Placement(workers, layer_devices={"words": workers[0]})
    ids = np.random.default_rng(0).integers(0, WORDS, [256, 10], "int32")
    y = np.ones([256, 1], "float32")
    plain, towered = model(), towers.TowerModel(model(), where)
    for m in (plain, towered):
        m.compile(keras.optimizers.SGD(0.1), "mse")
        m.train_on_batch(ids, y)

    def difference():
        both = [m.predict_on_batch(ids) for m in (plain, towered)]
        return float(np.abs(both[0] - both[1]).max())

    results = {"first step": difference()}
    weights = [np.ones_like(x) for x in plain.get_weights()]
    for m in (plain, towered):
        m.set_weights(weights)
    results["set"] = difference()
    x, y = tf.constant(ids), tf.constant(y)

    def step():
        towered.train_on_batch(x, y)

    report = towers.execution_report(step)
    sent = of_a_step(step, WORKERS.pids.values(), 10)
    results["sent"] = sent / report.total_bytes
    # Of the one tower that is not where the table is.
    rows = ids[len(ids) // 2 :].size * WIDTH * 4
    results["more"] = report.total_bytes - ids.nbytes - 2 * rows
    print(json.dumps(results))


main()
WORKERS.end()
