"""boundary: what a tower takes and hands out."""

import tensorflow as tf
from absl.testing import absltest, parameterized

from towers.engine import boundary


class LostTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("watched", True, True),
        ("not watched", False, True),
        ("given", True, False),
    )
    def test_what_a_tape_follows_from_outside_is_found(self, watch, outside):
        results = []

        @tf.function
        def run(x, scale):
            with tf.GradientTape() as tape:
                if watch:
                    tape.watch(scale)
                double = 2 * scale
                graph = tf.compat.v1.get_default_graph()
                before = len(graph.get_operations())
                tf.sin(x) * double
                ops = graph.get_operations()[before:]
                given = [x] if outside else [x, double]
                results.append(boundary.lost(ops, given) == [double])

        run(tf.ones([]), tf.ones([]))
        self.assertEqual(results, [watch and outside])

    def test_what_a_function_around_it_follows_is_found(self):
        results = []
        scale = tf.constant(2.0)
        with tf.GradientTape() as tape:
            tape.watch(scale)

            @tf.function
            def outer(x):
                @tf.function
                def inner(x):
                    x * scale
                    ops = tf.compat.v1.get_default_graph().get_operations()
                    results.extend(boundary.lost(ops[-1:], [x]))
                    return x

                return inner(x)

            outer(tf.ones([]))
        self.assertLen(results, 1)

    def test_it_is_said_what_to_do(self):
        boundary.check_nothing_lost((), ())
        with self.assertRaisesRegex(ValueError, "belong to no model"):
            boundary.check_nothing_lost([tf.Variable(1.0, name="v")], ())
        with tf.Graph().as_default():
            x = tf.ones([], name="scale")
        with self.assertRaisesRegex(ValueError, "scale:0.*tf.stop_gradient"):
            boundary.check_nothing_lost((), [x])


class NestTest(absltest.TestCase):
    def test_what_is_there_twice_gets_two_gradients(self):
        with tf.Graph().as_default():
            x, n = tf.ones([]), tf.constant(1)
            one, two, *ints = boundary.distinct([x, x, n, n])
        self.assertIs(one, x)
        self.assertIsNot(two, x)
        self.assertEqual([i is n for i in ints], [True, True])

    def test_only_what_has_a_gradient_is_replaced(self):
        with tf.Graph().as_default():
            x, n = tf.ones([]), tf.constant(1)
            still = tf.stop_gradient(x)
            nest = {"a": x, "b": [None, n, still]}
            self.assertEqual(
                boundary.replaced(nest, iter(["new"])),
                {"a": "new", "b": [None, n, still]},
            )
