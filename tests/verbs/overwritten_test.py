"""overwritten: the maximum of what towers say that have rows and a gradient."""

import math

import tensorflow as tf
from absl.testing import parameterized
from two_machines import between_machines, in_machines

import towers
from towers.verbs.overwritten import replicate_overwritten
from towers.verbs.rows import Rows

HOME = "/CPU:0"
PLACES = ["/CPU:1", "/CPU:2", "/CPU:1", HOME, "/CPU:3"]
# The second machine's are below zero; what may be empty says more than others.
SAID = [-3.0, -2.0, 9.0, -4.0, -6.0]
OLD = 5.0  # above all that counts
SHAPES = [(), (2, 3), (4,)]


class OverwrittenTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        [[[0, 1, 2, 3, 4]]],
        [[[0, 2]]],
        [[[2, 3, 4]]],
        [[[2]]],
        [[[3]]],
        # Of several values: who has a gradient of which, of one nobody.
        [[[0, 1], [2, 3], [4]]],
        [[[3], [], [2]]],
    )
    def test_it_crosses_once_from_each_machine(self, heard):
        @tf.function
        def gradient(values, counts):
            rows = Rows(counts, [False, False, True, False, False])
            with tf.GradientTape() as tape:
                tape.watch(values)
                copies = replicate_overwritten(values, HOME, PLACES, rows.kept)
                terms = []
                for column, some in zip(copies, heard):
                    for i in some:
                        with tf.device(PLACES[i]):
                            terms.append(tf.reduce_sum(column[i]) * SAID[i])
                loss = tf.add_n(terms)
            return tape.gradient(loss, values)

        values = [tf.fill(shape, OLD) for shape, _ in zip(SHAPES, heard)]
        with in_machines():
            for full in (0, 1):
                counts = tf.constant([1, 1, full, 1, 1])
                result = gradient(values, counts)
                for some, x, value in zip(heard, result, values):
                    results = [SAID[i] for i in some if full or i != 2]
                    if some:
                        expected = max(results, default=OLD)
                        self.assertAllEqual(x, tf.fill(value.shape, expected))
                    else:
                        self.assertIsNone(x)
            report = towers.execution_report(gradient, values, counts)
        size = 4 * sum(math.prod(x.shape) for x in values)
        sent = between_machines(report).get(("b", "a"), 0)
        is_said = {0, 1, 2} & {i for some in heard for i in some}
        self.assertEqual(sent, size * bool(is_said))
