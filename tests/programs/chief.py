"""Trains towers in worker processes, and counts what all of them send.

Prints, as JSON, how far two towers end from the plain model's weights; for two and
three towers, with parameters on this process and balanced on the workers, the bytes
of a step over the least possible, and over what `execution_report` says; and those
of a step whose inputs each tower reads by itself, over the inputs'.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from cluster_workers import Workers

WORKERS = Workers(3)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from sent_bytes import of_a_step  # noqa: E402

import towers  # noqa: E402

STEPS = 5
HERE = "/job:localhost/replica:0/task:0/device:CPU:0"
DEVICES = [f"/job:worker/task:{i}/device:CPU:0" for i in range(3)]


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


def of_parameters(n: int, name: str, data, x, y) -> list:
    """[towers, where parameters are, bytes over the least, least over reported]."""
    where = HERE if name == "chief" else towers.balanced(DEVICES[:n])
    placement = towers.Placement(
        DEVICES[:n], parameter_device=where, output_device=HERE
    )
    towered = towers.TowerModel(model(), placement)
    towered.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=False)
    towered.make_train_function()
    batches = iter(data)

    def step():
        return towered.train_function(batches)

    parameters = sum(w.nbytes for w in towered.get_weights())
    # Besides: x down; outputs up, and their gradients down.
    pairs = n if name == "chief" else n - 1
    least = 2 * pairs * parameters + x.nbytes + 2 * y.nbytes
    over_least = of_a_step(step, WORKERS.pids.values(), STEPS) / least
    report = towers.execution_report(
        lambda: towered.fit(data, steps_per_epoch=1, verbose=0)
    )
    return [n, name, over_least, least / report.total_bytes]


def trained(data) -> float:
    """How far two towers end from the plain model's weights."""
    plain, towered = (
        model(),
        towers.TowerModel(model(), towers.Placement(DEVICES[:2])),
    )
    for m in (plain, towered):
        m.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=False)
        m.fit(data, steps_per_epoch=3, verbose=0)
    pairs = zip(plain.get_weights(), towered.get_weights())
    return float(max(np.abs(a - b).max() for a, b in pairs))


def from_generators(x: np.ndarray, y: np.ndarray) -> float:
    """The largest difference, with parameters and outputs on the workers.

    A step waits for Python's generator; Python must not wait for the step.
    """
    placement = towers.Placement(DEVICES[:2], towers.balanced(DEVICES[:2]))

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


def of_own_inputs() -> list[float]:
    """Bytes of a step over those of its inputs, and the error of its value.

    Towers read files of their own, which are of unequal length, in batches of
    unequal rows.
    """
    rows, length = [20, 40, 70], 1000
    files, read = [], []
    with tempfile.TemporaryDirectory() as folder:
        for i, count in enumerate(rows):
            files.append(os.path.join(folder, f"tower_{i}"))
            read.append(np.random.default_rng(i).normal(size=[count, length]))
            read[i].astype("float32").tofile(files[i])

        def dataset(tower):
            data = tf.data.FixedLengthRecordDataset(
                files[tower.index], 4 * length
            )
            data = data.map(lambda x: tf.io.decode_raw(x, tf.float32))
            return data.batch(rows[tower.index] // 2).repeat(10)

        net = keras.Sequential([keras.Input([length]), keras.layers.Dense(1)])
        where = towers.Placement(DEVICES)

        @tf.function
        def step(batch):
            graph = towers.build_towers(
                net,
                batch,
                where,
                merge="mean",
                tower_fn=lambda model, x: tf.reduce_mean(model(x) ** 2),
            )
            with tf.device(HERE):
                return tf.identity(graph.outputs)

        def pid(_):
            text = tf.data.Dataset.from_tensors("/proc/self/stat")
            return text.map(lambda file: [tf.io.read_file(file)])

        def generated(_):
            spec = tf.TensorSpec([1])
            return tf.data.Dataset.from_generator(list, output_signature=spec)

        result = next(iter(towers.per_tower(pid).batches(where))).towers
        readers = [int(text[0].numpy().split()[0]) for text in result]
        assert readers == list(WORKERS.pids.values()), readers
        try:
            towers.per_tower(generated).batches(where)
            raise AssertionError("A generator was taken.")
        except ValueError as error:
            assert "calls Python" in str(error), error

        def failing(tower):
            rows = tf.data.Dataset.range(2 - tower.index, -1, -1).batch(1)
            return rows.map(lambda i: tf.debugging.check_numerics(1 / i, ""))

        try:
            list(towers.per_tower(failing).batches(where))
            raise AssertionError("It did not fail.")
        except tf.errors.InvalidArgumentError as error:
            assert "tower 2, on /job:worker/replica:0/task:2" in str(error), (
                error
            )
        ends = towers.per_tower(lambda _: tf.data.Dataset.range(4).batch(2))
        assert [len(list(ends.batches(where))) for _ in "ab"] == [2, 2]
        batches = iter(towers.per_tower(dataset).batches(where))
        value = float(step(next(batches)))
        first = np.concatenate([x[: len(x) // 2] for x in read])
        expected = np.mean(np.square(net(first.astype("float32"))))
        each = of_a_step(
            lambda: step(next(batches)), WORKERS.pids.values(), STEPS
        )
        inputs = 4 * length * sum(rows) / 2
        return [each / inputs, abs(value - float(expected))]


def main() -> None:
    spec = {"worker": WORKERS.addresses}
    tf.config.experimental_connect_to_cluster(tf.train.ClusterSpec(spec))
    rng = np.random.default_rng(0)
    x = rng.normal(size=[48, 32, 32, 3]).astype("float32")
    y = rng.normal(size=[48, 10]).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(48).repeat()
    print(
        json.dumps(
            {
                "difference": trained(data),
                "difference from generators": from_generators(x, y),
                "bytes": [
                    of_parameters(n, name, data, x, y)
                    for n in (2, 3)
                    for name in ("chief", "balanced")
                ],
                "own inputs": of_own_inputs(),
            }
        )
    )


main()
