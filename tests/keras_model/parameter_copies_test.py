"""parameter_copies: other machines are sent each parameter once.

Here a machine is a pair of this process's devices, see `two_machines`.
"""

import functools
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import NAMED, chain, close, inputs, make, placement
from same import plain_step, same_step, step_of, towered_step
from two_machines import MACHINE, between_machines, in_machines

import towers

layers, v1 = keras.layers, tf.compat.v1
TOWERS = ["/CPU:1", "/CPU:2", "/CPU:1", "/CPU:0", "/CPU:3"]


def embedding():
    return chain(
        [3],
        layers.Embedding(5000, 8),
        layers.Flatten(),
        layers.Dense(4),
        dtype="int32",
    )


def normed():
    """Batch norms of equal and of masked rows; each normalises its shard."""
    words = keras.Input([3], dtype="int32")
    x = layers.Embedding(9, 4, mask_zero=True)(words)
    x = layers.BatchNormalization(trainable=True)(x)
    x = layers.Dense(4)(layers.GlobalAveragePooling1D()(x))
    return keras.Model(words, layers.BatchNormalization()(x))


class MachinesTest(parameterized.TestCase):
    @parameterized.named_parameters(*NAMED, ("embedding", embedding))
    @pytest.mark.slow(
        of=[
            "recurrent",
            "unrolled",
            "attention",
            "two_by_two",
            "subclassed",
            "nested",
        ]
    )
    def test_a_step_is_the_plain_model_s(self, model):
        model = make(model)
        # The third has no rows, and shares a device with the first. Updates are of
        # all rows, by way of what each machine has seen.
        where = towers.Placement(TOWERS, weights=[2, 1, 0, 1, 1])
        with in_machines():
            same_step(model, where, inputs(model, 7))

    @pytest.mark.rare
    def test_so_with_layers_elsewhere_and_in_sessions(self):
        def factory():
            keras.utils.set_random_seed(1)
            first = layers.Dense(4, activation="tanh", name="first")
            return chain([3], first, layers.Dense(2, name="last"))

        x = np.random.default_rng(0).normal(size=[7, 3]).astype("float32")
        model = factory()
        _, *expected = plain_step(model)(x)
        # One that all towers have on another machine, and one by tower.
        for elsewhere in (
            {"last": "/CPU:1"},
            {"last": ["/CPU:2", "/CPU:1", "/CPU:3", "/CPU:2"]},
            {},
        ):
            where = towers.Placement(
                TOWERS[:4], weights=[2, 1, 0, 1], layer_devices=elsewhere
            )

            def lost(model, x):
                return tf.reduce_mean(model(x) ** 2, 1)

            def by_function(x, where=where):
                rows = towers.build_towers(model, x, where, tower_fn=lost)
                return tf.sqrt(rows.outputs), []

            with in_machines():
                same_step(model, where, x, training=False)
                _, *result = tf.function(step_of(by_function, model))(x)
                close(result, expected)
        config = v1.ConfigProto(device_count={"CPU": 4})
        with (
            in_machines(),
            tf.Graph().as_default(),
            v1.Session(config=config) as session,
        ):
            graph = towers.build_towers(model, tf.constant(x), where)
            loss = tf.reduce_mean(graph.outputs**2)
            weights = v1.trainable_variables()
            session.run(v1.global_variables_initializer())
            gradients = session.run([loss, tf.gradients(loss, weights)])
        close(gradients, expected)

    def test_machines_without_rows_say_nothing(self):
        model = chain([2], layers.Dense(2))
        where = towers.Placement(TOWERS[:4], weights=[0, 0, 0, 1])
        x = np.ones([3, 2], "float32")

        kept = layers.Dense.call

        def not_a_number(layer, x):
            y = kept(layer, x)
            name = v1.get_default_graph().get_name_scope()
            return y if "tower_3" in name else y * np.nan

        with in_machines():
            with mock.patch.object(layers.Dense, "call", not_a_number):
                _, _, gradients = towered_step(model, where, training=None)(x)
        for gradient in gradients:
            self.assertFalse(np.isnan(gradient).any())

    @pytest.mark.slow
    def test_moving_statistics_are_of_all_rows_by_way_of_each_machine_s(self):
        here, machines = make(normed), make(normed)
        x = np.array([[1, 2, 0], [3, 0, 0], [4, 5, 6], [7, 8, 0]] * 2)
        where = towers.Placement(TOWERS, weights=[2, 1, 0, 1, 1])

        @tf.function(reduce_retracing=True)
        def step(model, x):
            graph = towers.build_towers(model, x, where, training=True)
            graph.apply_updates()
            return graph.towers[0].outputs

        for rows in (8, 3):
            step(here, x[:rows])
            with in_machines():
                report = towers.execution_report(step, machines, x[:rows])
                step(machines, x[:rows])
            close(machines.get_weights(), here.get_weights())
        # Of both norms, the masked one by itself: what was seen, and how much.
        pooled = [t for t in report.transfers if "merge_moments" in t.tensor]
        sent = [t.bytes for t in pooled if t.target == "/CPU:0"]
        self.assertEqual(sent, 2 * [3 * 4 * 4])

    @parameterized.parameters(
        # Two seeds, with where each of three towers is; or apart.
        ("/CPU:0", 2 * 2 * 8 + 3 * 3 * 8),
        ("/CPU:3", 2 * 2 * 8, 3 * 3 * 8),
    )
    def test_seeds_and_whole_numbers_cross_once(self, home, *options):
        class Counts(layers.Layer):
            """Has numbers of its own, and one by itself that is no float."""

            def build(self, shape):
                add = functools.partial(
                    self.add_weight, initializer="zeros", trainable=False
                )
                self.seen = add((), dtype="int32")
                self.known = add((3,), dtype="int32")
                self.is_open = add((), dtype="bool")

            def call(self, x):
                constant = tf.cast(self.known, x.dtype)
                is_open = tf.cast(self.is_open, x.dtype)
                return x + constant * is_open * tf.cast(self.seen, x.dtype)

        def factory():
            drops = [layers.Dropout(0.5, seed=k) for k in range(2)]
            return keras.Sequential([keras.Input([3]), *drops, Counts()])

        plain, here = factory(), factory()
        where = towers.Placement(
            TOWERS, weights=[2, 1, 0, 1, 1], parameter_device=home
        )
        towers.place_variables(here, where)

        @tf.function(input_signature=[tf.TensorSpec([None, 3])])
        def step(x):
            graph = towers.build_towers(here, x, where, training=True)
            graph.apply_updates()
            return graph.outputs

        with in_machines():
            for rows in (7, 3):
                x = np.ones([rows, 3], "float32")
                close(step(x), plain(x, training=True))
            report = towers.execution_report(step, x)
        close(here.get_weights(), plain.get_weights())
        sent = [
            (t.dtype.name, t.bytes)
            for t in report.transfers
            if (MACHINE[t.source], MACHINE[t.target]) == ("a", "b")
            and not t.dtype.is_floating
        ]
        expected = [("int32", 4 * 4), ("bool", 1)]
        expected += [("int64", size) for size in options]
        self.assertCountEqual(sent, expected)

    @parameterized.parameters("/CPU:0", "balanced")
    @pytest.mark.slow(after=1)
    def test_each_parameter_crosses_once_there_and_back(self, home):
        # Large ones and small ones.
        sizes = [150, 150, 150, 10, 10, 10, 10]
        model = chain([150], *[layers.Dense(n) for n in sizes])
        if home == "balanced":
            home = towers.balanced(sorted(MACHINE))
        where = placement(4, parameter_device=home, output_device="/CPU:0")
        model = towers.TowerModel(model, where)
        model.compile("sgd", "mse", jit_compile=False)
        x, y = np.ones([8, 150], "float32"), np.ones([8, 10], "float32")
        with in_machines():
            report = towers.execution_report(model.train_on_batch, x, y)
        parameters = sum(w.nbytes for w in model.get_weights())
        crossed = between_machines(report)
        if isinstance(home, str):
            least = parameters + (x.nbytes + y.nbytes) / 2
            self.assertBetween(crossed["a", "b"], 0.99 * least, 1.01 * least)
            # No device is sent, from there, all that its machine is.
            for device in ("/CPU:1", "/CPU:2"):
                sent = report.bytes_between["/CPU:0", device]
                self.assertLess(sent, 0.7 * parameters)
        least = 2 * parameters + x.nbytes / 2 + y.nbytes
        self.assertBetween(sum(crossed.values()), 0.99 * least, 1.01 * least)
        # What is relayed is among the least that devices are sent.
        self.assertBetween(report.total_bytes / report.least_bytes, 1, 1.01)
