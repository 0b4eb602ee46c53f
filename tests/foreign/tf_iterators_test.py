"""Iterators that a function has captured begin anew."""

import tensorflow as tf
from absl.testing import absltest

from towers.foreign import tf_iterators


class IteratorsTest(absltest.TestCase):
    def test_a_captured_iterator_begins_anew(self):
        dataset = tf.data.Dataset.range(3)
        with tf.device("/CPU:1"):
            iterator = iter(dataset)
        step = tf.function(lambda: next(iterator))
        step()
        self.assertEqual(int(step()), 1)
        tf_iterators.restart(iterator, dataset)
        self.assertEqual(int(step()), 0)

    def test_what_the_functions_of_datasets_hold(self):
        variable = tf.Variable(1.0)
        numbers = tf.data.Dataset.range(3)
        held = numbers.map(lambda _: variable.assign_add(1.0)).batch(2)
        (handle,) = tf_iterators.captured(held.prefetch(1))
        self.assertIs(handle, variable.handle)
        self.assertEqual(tf_iterators.captured(numbers), [])

    def test_datasets_that_call_python_are_known(self):
        numbers = tf.data.Dataset.range(3)
        spec = tf.TensorSpec([])

        def call(x):
            return tf.py_function(int, [x], tf.int64)

        called = numbers.map(call)
        generated = tf.data.Dataset.from_generator(
            lambda: iter([1.0]), output_signature=spec
        )
        within = numbers.flat_map(lambda n: tf.data.Dataset.range(n).map(call))
        for dataset in (called.batch(2), generated.prefetch(1), within):
            self.assertTrue(tf_iterators.calls_python(dataset))
        zipped = tf.data.Dataset.zip(numbers, numbers.map(lambda x: x + 1))
        self.assertFalse(tf_iterators.calls_python(zipped.shuffle(3)))
