"""tf_random_graphs: what is drawn in a graph is still found there."""

import tensorflow as tf
from absl.testing import absltest

from towers.foreign import tf_random_graphs


class TfRandomGraphsTest(absltest.TestCase):
    def test_loops_and_branches_are_known(self):
        graphs = []

        @tf.function
        def kept(x):
            self.assertFalse(tf_random_graphs.is_made_in(graphs[0]))
            return x

        @tf.function(autograph=False)
        def root(x):
            graphs.append(tf.compat.v1.get_default_graph())

            def step(i, y):
                self.assertTrue(tf_random_graphs.is_made_in(graphs[0]))
                graphs.append(tf.compat.v1.get_default_graph())
                results = [z.name for z in tf_random_graphs.sources(y * x)]
                self.assertIn(x.name, results)
                return i + 1, kept(y * x)

            return tf.while_loop(lambda i, _: i < 3, step, (0, x))

        root.get_concrete_function(tf.TensorSpec([]))
        (loop, condition), *more = tf_random_graphs.loops_around(graphs[-1])
        self.assertEmpty(more)
        self.assertIn("While", loop.type)
        self.assertTrue(condition.get_operations())

    def test_calls_of_what_draws_by_a_constant_are_known(self):
        by_op = tf.function(lambda: tf.random.normal([3], seed=4))

        def normal(seed):
            return tf.random.stateless_normal([3], seed)

        by_constant = tf.function(lambda: normal([1, 2]))
        by_argument = tf.function(normal)

        def missed(call, given=()):
            yes = tf.TensorSpec([], tf.bool)
            graph = tf.function(call).get_concrete_function(yes).graph
            return [*tf_random_graphs.missed(graph.get_operations(), given)]

        self.assertLen(missed(lambda _: by_op()), 1)
        self.assertEmpty(missed(lambda _: by_op(), None))
        self.assertLen(missed(lambda _: by_constant(), None), 1)
        branches = by_constant, lambda: normal([1, 2])
        self.assertLen(missed(lambda yes: tf.cond(yes, *branches)), 1)
        self.assertEmpty(missed(lambda yes: tf.cond(yes, *branches[1:] * 2)))
        self.assertEmpty(missed(lambda _: by_argument(tf.constant([1, 2]))))

    def test_ops_that_nobody_asked_for_are_known(self):
        @tf.function(autograph=False)
        def call(seed):
            by = tf.constant([1, 2])
            constant = tf.random.stateless_normal([3], by)
            tf_random_graphs.mark_seen(
                [
                    x
                    for x in constant.graph.get_operations()
                    if "NormalV2" in x.type
                ][0].outputs[0]
            )
            tf.raw_ops.StatelessRandomNormal(shape=[3], seed=by, name="raw")
            tf.raw_ops.StatelessRandomNormal(shape=[3], seed=seed, name="given")

        spec = tf.TensorSpec([2], tf.int32)
        ops = call.get_concrete_function(spec).graph.get_operations()
        self.assertEqual([*tf_random_graphs.missed(ops, ())], ["raw"])
        unseen = [x.name for x in ops if tf_random_graphs.draws_unseen(x)]
        self.assertEqual(unseen, ["raw", "given"])
