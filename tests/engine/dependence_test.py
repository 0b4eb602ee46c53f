"""dependence: what a tensor is made of, followed through the graph."""

import tensorflow as tf
from absl.testing import parameterized

from towers.engine import dependence

WAYS = {
    "ops": lambda x, y: tf.sin(x) + 1.0,
    "shape": lambda x, y: tf.cast(tf.shape(x)[0], tf.float32),
    "cond": lambda x, y: tf.cond(
        tf.reduce_sum(x) > 0, lambda: 1.0, lambda: 2.0
    ),
    "loop": lambda x, y: tf.while_loop(
        lambda i: i < tf.reduce_sum(x), lambda i: [i + 1.0], [0.0]
    )[0],
    "call": lambda x, y: tf.function(lambda: tf.sin(x))(),
    "custom gradient": lambda x, y: tf.custom_gradient(
        lambda x: (tf.sin(x), lambda g: g)
    )(x),
}


class DependsTest(parameterized.TestCase):
    @parameterized.named_parameters(WAYS.items())
    def test_it_is_found_or_not(self, way):
        @tf.function(autograph=False)
        def check(x, y):
            tensor, other = way(x, y), way(y, x)
            self.assertTrue(dependence.depends(tensor, [x]))
            self.assertFalse(dependence.depends(other, [x]))
            self.assertFalse(dependence.depends(tensor + other, [x], [tensor]))

        spec = tf.TensorSpec([None], tf.float32)
        check.get_concrete_function(spec, spec)

    def test_what_ends_the_way_is_no_source(self):
        @tf.function(autograph=False)
        def check(x, y):
            tensor = WAYS["shape"](x, y)
            self.assertTrue(dependence.depends(tensor, [x], (), ["Size"]))
            self.assertFalse(dependence.depends(tensor, [x], (), ["Shape"]))
            self.assertTrue(dependence.depends(tensor * x, [x], (), ["Shape"]))

        spec = tf.TensorSpec([None], tf.float32)
        check.get_concrete_function(spec, spec)

    def test_results_of_custom_gradients_are_told_apart(self):
        @tf.function(autograph=False)
        def check(x, y):
            @tf.custom_gradient
            def both(x, y):
                return [x * 2.0, y * 2.0], lambda a, b: (a, b)

            tensor, other = both(x, y)
            self.assertTrue(dependence.depends(tensor, [x]))
            self.assertFalse(dependence.depends(other, [x]))

        spec = tf.TensorSpec([None], tf.float32)
        check.get_concrete_function(spec, spec)

    def test_it_is_found_before_it_was_passed_on(self):
        @tf.function(autograph=False)
        def check(x):
            first = x * 2.0
            here = tf.identity(tf.identity(first))
            self.assertTrue(dependence.depends(first + 1.0, [here]))

        check.get_concrete_function(tf.TensorSpec([None], tf.float32))

    def test_a_branch_of_tensorflow_1_depends_on_its_predicate(self):
        with tf.Graph().as_default():
            on = tf.compat.v1.control_flow_v2_enabled()
            tf.compat.v1.disable_control_flow_v2()
            try:
                x = tf.compat.v1.placeholder(tf.float32, [])
                y = tf.compat.v1.placeholder(tf.float32, [])
                tensor = tf.cond(x > 0, lambda: 1.0, lambda: 2.0)
            finally:
                if on:
                    tf.compat.v1.enable_control_flow_v2()
            self.assertEqual(tensor.op.type, "Merge")
            self.assertTrue(dependence.depends(tensor, [x]))
            self.assertFalse(dependence.depends(tensor, [y]))
