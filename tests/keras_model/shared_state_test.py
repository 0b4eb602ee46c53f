"""shared_state: what depends on no rows is assigned once, without a word."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from warned import messages

import towers

PLACEMENT = towers.Placement(["/CPU:0", "/CPU:1", "/CPU:2"], weights=[2, 1, 1])


class Weights(keras.layers.Layer):
    """State made of weights, constants, other state and noise."""

    def build(self, shape):
        def state(name, shape=()):
            return self.add_weight(
                name=name, shape=shape, initializer="zeros", trainable=False
            )

        self.norm, self.fixed, self.calls = map(state, ("norm", "fix", "calls"))
        self.power, self.noise = state("power", (1, 3)), state("noise", (3,))
        towers.merge_state_by(self.calls, "sum")
        self.k = self.add_weight(name="k", shape=(3, 3))
        self.seed = keras.random.SeedGenerator(5)

    def call(self, x):
        self.norm.assign(keras.ops.norm(self.k))
        self.fixed.assign(3.0)
        self.calls.assign_add(1.0)
        weights = keras.ops.convert_to_tensor(self.k)
        start = self.power + 1.0
        _, power = tf.while_loop(
            lambda i, u: i < 3, lambda i, u: (i + 1, u @ weights), (0, start)
        )
        self.power.assign(power)
        self.noise.assign(keras.random.normal((3,), seed=self.seed))
        return x @ self.k + self.noise


class Known(keras.layers.Layer):
    """Counts rows without an op, where it can."""

    def build(self, shape):
        self.seen = self.add_weight(
            name="seen", dtype="int32", initializer="zeros", trainable=False
        )
        towers.merge_state_by(self.seen, "sum")

    def call(self, x):
        self.seen.assign_add(x.shape[0] or 0)
        return x


class Centered(keras.layers.Layer):
    """Keeps what it knows of all towers' rows."""

    needs_all_towers = True

    def build(self, shape):
        self.mean = self.add_weight(
            name="mean", shape=(3,), initializer="zeros", trainable=False
        )
        self.seen = self.add_weight(
            name="seen", dtype="int32", initializer="zeros", trainable=False
        )

    def call(self, x):
        mean, rows = towers.all_towers(
            lambda x: (tf.reduce_mean(x, 0), tf.shape(x)[0]), x
        )
        self.mean.assign(0.5 * self.mean + mean)
        self.seen.assign_add(rows)
        return x - mean


def spectral():
    return keras.layers.SpectralNormalization(keras.layers.Dense(3))


class SharedStateTest(parameterized.TestCase):
    @parameterized.product(
        layer=[spectral, Weights, Centered],
        rows=[1, 7],
        rows_known=[False, True],
    )
    def test_it_is_the_plain_model_s_and_nothing_is_told(
        self, layer, rows, rows_known
    ):
        def model():
            keras.utils.set_random_seed(4)
            return keras.Sequential([keras.Input([3]), layer()])

        plain, towered = model(), model()
        x = np.random.default_rng(0).normal(size=[rows, 3]).astype("float32")
        plain(x, training=True)

        @tf.function(
            input_signature=[tf.TensorSpec([rows if rows_known else None, 3])],
            autograph=False,
        )
        def step(x):
            graph = towers.build_towers(towered, x, PLACEMENT, training=True)
            graph.apply_updates()

        self.assertEmpty(messages(lambda: step(x), "merge_state"))
        for ours, theirs in zip(towered.variables, plain.variables):
            np.testing.assert_allclose(
                ours.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-6
            )

    @parameterized.parameters(1, 3, 6)
    def test_a_number_of_rows_that_is_a_constant_is_no_shared_state(self, rows):
        model = keras.Sequential([keras.Input([3]), Known()])
        placement = towers.Placement(PLACEMENT.devices)  # may be equal shards
        graph = towers.build_towers(model, np.ones([rows, 3]), placement)
        graph.apply_updates()
        self.assertEqual(int(model.layers[0].seen), rows)

    def test_what_is_made_of_an_input_that_is_whole_is_shared(self):
        class Table(keras.layers.Layer):
            def build(self, shape):
                self.sum = self.add_weight(
                    name="sum", initializer="zeros", trainable=False
                )
                towers.merge_state_by(self.sum, "sum")

            def call(self, inputs):
                self.sum.assign_add(keras.ops.sum(inputs["table"]))
                return inputs["x"] @ inputs["table"]

        x = keras.Input([3], name="x")
        table = keras.Input(batch_shape=[3, 2], name="table")
        layer = Table(name="layer")
        model = keras.Model(
            {"x": x, "table": table}, layer({"x": x, "table": table})
        )
        inputs = {"x": tf.ones([6, 3]), "table": tf.ones([3, 2])}
        towers.build_towers(
            model, inputs, PLACEMENT, whole=["table"]
        ).apply_updates()
        self.assertEqual(float(layer.sum), 6.0)

    def test_rows_may_be_ragged(self):
        class Values(keras.layers.Layer):
            def build(self, shape):
                self.sum = self.add_weight(
                    name="sum", initializer="zeros", trainable=False
                )
                self.calls = self.add_weight(
                    name="calls", initializer="zeros", trainable=False
                )
                towers.merge_state_by(self.sum, "sum")

            def call(self, x):
                self.sum.assign_add(tf.reduce_sum(x.values))
                self.calls.assign_add(1.0)
                return tf.reduce_sum(x, 1)

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.values = Values()
                self.values.build(None)
                self.built = True

            def call(self, x):
                return self.values(x)

        model = Model()
        x = tf.ragged.constant([[1.0, 2.0], [], [3.0], [4.0, 5.0], [6.0]])

        def call():
            towers.build_towers(model, x, PLACEMENT).apply_updates()

        self.assertEmpty(messages(call, "merge_state"))
        self.assertEqual(float(model.values.sum), 21.0)
        self.assertEqual(float(model.values.calls), 1.0)
