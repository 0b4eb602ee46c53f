"""overwritten: the maximum of what towers say that have rows and a gradient."""

import tensorflow as tf
from absl.testing import absltest, parameterized
from two_machines import between_machines, in_machines

import towers
from towers.verbs.overwritten import replicate_overwritten
from towers.verbs.rows import Rows

HOME = "/CPU:0"
PLACES = ["/CPU:1", "/CPU:2", "/CPU:1", HOME, "/CPU:3"]
# The second machine's are below zero; what may be empty says more than others.
SAID = [-3.0, -2.0, 9.0, -4.0, -6.0]
OLD = 5.0  # above all that counts


class OverwrittenTest(parameterized.TestCase):
    @parameterized.parameters(
        [[0, 1, 2, 3, 4]], [[0, 2]], [[2, 3, 4]], [[2]], [[3]]
    )
    def test_it_crosses_once_from_each_machine(self, heard):
        @tf.function
        def gradient(value, counts):
            rows = Rows(counts, [False, False, True, False, False])
            with tf.GradientTape() as tape:
                tape.watch(value)
                copies = replicate_overwritten(value, HOME, PLACES, rows.kept)
                terms = []
                for i in heard:
                    with tf.device(PLACES[i]):
                        terms.append(copies[i] * SAID[i])
                loss = tf.add_n(terms)
            return tape.gradient(loss, value)

        with in_machines():
            for full in (0, 1):
                counts = tf.constant([1, 1, full, 1, 1])
                found = gradient(tf.constant(OLD), counts)
                said = [SAID[i] for i in heard if full or i != 2]
                self.assertEqual(float(found), max(said, default=OLD))
            report = towers.execution_report(gradient, tf.constant(OLD), counts)
        sent = between_machines(report).get(("b", "a"), 0)
        self.assertEqual(sent, 4 * bool({0, 1, 2} & set(heard)))


if __name__ == "__main__":
    absltest.main()
