"""gather: merge rules, and what an empty tower says."""

import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from models import placement
from two_machines import between_machines, in_machines

import towers


class GatherTest(parameterized.TestCase):
    @parameterized.parameters(
        ("concat", [1.0, 2.0, 5.0]),
        ("none", [[1.0, 2.0], [5.0]]),
    )
    def test_rows_are_joined(self, merge, expected):
        parts = [tf.constant([1.0, 2.0]), tf.constant([5.0])]
        merged = towers.gather_outputs(parts, placement(2), merge)
        merged = tf.nest.map_structure(lambda x: x.numpy().tolist(), merged)
        self.assertEqual(merged, expected)

    @parameterized.parameters(("mean", 2.0), ("sum", 5.0), ("stack", [1, 4]))
    def test_scalars_are_merged(self, merge, expected):
        parts = [tf.constant(1.0), tf.constant(4.0)]
        merged = towers.gather_outputs(parts, placement(2), merge, rows=[2, 1])
        np.testing.assert_allclose(merged, expected)

    @parameterized.parameters(("mean", 4.0), ("sum", 4.0), ("stack", [0, 4]))
    def test_an_empty_tower_counts_for_nothing(self, merge, expected):
        bad = tf.Variable(np.nan)
        with tf.GradientTape() as tape:
            parts = [tf.sqrt(bad), tf.constant(4.0)]
            merged = towers.gather_outputs(
                parts, placement(2), merge, rows=[0, 1]
            )
        np.testing.assert_allclose(merged, expected)
        del tape

    def test_a_nest_of_rules(self):
        part = {"a": tf.ones([2]), "b": [tf.constant(3.0), tf.ones([1])]}
        merged = towers.gather_outputs(
            [part, part], placement(2), {"a": "concat", "b": ["sum", "stack"]}
        )
        self.assertEqual(merged["a"].shape, [4])
        self.assertEqual(merged["b"][0].numpy(), 6)
        self.assertEqual(merged["b"][1].shape, [2, 1])

    def test_gradient_of_a_mean_is_weighted(self):
        a, b = tf.Variable(1.0), tf.Variable(2.0)
        with tf.GradientTape() as tape:
            merged = towers.gather_outputs(
                [a * 1, b * 1], placement(2), "mean", rows=[3, 1]
            )
        np.testing.assert_allclose(tape.gradient(merged, [a, b]), [0.75, 0.25])

    def test_what_is_merged_in_any_order_crosses_once_from_each_machine(self):
        places = ["/CPU:1", "/CPU:2", "/CPU:1", "/CPU:0", "/CPU:3"]
        where = towers.Placement(places, output_device="/CPU:0")
        counts, values = [2, 1, 0, 3, 2], [1.0, 2.0, np.nan, 4.0, 6.0]
        rules = {"mean": "mean", "sum": "sum", "stack": "stack"}

        @tf.function
        def merged(x, rows):
            each = []
            for i, place in enumerate(places):
                with tf.device(place):
                    y = tf.sin(x[i])
                    each.append({"mean": y, "sum": 2 * y, "stack": y})
            return towers.gather_outputs(each, where, rules, rows)

        @tf.function
        def gradient(x, rows):
            with tf.GradientTape() as tape:
                tape.watch(x)
                both = merged(x, rows)
                loss = both["mean"] * 5 + both["sum"]
            return tape.gradient(loss, x)

        given = tf.constant(values), tf.constant(counts)
        with in_machines():
            result, slopes = merged(*given), gradient(*given)
            report = towers.execution_report(merged, *given)
        shares, y = np.divide(counts, 8), np.nan_to_num(np.sin(values))
        np.testing.assert_allclose(result["mean"], shares @ y, rtol=1e-6)
        np.testing.assert_allclose(result["sum"], 2 * y.sum(), rtol=1e-6)
        expected = (5 * shares + 2) * np.cos(values)
        full = np.array(counts) > 0
        np.testing.assert_allclose(slopes[full], expected[full], rtol=1e-6)
        # What is stacked comes from each tower.
        crossed = between_machines(report)
        self.assertEqual(crossed["b", "a"], 4 * (1 + 1 + 3))

    @parameterized.named_parameters(
        ("rule", [1.0, 2.0], dict(merge="max"), ValueError, "unknown rule"),
        ("mean", [1.0, 2.0], dict(merge="mean"), ValueError, "rows"),
        ("scalar", [1.0, 2.0], dict(), ValueError, "scalar"),
        ("number", [[1.0]], dict(), ValueError, "each of the 2 towers"),
        ("kind", 1.0, dict(), TypeError, "list of one nest"),
        ("structure", [[1.0], 1.0], dict(), ValueError, "one structure"),
        ("nest", [[1.0]] * 2, dict(merge={"a": "sum"}), ValueError, "nest"),
        ("rows", [1.0] * 2, dict(merge="sum", rows=[1]), ValueError, "`rows`"),
        ("columns", [np.ones([2, n]) for n in (1, 2)], {}, ValueError, "after"),
        (
            "sizes",
            [[1.0], np.ones([2])],
            dict(merge="sum"),
            ValueError,
            "one s",
        ),
        ("ragged", [tf.ragged.constant([[1]])] * 2, {}, TypeError, "be dense"),
        ("flags", [True] * 2, dict(merge="sum"), ValueError, "dtype bool"),
        ("ints", [1] * 2, dict(merge="mean", rows=[1, 1]), ValueError, "dtype"),
    )
    def test_bad_arguments_are_refused(self, parts, kwargs, error, message):
        with self.assertRaisesRegex(error, message):
            towers.gather_outputs(parts, placement(2), **kwargs)

    def test_a_tensor_that_is_there_twice_gets_its_gradient_once(self):
        x = tf.Variable([1.0, 2.0])

        @tf.function
        def run():
            with tf.GradientTape() as tape:
                y = tf.identity(x)
                outputs = towers.gather_outputs([y, y, y], placement(3))
                loss = tf.reduce_sum(outputs)
            return tape.gradient(loss, x)

        np.testing.assert_array_equal(run(), [3.0, 3.0])
