"""tf_functions: the graphs of what loops, branches and calls run."""

import tensorflow as tf
from absl.testing import absltest, parameterized

from towers.foreign import tf_functions


class BodyTest(parameterized.TestCase):
    @parameterized.parameters(
        (
            lambda x: tf.while_loop(
                lambda i, y: i < 3, lambda i, y: (i + 1, tf.exp(y)), (0, x)
            )[1],
            "body",
        ),
        (
            lambda x: tf.cond(x > 0, lambda: tf.exp(x), lambda: x),
            "then_branch",
        ),
        (lambda x: tf.function(tf.exp)(x), "f"),
    )
    def test_it_has_what_the_op_takes_and_gives(self, function, attribute):
        seen = []

        def look(x):
            function(x)
            for op in tf.compat.v1.get_default_graph().get_operations():
                if any(a.name == attribute for a in op.op_def.attr):
                    body = tf_functions.body(op, attribute)
                    taken = len(op.inputs) - (attribute == "then_branch")
                    self.assertLen(body.inputs, taken)
                    self.assertLen(body.outputs, len(op.outputs))
                    seen.extend(x.type for x in body.get_operations())

        tf.function(look, autograph=False).get_concrete_function(
            tf.TensorSpec([])
        )
        self.assertIn("Exp", seen)


class MakingTest(absltest.TestCase):
    def test_an_op_takes_another_input(self):
        @tf.function
        def step(x):
            y = tf.square(x)
            tf_functions.take_instead(y.op, 0, x + 1)
            return y

        self.assertEqual(float(step(tf.constant(2.0))), 9)

    def test_results_are_returned_where_they_were_made(self):
        def devices(stays):
            def both(x):
                if stays:
                    tf_functions.return_where_made()
                with tf.device("/CPU:1"):
                    return x * 2

            traced = tf.function(both, autograph=False)
            (result,) = traced.get_concrete_function(tf.TensorSpec([])).outputs
            return result.op.type, result.device[-5:]

        # What this is for: an identity that has no device.
        self.assertEqual(devices(False), ("Identity", ""))
        self.assertEqual(devices(True), ("Identity", "CPU:1"))
