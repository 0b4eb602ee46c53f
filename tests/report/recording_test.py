"""recording: what ran is kept, what it changed is put back."""

import functools

import tensorflow as tf
from absl.testing import absltest
from tensorflow.python.eager import context

from towers.foreign import tf_calls
from towers.report.recording import record


class RecordTest(absltest.TestCase):
    def test_tensorflow_still_has_the_private_names(self):
        self.assertTrue(callable(context.context().has_function))
        self.assertTrue(callable(context.context().get_function_def))
        self.assertEqual(tf_calls.device(), "")
        with tf.device("/CPU:1"):
            self.assertEndsWith(tf_calls.device(), "/device:CPU:1")
        double = tf.function(lambda x: x * 2.0)
        (ran,) = record(lambda: double(tf.ones([3]))).functions
        self.assertIn("__inference", ran.name)
        body = tf_calls.body(tf_calls.definition(ran.name))
        self.assertEqual([n.op for n in body.node][:1], ["Placeholder"])
        self.assertIn("Mul", [n.op for n in body.node])

    def test_functions_and_their_arguments(self):
        variable = tf.Variable([1.0, 2.0])
        double = tf.function(lambda x: x * variable)
        triple = tf.function(lambda x: x + x + x)
        double(tf.ones([2]))  # it ran before
        for _ in range(2):
            ran = record(
                lambda: (
                    [double(tf.ones([2])) for _ in range(3)],
                    triple(tf.ones([5])),
                )
            )
            first, second = ran.functions
            self.assertLen(first.calls, 3)
            self.assertEqual([c[0].shape for c in first.calls], [[2]] * 3)
            self.assertEqual([c[0].shape for c in second.calls], [[5]])
            self.assertIs(ran.variables[0], variable)
            kinds = {node.op for node in first.graph.node}
            self.assertContainsSubset({"Mul", "ReadVariableOp"}, kinds)
            self.assertLen(first.partitions, 1)

    def test_variables_are_put_back_whatever_changes_them(self):
        old = tf.Variable([1.0, 2.0])
        untouched = tf.Variable(3.0)
        new: list[tf.Variable] = []

        @tf.function
        def add():
            old.assign_add([1.0, 1.0])

        def run():
            add()
            old.assign(old * 5.0)
            new.append(tf.Variable(7.0))
            new[0].assign(8.0)

        ran = record(run)
        self.assertEqual(old.numpy().tolist(), [1.0, 2.0])
        self.assertEqual(new[0].numpy(), 7.0)
        self.assertFalse(any(v is untouched for v in ran.variables))
        with self.assertRaisesRegex(ValueError, "after"):

            def fail():
                add()
                raise ValueError("after")

            record(fail)
        self.assertEqual(old.numpy().tolist(), [1.0, 2.0])
        options = tf.config.optimizer.get_experimental_options()
        self.assertEqual(options.get("min_graph_nodes", 0), 0)

    def test_batches_are_noted_and_passed_on(self):
        for structure in (tf.range(5), (tf.range(5),), {"a": tf.range(5)}):
            data = tf.data.Dataset.from_tensor_slices(structure).batch(3)
            given: list = []
            ran = record(functools.partial(given.extend, data))
            tf.nest.map_structure(
                lambda x, y: self.assertEqual(
                    x.numpy().tolist(), y.numpy().tolist()
                ),
                given,
                list(data),
            )
            (batches,) = ran.batches
            self.assertCountEqual(batches.elements, [((3,),), ((2,),)])

    def test_a_call_inside_a_graph_is_refused(self):
        @tf.function
        def inside():
            record(lambda: None)

        with self.assertRaisesRegex(RuntimeError, "eager call"):
            inside()


if __name__ == "__main__":
    absltest.main()
