"""losses: what layers add as losses is the plain model's, or is told."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import placement
from same import pair, same_fit

import towers

ops = keras.ops
RNG = np.random.default_rng(0)
X = RNG.normal(size=[7, 3]).astype("float32")


class Adds(keras.layers.Layer):
    """Adds losses of what it is given, and of its weights."""

    def __init__(self, *functions, **kwargs):
        super().__init__(**kwargs)
        self.functions = functions

    def build(self, shape):
        self.kernel = self.add_weight(name="kernel", shape=(3, 3))

    def call(self, x):
        x = x @ self.kernel
        for function in self.functions:
            self.add_loss(function(x, self.kernel))
        return x


def rows_of(x):
    return tf.cast(x.shape[0] or tf.shape(x)[0], tf.float32)


ADDING = (
    lambda x, w: ops.mean(x**2),
    lambda x, w: ops.sum(x**2),
    lambda x, w: ops.sum(x**2, -1),
    lambda x, w: ops.sum(x**2, -1) / rows_of(x),
    lambda x, w: tf.transpose(x),
    lambda x, w: ops.sum(x**2) / rows_of(x),
    lambda x, w: ops.sum(w**2),
    lambda x, w: tf.constant(2.0),
    lambda x, w: ops.mean(x, 0),
    lambda x, w: ops.sum((x + keras.random.normal(ops.shape(x), seed=5)) ** 2),
)


def model(*functions, layer=Adds, **kwargs):
    keras.utils.set_random_seed(2)
    adds = layer(*functions, name="adds", **kwargs)
    return keras.Sequential([keras.Input([3]), adds, keras.layers.Dense(2)])


def differentiated(losses, network):
    """The sum of losses, as Keras adds them up, and its gradient."""
    with tf.GradientTape() as tape:
        total = tf.add_n([tf.reduce_sum(loss) for loss in losses()])
    return total, tape.gradient(total, network.layers[0].kernel)


def towered(network, x, where):
    """As `differentiated`, and what towers warned of by their own words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graph = differentiated(
            lambda: towers.build_towers(network, x, where).losses, network
        )
    messages = [str(w.message) for w in caught if "merge_losses_by" in str(w)]
    return *graph, messages


def plain(network, x):
    def losses():
        network(x)
        return network.losses

    return differentiated(losses, network)


class Masked(Adds):
    """The mean of those rows whose first feature is positive."""

    def call(self, x):
        kept = tf.cast(x[:, :1] > 0, x.dtype)
        x = x @ self.kernel
        self.add_loss(ops.sum(kept * x**2) / ops.sum(kept))
        return x


class LossesTest(parameterized.TestCase):
    @parameterized.parameters((7, [3, 2, 1]), (1, [3, 2, 1]), (7, None))
    @pytest.mark.slow(after=1)
    def test_they_are_the_plain_model_s_of_known_rows(self, rows, weights):
        where = placement(len(weights or [1, 1]), weights)
        expected = plain(model(*ADDING), X[:rows])
        *actual, result = towered(model(*ADDING), tf.constant(X[:rows]), where)
        self.assertEmpty(result)
        for ours, theirs in zip(actual, expected):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)

    def test_what_has_rows_is_joined(self):
        network = model(lambda x, w: ops.sum(x**2, -1))
        graph = towers.build_towers(network, X, placement(3, [3, 2, 1]))
        network(X)
        np.testing.assert_allclose(
            graph.losses[0], network.losses[0], rtol=1e-5
        )

    @pytest.mark.slow
    def test_in_own_steps_too(self):
        class Own(keras.Model):
            def __init__(self):
                super().__init__()
                self.inner = model(*ADDING)

            def call(self, x):
                return self.inner(x)

            def train_step(self, data):
                x, y = data
                with tf.GradientTape() as tape:
                    self(x, training=True)
                    loss = sum(ops.sum(loss) for loss in self.losses)
                variables = self.inner.layers[0].trainable_variables
                gradients = tape.gradient(loss, variables)
                self.optimizer.apply_gradients(zip(gradients, variables))
                return {"added": loss}

        def built():
            network = Own()
            network(X[:2])
            return network

        models = pair(built, placement(3, [3, 2, 1]))
        how = {"loss": None, "optimizer": lambda: keras.optimizers.SGD(0.01)}
        same_fit(models, X, X[:, :2], batch_size=4, **how)

    def test_what_does_not_add_up_is_named_once(self):
        network = model(lambda x, w: ops.max(x), lambda x, w: ops.mean(x) ** 2)
        x, where = tf.constant(X), placement(2, [2, 1])
        loss, _, result = towered(network, x, where)
        self.assertLen(result, 1)
        self.assertIn("'adds'", result[0])
        network(X)
        each = []
        for shard in (X[:4], X[4:]):
            network(shard)
            each.append(sum(float(loss) for loss in network.losses))
        self.assertAlmostEqual(
            float(loss), (4 * each[0] + 3 * each[1]) / 7, places=5
        )
        self.assertEmpty(towered(network, x, where)[2])

    @parameterized.parameters(False, True)
    @pytest.mark.slow(after=1)
    def test_a_shard_that_says_no_number_is_left_out(self, rows_known):
        x = np.abs(X)
        x[:4, 0] *= -1  # all rows of the first tower
        network = model(layer=Masked)
        spec = tf.TensorSpec([7 if rows_known else None, 3])

        @tf.function(input_signature=[spec], autograph=False)
        def step(x):
            graph = towers.build_towers(network, x, placement(3, [4, 3, 0]))
            kernel = network.layers[0].kernel
            # Another gradient beside is what it is.
            loss = graph.losses[0] + tf.reduce_sum(graph.outputs)
            return loss, tf.gradients(loss, kernel.value)[0]

        def alone():
            outputs = network(x)
            return [network.losses[0], outputs]

        expected = differentiated(alone, network)
        with self.assertWarnsRegex(UserWarning, "by 'adds' is not known"):
            actual = step(x)
        for ours, theirs in zip(actual, expected):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


class MergeLossesByTest(parameterized.TestCase):
    @parameterized.parameters(
        ("max", lambda x, w: ops.max(x), None),
        ("sum", lambda x, w: ops.sum(ops.sort(x, 0)), None),
        ("sum", lambda x, w: ops.sum(w**2), None),  # the same: once
        ("min", lambda x, w: ops.min(x), None),
        ("last", lambda x, w: ops.max(x[-1]), None),
        ("mean", lambda x, w: ops.max(x), 2),
    )
    @pytest.mark.slow(after=3)
    def test_a_layer_tells_how(self, rule, function, rows):
        """Rows are those of one tower, if it is the only one with some."""
        x = X[:rows]
        where = placement(3, [3, 2, 1] if rows is None else [1, 0, 0])
        network = model(function)
        towers.merge_losses_by(network.layers[0], rule)
        expected = plain(network, x)
        *actual, result = towered(network, tf.constant(x), where)
        self.assertEmpty(result)
        for ours, theirs in zip(actual, expected):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)

    def test_what_it_refuses(self):
        layer = keras.layers.Dense(2, name="dense")
        with self.assertRaisesRegex(TypeError, "`layer`.*got str"):
            towers.merge_losses_by("dense", "sum")
        with self.assertRaisesRegex(ValueError, "losses of 'dense' is 'all'"):
            towers.merge_losses_by(layer, "all")
