"""keras_numbers: what an optimizer goes by, and the names behind it."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest

from towers.foreign.keras_numbers import (
    Numbers,
    _Number,
    _read_once,
    numbers_known,
)

HOME, THERE = "/CPU:1", "/CPU:2"


class NumbersTest(absltest.TestCase):
    def test_keras_and_tensorflow_still_have_the_private_names(self):
        optimizer = keras.optimizers.Nadam(0.1)
        optimizer.build([keras.Variable(1.0)])
        for name in ("_iterations", "_learning_rate", "_u_product"):
            self.assertIsInstance(vars(optimizer)[name], keras.Variable)
        self.assertTrue(callable(optimizer._get_current_learning_rate))
        self.assertIsNone(tf.Variable(1.0)._cached_value)

    def test_any_kind_of_number_is_the_same_elsewhere(self):
        values = [
            tf.constant(value, dtype)
            for value, dtype in (
                (2**53 + 1, "int64"),
                (-7, "int32"),
                (255, "uint8"),
                (True, "bool"),
                (np.pi, "float64"),
                (np.nan, "float32"),
                (1 / 3, "bfloat16"),
                (65504, "float16"),
            )
        ]

        @tf.function
        def sent():
            numbers = [_Number(tf.identity(x), HOME) for x in values]
            constant = Numbers(numbers)
            constant.send([HOME, THERE])
            with constant.at(THERE):
                return [number.now for number in numbers]

        for words, value in zip(sent(), values, strict=True):
            self.assertEqual(words.dtype, value.dtype)
            np.testing.assert_array_equal(words.numpy(), value.numpy())

    def test_what_is_assigned_to_is_read_as_it_is(self):
        optimizer = keras.optimizers.SGD(0.5)
        steps = optimizer.iterations

        @tf.function
        def run():
            with numbers_known(optimizer) as numbers:
                numbers.send([THERE])
                with numbers.at(THERE):
                    before = tf.identity(steps)
                    steps.assign_add(1)
                    after = tf.identity(steps)
                with numbers.at(THERE):
                    return before, after, tf.identity(steps)

        np.testing.assert_array_equal(run(), [0, 1, 1])
        self.assertIsNone(steps.value._cached_value)

    def test_a_number_is_one_tensor_until_it_is_assigned_to(self):
        number = tf.Variable(1.0)

        @tf.function
        def run():
            with _read_once(number):
                one, same = number.value(), number.value()
                self.assertIs(one, same)
                number.assign_add(1.0)
                return one, number.value()

        np.testing.assert_array_equal(run(), [1.0, 2.0])
        self.assertIsNone(number._cached_value)
