"""tf_gradients: gradients of our own, which keep no graph alive."""

import gc

import models
import pytest
import tensorflow as tf
from absl.testing import parameterized
from tensorflow.python.framework import ops

import towers
from towers.foreign.tf_gradients import (
    accessed,
    kept_apart,
    own_gradient,
    own_gradient_of_each,
    recorded,
)


def graphs() -> list[str]:
    """The names of all that there are; of those of no function ""."""
    gc.collect()
    there = [x for x in gc.get_objects() if isinstance(x, tf.Graph)]
    return [getattr(x, "name", "") for x in there]


def held() -> tuple[int, int]:
    """How many graphs there are, and gradients by name."""
    return len(graphs()), len(ops.gradient_registry.list())


class OwnGradientTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("cnn", models.cnn), ("recurrent", models.recurrent)
    )
    @pytest.mark.slow(of=["recurrent"])
    def test_graphs_are_freed(self, model):
        model = models.make(model)
        x = models.inputs(model, 5)

        def build():
            towers.build_towers(model, x, models.placement(2))

        def differentiate():
            @tf.function
            def step(x):
                with tf.GradientTape() as tape:
                    graph = towers.build_towers(model, x, models.placement(2))
                    loss = sum(
                        tf.reduce_sum(y) for y in tf.nest.flatten(graph.outputs)
                    )
                return tape.gradient(loss, model.trainable_variables)

            step(x)

        for call in (build, differentiate):
            call()
            self.assert_no_more_is_held_after(call)

    def test_calls_without_results_are_freed(self):
        nothing = own_gradient(lambda x: ([], lambda *g: [None]))

        def trace():
            tf.function(lambda x: nothing(x) or x, autograph=False)(tf.ones([]))

        trace()
        self.assert_no_more_is_held_after(trace)

    def assert_no_more_is_held_after(self, call):
        """Of what others left some may go meanwhile."""
        before = held()
        call()
        for now, then in zip(held(), before):
            self.assertLessEqual(now, then)

    @parameterized.named_parameters(
        ("eager", "eager"), ("nested", "nested"), ("loop", "loop")
    )
    @pytest.mark.slow(of=["loop"])
    def test_gradients_outlive_the_function_that_built_them(self, way):
        model = models.make(models.cnn)
        x = models.inputs(model, 5)

        def outputs(x):
            def towered(x):
                return towers.build_towers(
                    model, x, models.placement(2)
                ).outputs

            if way == "eager":
                return towered(x)
            if way == "nested":
                return tf.function(towered, autograph=False)(x)
            return tf.while_loop(
                lambda i, y: i < 2,
                lambda i, y: (i + 1, y + towered(x)),
                (0, tf.zeros([5, 3])),
                maximum_iterations=2,
            )[1]

        run = outputs if way == "eager" else tf.function(outputs)
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_sum(run(x) ** 2)
        gc.collect()
        actual = tape.gradient(loss, model.trainable_variables)
        del run
        gc.collect()
        again = tape.gradient(loss, model.trainable_variables)
        with tf.GradientTape() as tape:
            times = 2 if way == "loop" else 1
            loss = tf.reduce_sum((times * model(x)) ** 2)
        expected = tape.gradient(loss, model.trainable_variables)
        models.close(actual, expected)
        models.close(again, expected)

    def test_plain_custom_gradient_keeps_them(self):
        """What this file is for: gone when TensorFlow frees them itself."""

        def trace(decorator):
            @tf.function
            def doubled(x):
                return decorator(lambda x: (x * 2, lambda g: g * 2))(x)

            doubled(tf.ones([]))

        def kept(decorator):
            before = graphs().count("doubled")
            for _ in range(3):
                trace(decorator)
            return graphs().count("doubled") - before

        self.assertLess(kept(own_gradient), 2)
        self.assertGreater(kept(tf.custom_gradient), 2)

    def test_whether_anything_listens(self):
        said = []

        @tf.function
        def trace(x):
            said.append(recorded())
            with tf.GradientTape() as tape:
                said.append(recorded())
                with tape.stop_recording():
                    said.append(recorded())
            said.append(recorded())
            with tf.autodiff.ForwardAccumulator(x, x):
                said.append(recorded())
            said.append(recorded())

        trace(tf.ones([]))
        self.assertEqual(said, [False, True, False, False, True, False])

    def test_kept_apart(self):
        """The same tensor to all who differentiate, and one that has an op."""

        @tf.function
        def run(x):
            with tf.autodiff.ForwardAccumulator(x, x) as accumulator:
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    y = kept_apart(x) ** 3
                slope = kept_apart(tape.gradient(y, x))
            (by_graph,) = tf.gradients(y, x)
            return y, slope, by_graph, accumulator.jvp([y, slope])

        x = tf.constant([2.0, 3.0])
        y, slope, by_graph, forwards = run(x)
        models.close([y, slope, by_graph], [x**3, 3 * x**2, 3 * x**2])
        models.close(forwards, [3 * x**3, 6 * x**2])
        graph = run.get_concrete_function(x).graph
        kinds = [op.type for op in graph.get_operations()]
        self.assertEqual(kinds.count("EnsureShape"), 2)
        self.assertNotIn("IdentityN", kinds)

    def test_no_zeros_are_made_for_arguments(self):
        def zeros(decorator):
            def double(x, y):
                return x * 2, lambda g: [g * 2, None]

            @tf.function
            def f(x, y):
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    z = decorator(double)(x, y)
                return tape.gradient(z, x)

            traced = f.get_concrete_function(*[tf.ones([3])] * 2)
            self.assertEqual(f(*[tf.ones([3])] * 2).numpy().tolist(), [2] * 3)
            kinds = [op.type for op in traced.graph.get_operations()]
            return len(kinds) - kinds.count("Const")

        # What this file is for: as many when TensorFlow makes none either.
        self.assertLess(zeros(own_gradient), zeros(tf.custom_gradient))

    @parameterized.parameters(True, False)
    def test_each_of_several_has_a_gradient_of_its_own(self, by_tape):
        asked = []

        def backward(k, upstream):
            asked.append(k)
            return upstream * 10.0

        @tf.function(autograph=False)
        def step(x, y):
            with tf.GradientTape() as tape:
                tape.watch([x, y])
                double = own_gradient_of_each(
                    lambda both: [2.0 * z for z in both], backward, [x, y]
                )[1]
            if by_tape:
                return double, tape.gradient(double, y)
            return double, tf.compat.v1.gradients(double, y)[0]

        double, gradient = step(tf.constant(3.0), tf.constant(4.0))
        self.assertEqual((float(double), float(gradient)), (8.0, 10.0))
        self.assertEqual(asked, [1])  # a tape makes no zeros for the other

    def test_variables_are_told_to_the_gradient(self):
        variable = tf.Variable(3.0)
        told = []

        @own_gradient
        def times(x):
            def backward(g, variables):
                told.extend(variables)
                return g * variable

            return x * variable, backward

        @tf.function
        def f(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = times(x)
            return tape.gradient(y, x)

        self.assertEqual(float(f(tf.constant(2.0))), 3.0)
        self.assertEqual([v.ref() for v in told], [variable.ref()])

    def test_a_variable_that_is_not_read_has_a_gradient(self):
        variable = tf.Variable(tf.ones([3]))
        twice = own_gradient(lambda _: (tf.zeros([]), lambda g: g * [2, 2, 2]))

        @tf.function
        def f():
            with tf.GradientTape() as tape:
                accessed(variable)
                y = twice(variable.handle)
            return tape.gradient(y, variable)

        self.assertEqual(f().numpy().tolist(), [2, 2, 2])

    def test_what_is_elsewhere_is_not_taken_along(self):
        """Whoever differentiates by the graph finds it all the same."""
        v1 = tf.compat.v1

        def rows(x, table):
            found = tf.gather(table, [1, 1])
            sparse = tf.IndexedSlices(tf.ones([2, 3]), [1, 1], [4, 3])
            return x * found, lambda g: [g * found, sparse]

        with tf.Graph().as_default(), v1.Session() as session:
            with tf.device("/CPU:2"):
                table = tf.ones([4, 3])
            x = tf.ones([2, 3])
            with tf.device("/CPU:1"):
                y = own_gradient(rows, {1: "/CPU:2"})(x, table)
            dx, dtable = v1.gradients(y, [x, table])
            self.assertIsInstance(dtable, tf.IndexedSlices)
            for found in session.run([dx, dtable.values]):
                self.assertEqual(found.tolist(), [[1, 1, 1]] * 2)
        stand_in = y.op.inputs[2]
        self.assertIn("CPU:2", stand_in.op.device)
        self.assertIn("CPU:2", stand_in.op.inputs[1].device)
        self.assertIsNot(stand_in, table)

    def test_a_gradient_after_its_graph_says_what_to_do(self):
        double = own_gradient(lambda x: (x * 2, lambda g: g * 2))
        graph = tf.Graph()
        with graph.as_default():
            op = double(tf.ones([])).op
            name = op.get_attr("_gradient_op_type")
            gradient = ops.gradient_registry.lookup(name)
            self.assertIsNotNone(gradient(op, tf.ones([]), tf.ones([])))
        with tf.Graph().as_default():
            other = tf.ones([]).op
        del graph, op
        gc.collect()
        self.assertNotIn(name.decode(), ops.gradient_registry.list())
        with self.assertRaisesRegex(RuntimeError, "Keep the tf.function"):
            gradient(other, None)
