"""closure: what a function of all towers takes past its values."""

import functools

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest, parameterized
from models import chain, make, placement
from same import same_step

import towers

layers = keras.layers
ROWS = tf.TensorSpec([None, 3])


class Sharing(layers.Layer):
    """Takes in its functions all that is the same in all towers."""

    needs_all_towers = True

    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(3, activation="tanh")

    def build(self, shape):
        self.inner.build(shape)
        self.kernel = self.add_weight(shape=(3, 3), name="kernel")
        self.lazy = self.add_weight(shape=(3,), name="lazy")

    def call(self, x):
        kernel = tf.convert_to_tensor(self.kernel)
        wide, two = tf.tanh(kernel) * 2.0, tf.constant(2.0)
        mean = towers.all_towers(lambda v: tf.reduce_mean(v, 0), x)

        def rolled(v):
            v = tf.map_fn(lambda row: row * self.lazy, self.inner(v - mean))
            return tf.roll(v @ wide, 1, 0)

        def scaled(v, shared):
            return tf.reduce_mean(tf.square(v * shared["by"] + shared["of"]))

        y = towers.all_towers(rolled, x, split=True)
        nest = {"by": 0.5, "of": self.lazy * two}
        z = towers.all_towers(scaled, tf.sin(x), shared=nest)
        return (
            x
            + y
            + z
            * towers.all_towers(
                lambda v, k: tf.reduce_sum(v, 0) * k, x, shared=self.lazy
            )
        )


def sharing():
    return chain([3], layers.Dense(3), Sharing(), layers.Dense(2))


class Taking(layers.Layer):
    """Calls all_towers as it is told."""

    needs_all_towers = True

    def __init__(self, ask):
        super().__init__(name="taking")
        self.ask = ask
        self.seed = keras.random.SeedGenerator(3)
        self.count = self.add_weight(name="count", trainable=False, shape=())

    def call(self, x):
        return x + self.ask(self, x, tf.sin(x))


def taking(ask):
    return chain([3], layers.Dense(3), Taking(ask))


def build(ask, rows=None, weights=(2, 1, 1), **kwargs):
    model = taking(ask)
    where = placement(3, list(weights))
    spec = ROWS if rows is None else tf.TensorSpec([rows, 3])

    @tf.function(autograph=False, input_signature=[spec])
    def run(x):
        graph = towers.build_towers(model, x, where, **kwargs)
        return graph.outputs, [value for _, value in graph.updates]

    return model, run.get_concrete_function()


def mean(v, *more):
    return tf.reduce_mean(v, 0) * tf.reduce_sum(more[0] if more else 1.0)


def with_default(self, x, h):
    return towers.all_towers(lambda v, h=h: mean(v, h), x)


def in_a_loop(self, x, h):
    return towers.all_towers(
        lambda v: mean(tf.map_fn(lambda row: row * h[0], v)), x
    )


def in_a_function(self, x, h):
    inner = tf.function(lambda v: mean(v, h), autograph=False)
    return towers.all_towers(lambda v: inner(v), x)


def of_rows(self, x, h):
    n = tf.cast(tf.shape(x)[0], tf.float32)
    return towers.all_towers(lambda v: tf.reduce_sum(v, 0) / n, x)


def of_what_was_dealt(self, x, h):
    dealt = towers.all_towers(lambda v: tf.roll(v, 1, 0), x, split=True)
    return towers.all_towers(lambda v: mean(v, dealt), x)


def of_noise(self, x, h):
    noise = mean(keras.random.normal(tf.shape(x), seed=self.seed))
    return towers.all_towers(lambda v: mean(v) + noise, x)


def of_stateful_noise(self, x, h):
    noise = tf.random.normal([3])
    return towers.all_towers(lambda v: mean(v) + noise, x)


OWN = {
    "closure": lambda self, x, h: towers.all_towers(lambda v: mean(v, h), x),
    "as_it_is": lambda self, x, h: towers.all_towers(lambda v: h[0], x),
    "partial": lambda self, x, h: towers.all_towers(
        functools.partial(lambda h, v: mean(v, h), h), x
    ),
    "split": lambda self, x, h: towers.all_towers(
        lambda v: v * tf.reduce_sum(h), x, split=True
    ),
    "shared": lambda self, x, h: towers.all_towers(mean, x, shared=h),
    "shared_unused": lambda self, x, h: towers.all_towers(
        lambda v, shared: mean(v), x, shared=[self.count, {"h": h}]
    ),
    **{
        f.__name__: f
        for f in (
            with_default,
            in_a_loop,
            in_a_function,
            of_rows,
            of_what_was_dealt,
            of_noise,
            of_stateful_noise,
        )
    },
}


class SharedTest(absltest.TestCase):
    def test_what_is_the_same_in_all_towers_has_the_plain_gradient(self):
        rng = np.random.default_rng(0)
        # Of two rows, the first tower has none.
        batches = [rng.normal(size=[n, 3]).astype("float32") for n in (7, 2)]
        how = {"of": tf.reduce_sum, "inputs": True, "training": None}
        same_step(make(sharing), placement(3), *batches, spec=ROWS, **how)

    def test_shared_is_by_name_or_last_outside_of_towers_too(self):
        last = towers.all_towers(lambda v, k: v - k, 3.0, shared=1.0)
        named = towers.all_towers(
            lambda v, *, shared: v - shared, 3.0, shared=1.0
        )
        self.assertEqual((last, named), (2.0, 2.0))


class RefusalTest(parameterized.TestCase):
    @parameterized.named_parameters(OWN.items())
    def test_what_depends_on_a_tower_s_rows(self, ask):
        with self.assertRaisesRegex(
            ValueError, r"'tower_\d/taking/?', .*tensor '.*one tower"
        ):
            build(ask)

    def test_a_number_that_differs_from_tower_to_tower(self):
        def counted(self, x, h):
            n = x.shape[0] or 1
            return towers.all_towers(lambda v: tf.reduce_sum(v, 0) / n, x)

        def constant(self, x, h):
            n = tf.cast(tf.shape(x)[0], tf.float32)
            return towers.all_towers(lambda v, k: mean(v) / k, x, shared=n)

        for ask, name in ((counted, "'n'"), (constant, "'shared'")):
            with self.assertRaisesRegex(ValueError, f"{name}, which is"):
                build(ask, rows=8)

    def test_a_weight_of_no_model(self):
        foreign = tf.Variable(2.0, name="foreign")

        def ask(self, x, h):
            return towers.all_towers(lambda v: mean(v) * foreign, x)

        with self.assertRaisesRegex(ValueError, "foreign"):
            build(ask)
