"""recording: what ran is kept, what it changed is put back."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from tensorflow.python.eager import context

from towers.foreign import tf_calls
from towers.report.recording import record


def record_all(data):
    """What a dataset gives while that is recorded."""
    given: list = []
    record(lambda: given.extend(data))
    return given


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
        body = tf_calls.graph_def_of(tf_calls.definition(ran.name))
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

    def test_variables_of_a_function_are_put_back_to_their_first_values(self):
        results: list[tf.Variable] = []

        @tf.function
        def step(x):
            if not results:
                results.append(tf.Variable([2.0, 3.0]))
                results.append(tf.Variable(tf.constant([4.0, 6.0])))
            for variable in results:
                variable.assign_add(x)
            return results[0] + results[1]

        record(lambda: (step(tf.ones([2])), step(tf.ones([2]))))
        self.assertEqual(results[0].numpy().tolist(), [2, 3])
        self.assertEqual(results[1].numpy().tolist(), [4, 6])
        self.assertEqual(step(tf.ones([2])).numpy().tolist(), [8, 11])

        @tf.function
        def given(x):
            if len(results) < 3:
                results.append(tf.Variable(x, name="first"))
            results[2].assign_add(x)
            return results[2] * 1.0

        with self.assertWarnsRegex(UserWarning, "first:0, stay as .*once befo"):
            record(lambda: given(tf.ones([2])))

    def test_seeds_in_datasets_are_put_back(self):
        noise = keras.layers.GaussianNoise(1.0, seed=3)
        data = tf.data.Dataset.from_tensor_slices(tf.zeros([6, 2])).batch(2)
        data = data.map(lambda x: noise(x, training=True)).prefetch(1)
        measured = [x.numpy() for x in record_all(data)]
        np.testing.assert_array_equal(measured, [x.numpy() for x in data])

    @pytest.mark.rare
    def test_batches_are_noted_and_passed_on(self):
        ragged = tf.RaggedTensor.from_row_lengths(tf.range(9), [2, 0, 4, 3, 0])
        left_out = tf.data.Dataset.from_tensor_slices(tf.range(4)).batch(2)
        left_out = left_out.map(
            lambda x: (x, tf.experimental.Optional.empty(None))
        )
        for x, nothing in record_all(left_out):
            self.assertEqual(x.shape, [2])
            self.assertIsInstance(nothing, tf.experimental.Optional)
        self.assertEqual(
            [
                x.to_list()
                for x in record_all(
                    tf.data.Dataset.from_tensor_slices(ragged).ragged_batch(3)
                )
            ],
            [[[0, 1], [], [2, 3, 4, 5]], [[6, 7, 8], []]],
        )
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
