"""A chief whose model is in pieces on two workers: run by in_pieces_test.

As JSON: how far from plain it ends, from a file too; the bytes of a step by what they
are; which devices hold the table; and what is said when a worker is lost.
"""

import json
import os
import tempfile

from cluster_workers import Workers

WORKERS = Workers(2)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import towers  # noqa: E402

WORDS, WIDTH, ROWS = 100_000, 32, 16


def model():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input([10], dtype="int32"),
            keras.layers.Embedding(WORDS, WIDTH, name="words"),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(4096, "relu", name="up"),
            keras.layers.Dense(3, name="down"),
        ]
    )


def main():
    cluster = towers.Cluster(WORKERS.addresses)
    both = cluster.devices()
    pins = {
        "words": towers.row_wise(both),
        "up": towers.column_wise(both),
        "down": towers.row_wise(both),
    }
    ids = np.random.default_rng(0).integers(0, WORDS, [ROWS, 10], "int32")
    y = np.ones([ROWS, 3], "float32")
    plain = model()
    cut = towers.TowerModel(
        model(), towers.Placement(["/CPU:0"], layer_devices=pins)
    )

    def difference():
        pairs = zip(plain.get_weights(), cut.get_weights(), strict=True)
        return max(float(np.abs(a - b).max()) for a, b in pairs)

    for m in (plain, cut):
        m.compile(keras.optimizers.SGD(0.1), "mse")
        m.fit(ids, y, epochs=3, verbose=0)
    results = {"trained": difference()}
    table = cut.get_layer("words")
    results["table"] = [v.value.device for v in table.weights] == list(both)
    report = towers.execution_report(cut.train_on_batch, ids, y)
    plain.set_weights(cut.get_weights())  # how many steps that was
    results["bytes"] = report.total_bytes
    x, h = ROWS * WIDTH * 4, ROWS * 3 * 4
    rows, indices = 10 * x, 10 * ROWS * 4
    # Ids, rows and their gradients; inputs and outputs of the two layers, with
    # theirs, for each of two pieces.
    results["least"] = 2 * rows + indices + 2 * (2 * x) + 2 * (2 * h)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a")
        path = tf.train.Checkpoint(model=cut).write(path)
        cut.set_weights([0 * w for w in cut.get_weights()])
        tf.train.Checkpoint(model=cut).read(path)
        results["read"] = difference()
        cut.save_weights(file := os.path.join(folder, "a.weights.h5"))
        WORKERS.kill(1)
        try:
            cut.fit(ids, y, epochs=2, verbose=0)
        except towers.WorkerLost as lost:
            results["lost"] = str(lost)
        where = towers.Placement(["/CPU:0"])
        again = towers.TowerModel(model(), where)
        again.load_weights(file)
        pairs = zip(plain.get_weights(), again.get_weights(), strict=True)
        results["going on"] = max(float(np.abs(a - b).max()) for a, b in pairs)
    print(json.dumps(results))


main()
WORKERS.end()
