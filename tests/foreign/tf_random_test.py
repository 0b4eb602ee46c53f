"""tf_random: TensorFlow's random functions still come to the same."""

import numpy as np
import tensorflow as tf
from absl.testing import absltest

from towers.foreign import tf_random

STATELESS = {
    "stateless_multinomial": lambda seed: tf.random.stateless_categorical(
        [[0.0, 0.0]], 3, seed
    ),
    "stateless_parameterized_truncated_normal": lambda seed: (
        tf.random.stateless_parameterized_truncated_normal([3], seed)
    ),
    "stateless_random_binomial": lambda seed: tf.random.stateless_binomial(
        [3], seed, 5.0, 0.5
    ),
    "stateless_random_gamma_v3": lambda seed: tf.random.stateless_gamma(
        [3], seed, 2.0
    ),
    "stateless_random_normal_v2": lambda seed: tf.random.stateless_normal(
        [3], seed
    ),
    "stateless_random_poisson": lambda seed: tf.random.stateless_poisson(
        [3], seed, 2.0
    ),
    "stateless_random_uniform_full_int_v2": lambda seed: (
        tf.random.stateless_uniform([3], seed, None, None, tf.int32)
    ),
    "stateless_random_uniform_int_v2": lambda seed: tf.random.stateless_uniform(
        [3], seed, 0, 9, tf.int32
    ),
    "stateless_random_uniform_v2": lambda seed: (
        tf.nn.experimental.stateless_dropout(tf.ones([3]), 0.5, seed)
    ),
    "stateless_shuffle": lambda seed: tf.random.experimental.stateless_shuffle(
        tf.range(3), seed
    ),
    "stateless_truncated_normal_v2": lambda seed: (
        tf.random.stateless_truncated_normal([3], seed)
    ),
}


class TfRandomTest(absltest.TestCase):
    def test_who_draws_asks_first(self):
        asked = []

        def seeds(get_seed, op_seed):
            asked.append(op_seed)
            return get_seed(op_seed)

        def drawn(name, by, original, given):
            asked.append(name)
            self.assertIn(by, given)
            return original(**given)

        with tf_random.asks(seeds, drawn), tf_random.asks(None, None):
            for name, draw in STATELESS.items():
                draw([1, 2])
                self.assertEqual(asked.pop(), name)
            for draw in (
                lambda: tf.random.normal([3], seed=4),
                lambda: tf.random.shuffle(tf.range(3), seed=4),
                lambda: tf.nn.dropout(tf.ones([3]), 0.5, seed=4),
                lambda: tf.random.gamma([3], 2.0, seed=4),
                lambda: tf.random.categorical([[0.0, 0.0]], 3, seed=4),
            ):
                draw()
                self.assertEqual(asked.pop(), 4)
        self.assertEmpty(asked)
        STATELESS["stateless_shuffle"]([1, 2])
        tf.random.normal([3], seed=4)
        self.assertEmpty(asked)

    def test_as_much_of_a_shape_is_known_as_there_is(self):
        @tf.function(input_signature=[tf.TensorSpec([None, 3])])
        def call(x):
            results.append(tf_random.sizes({"shape": tf.shape(x)}))
            results.append(tf_random.sizes({"shape": [tf.shape(x)[0], 2]}))
            results.append(tf_random.sizes({"value": x}))

        results = []
        call.get_concrete_function()
        self.assertEqual(results, [[None, 3], [None, 2], None])

    def test_what_generators_draw_is_taken_back(self):
        with tf_random.nothing_drawn():
            first = np.random.rand()
        self.assertEqual(np.random.rand(), first)
