"""handing_out: all of a value, that crosses if it is taken, and what a tower has."""

import tensorflow as tf
from absl.testing import absltest
from executed import Executed

from towers.verbs.handing_out import handed_out

HOME, THERE = "/CPU:0", "/CPU:1"


def values():
    with tf.device(HOME):
        value = tf.Variable([1.001, 2.0, -3.003])
    return value


def both(value):
    """The value there, what a tower takes of it, and its half."""
    with tf.device(HOME):
        read = value.read_value()
        half = tf.cast(read, tf.bfloat16)
    return *handed_out(read, half, THERE), half


class HandingOutTest(absltest.TestCase):
    def test_the_value_is_exact_and_gradients_are_as_wide(self):
        value = values()

        @tf.function
        def step():
            whole, taken, half = both(value)
            with tf.device(THERE):
                y = tf.reduce_sum(tf.cast(taken * taken, tf.float32))
            return whole, taken, tf.gradients(y, whole)[0], half

        whole, taken, gradient, half = step()
        self.assertAllEqual(whole, value)
        self.assertAllEqual(taken, half)
        self.assertEqual(gradient.dtype, tf.float32)
        self.assertAllEqual(gradient, tf.cast(half + half, tf.float32))

    def test_a_gradient_goes_back_as_the_tower_has_said_it(self):
        value = values()

        @tf.function
        def step(also):
            whole, taken, half = both(value)
            with tf.device(THERE):
                y = tf.reduce_sum(tf.cast(taken * taken, tf.float32))
                if also:  # what is added to it is not rounded
                    y += 0.001 * tf.reduce_sum(whole)
            (back,) = tf.gradients(y, half)
            return back, half

        back, half = step(False)
        self.assertEqual(back.dtype, tf.bfloat16)
        self.assertAllEqual(back, half + half)
        back, half = step(True)
        self.assertEqual(back.dtype, tf.float32)
        self.assertAllEqual(back, tf.cast(half + half, tf.float32) + 0.001)

    def test_nothing_but_the_half_crosses_unless_it_is_taken(self):
        value = values()

        @tf.function
        def step(is_taken):
            whole, taken, _ = both(value)
            with tf.device(THERE):
                return tf.cast(taken, tf.float32) + (whole if is_taken else 0)

        for is_taken, sends in ((False, 1), (True, 2)):
            executed = Executed(lambda is_taken=is_taken: step(is_taken))
            crossed = [x for x in executed.sends() if x[:2] == (HOME, THERE)]
            self.assertLen(crossed, sends)

    def assertAllEqual(self, one, other):
        self.assertTrue(bool(tf.reduce_all(one == other)), (one, other))
