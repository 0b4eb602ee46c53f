"""Inputs that each tower reads where it is."""

import executed
import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import towers
from towers.verbs.batch import BatchPerTower

DEVICES = ["/CPU:1", "/CPU:2", "/CPU:3"]
BATCH = [3, 5, 2]  # rows of each tower's batches
ROWS = [11, 13, 30]  # of each tower; the second ends first, its last are 3


def placement(**kwargs):
    return towers.Placement(DEVICES, parameter_device="/CPU:0", **kwargs)


def network(normalized=False):
    keras.utils.set_random_seed(1)
    norm = keras.layers.BatchNormalization(synchronized=True)
    return keras.Sequential(
        [
            keras.Input([None, 4]),
            keras.layers.Dense(6, activation="tanh"),
            *[norm] * normalized,
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(2),
        ]
    )


def arrays(tower, length=3):
    rng = np.random.default_rng(tower)
    x = rng.normal(size=[ROWS[tower], length, 4]).astype("float32")
    return x, rng.normal(size=[ROWS[tower], 2]).astype("float32")


def read(tower):
    x, y = arrays(tower.index)
    data = tf.data.Dataset.from_tensor_slices({"x": x, "targets": (y, y[:, 0])})
    return data.batch(BATCH[tower.index])


def loss(model, shard):
    y, _ = shard["targets"]
    return tf.reduce_mean(tf.square(model(shard["x"]) - y))


class PerTowerTest(parameterized.TestCase):
    @parameterized.parameters(False, True)
    @pytest.mark.slow(after=1)
    def test_values_and_gradients_are_those_of_the_joined_batch(self, norm):
        where = placement(weights=[1, 0, 1])  # no shares: each has its own
        plain, model = network(norm), network(norm)
        optimizers = [keras.optimizers.SGD(0.1, momentum=0.9) for _ in "ab"]
        for optimizer, owner in zip(optimizers, (plain, model)):
            optimizer.build(owner.trainable_variables)

        data = towers.per_tower(read)

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                graph = towers.build_towers(
                    model, data, where, True, "mean", loss
                )
            variables = model.trainable_variables
            gradients = tape.gradient(graph.outputs, variables)
            optimizers[1].apply(gradients, variables)
            graph.apply_updates()
            return graph.outputs, graph.rows

        rows = []
        for _ in range(2):
            for i in range(3):
                value, counts = step()
                rows.append(counts.numpy().tolist())
                x, y = (
                    np.concatenate(
                        [
                            arrays(k)[j][i * n : (i + 1) * n]
                            for k, n in enumerate(BATCH)
                        ]
                    )
                    for j in range(2)
                )
                with tf.GradientTape() as tape:
                    outputs = plain(x, training=True)
                    expected = tf.reduce_mean(tf.square(outputs - y))
                variables = plain.trainable_variables
                gradients = tape.gradient(expected, variables)
                optimizers[0].apply(gradients, variables)
                np.testing.assert_allclose(value, expected, rtol=1e-5)
            with self.assertRaises(tf.errors.OutOfRangeError):
                step()
            data.restart()
        self.assertEqual(rows, [[3, 5, 2], [3, 5, 2], [3, 3, 2]] * 2)
        for a, b in zip(plain.get_weights(), model.get_weights()):
            np.testing.assert_allclose(a, b, atol=2e-6)
        # A loop has its own place.
        self.assertEqual([len(list(data.batches(where))) for _ in "ab"], [3, 3])

    def test_no_input_crosses(self):
        where, model = placement(), network()
        asked = []

        def long(tower):
            asked.append((tower.index, tower.device, tower.scope))
            x, _ = arrays(tower.index, 500)
            data = tf.data.Dataset.from_tensor_slices(x)
            return data.batch(5, drop_remainder=True)

        data = towers.per_tower(long)

        @tf.function
        def read_inside():
            return towers.build_towers(model, data, where).outputs

        @tf.function
        def given(x):
            return towers.build_towers(model, x, where).outputs

        sends = executed.Executed(read_inside).sends()
        self.assertNotEmpty(sends)
        for _, _, tensor in sends:  # weights down, outputs up
            self.assertRegex(tensor, r"replicate/|tower_\d/")
        self.assertEqual(
            asked, [(i, DEVICES[i], f"tower_{i}/") for i in range(3)]
        )
        batch = next(iter(data.batches(where)))
        self.assertLen(asked, 3)  # built once
        for x, device in zip(batch.towers, DEVICES):
            self.assertTrue(x.device.endswith(device[1:]))
        self.assertLess(towers.execution_report(given, batch).total_bytes, 2000)
        whole = tf.concat(list(batch.towers), 0)
        data.restart()
        np.testing.assert_allclose(read_inside(), model(whole), atol=1e-6)
        np.testing.assert_allclose(given(batch), model(whole), atol=1e-6)
        self.assertGreater(tf.size(whole) * 4, 100_000)

    def test_inputs_themselves_are_read_at_each_run_until_one_ends(self):
        data = towers.per_tower(
            lambda tower: tf.data.Dataset.range(7 + tower.index).batch(2)
        )
        where = towers.Placement(DEVICES[:2])
        model = keras.Sequential([keras.Input([]), keras.layers.Identity()])

        def total(_, shard):
            return tf.reduce_sum(shard)[tf.newaxis]

        def next_ones():
            graph = towers.build_towers(model, data, where, tower_fn=total)
            if tf.executing_eagerly():
                for tower in graph.towers:
                    device = tower.inputs.device
                    self.assertTrue(device.endswith(tower.device[1:]))
            return graph.outputs

        @tf.function
        def two():
            sums = tf.zeros([2], tf.int64)
            for _ in tf.range(2):
                sums += next_ones()
            return sums

        for _ in range(2):
            self.assertEqual(two().numpy().tolist(), [6, 6])
            self.assertEqual(next_ones().numpy().tolist(), [9, 9])
            self.assertEqual(next_ones().numpy().tolist(), [6, 13])
            for step in (next_ones, two):
                with self.assertRaises(tf.errors.OutOfRangeError):
                    step()
            data.restart()

    def test_ragged_and_whole_inputs(self):
        where = towers.Placement(DEVICES[:2])
        model = network()

        def rows(tower):
            ragged = tf.ragged.constant([[1.0], [], [2.0, 3.0]])
            data = tf.data.Dataset.from_tensor_slices(ragged)
            table = tf.fill([7], float(tower.index))
            return data.ragged_batch(tower.index + 1).map(lambda x: (x, table))

        data = towers.per_tower(rows)
        graph = towers.build_towers(
            model,
            next(iter(data.batches(where))),
            where,
            whole=[1],
            tower_fn=lambda _, x: tf.reduce_sum(x[0], 1) + tf.reduce_max(x[1]),
        )
        self.assertEqual(graph.outputs.numpy().tolist(), [1, 2, 1])

    @parameterized.parameters(
        (lambda tower: [1], TypeError, "tower 0 on /CPU:1, must .* got a list"),
        (lambda tower: 1 / 0, ZeroDivisionError, "division"),
        (
            lambda tower: tf.data.Dataset.range(
                4, output_type=tower.index and tf.int32 or tf.int64
            ),
            ValueError,
            "the same dtypes, .*int64.* for tower 0, and .*int32.* for tower 1",
        ),
        (
            lambda tower: tf.data.Dataset.range(4),
            ValueError,
            "`inputs of tower 0` must have a first axis of rows",
        ),
        (
            lambda tower: tf.data.Dataset.from_tensors(
                (tf.zeros([2]), tf.zeros([tower.index + 2]))
            ),
            ValueError,
            "All leaves of `inputs of tower 1` must have the same number",
        ),
        (
            lambda tower: tf.data.Dataset.from_tensors(tf.zeros([2, 4])).map(
                lambda x: x[tower.index * 2 :]
            ),
            (ValueError, tf.errors.InvalidArgumentError),
            r"at least one row, .*\[2, 0\]",
        ),
    )
    def test_what_cannot_be_is_refused(self, dataset_fn, kind, pattern):
        where = towers.Placement(DEVICES[:2])
        data = towers.per_tower(dataset_fn)
        with self.assertRaisesRegex(kind, pattern):
            batch = next(iter(data.batches(where)))
            towers.build_towers(
                network(), batch, where, tower_fn=lambda _, x: x
            )

    def test_what_a_dataset_raises_is_named(self):
        where = towers.Placement(DEVICES[:2])

        def failing(tower):
            rows = tf.data.Dataset.range(9).batch(1)
            return rows.map(
                lambda i: tf.debugging.check_numerics(
                    1.0 / tf.cast(2 - tower.index * i, tf.float32), "divided"
                )
            )

        data, read = towers.per_tower(failing), []
        with self.assertRaisesRegex(
            tf.errors.InvalidArgumentError,
            "(?s)tower 1, on /CPU:2, raised.*divided",
        ):
            read.extend(data.batches(where))
        model = keras.Sequential([keras.Input([]), keras.layers.Identity()])

        @tf.function
        def step():
            return towers.build_towers(model, data, where).outputs

        # A reader that is cancelled may come first, by the name of its end.
        with self.assertRaisesRegex(
            (tf.errors.InvalidArgumentError, tf.errors.OutOfRangeError),
            "divided",
        ) as raised:
            for _ in range(3):
                read.append(step())
        self.assertRegex(str(raised.exception), "inputs_of_tower_1")

    def test_where_it_cannot_be_used_says_what_to_do(self):
        where = towers.Placement(DEVICES[:2])
        data = towers.per_tower(read)
        model = towers.TowerModel(network(), where)
        model.compile("sgd", "mse")
        batch = BatchPerTower((np.ones([2, 3, 4]), np.ones([1, 3, 4])))
        for method in (
            model.fit,
            model.evaluate,
            model.predict,
            model.train_on_batch,
        ):
            for given in (data, data.batches(where), batch):
                if given is data and method != model.train_on_batch:
                    continue
                with self.assertRaisesRegex(
                    ValueError, "per_tower.*of your own.*build_towers"
                ):
                    method(given)
        for given in (data, data.batches(where), batch):
            with self.assertRaisesRegex(
                ValueError, "^Inputs.*`call`.*build_tow"
            ):
                model(given)
        with self.assertRaisesRegex(TypeError, "per_tower.*build_towers"):
            towers.split_batch(batch, where)
        with self.assertRaisesRegex(TypeError, "batches.* each loop.*one of"):
            towers.build_towers(network(), data.batches(where), where)
        with self.assertRaisesRegex(ValueError, "of 2 towers.* has 3"):
            towers.build_towers(network(), batch, placement())
        with self.assertRaisesRegex(ValueError, "`arguments`.*own rows"):
            towers.build_towers(
                network(), batch, where, arguments={"mask": tf.ones([3, 3])}
            )
        with tf.Graph().as_default():
            with self.assertRaisesRegex(ValueError, "tf.compat.v1"):
                towers.build_towers(network(), data, where)
        with self.assertRaisesRegex(TypeError, "`dataset_fn` must be a func"):
            towers.per_tower(tf.data.Dataset.range(3))
        far = towers.Placement(["/GPU:7"], available="any")
        with self.assertRaisesRegex(ValueError, "GPU:7.*does not see"):
            data.batches(far)
