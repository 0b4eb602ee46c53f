"""partitions: what one function sent, and where it came from."""

import tensorflow as tf
from absl.testing import absltest

from towers.report.partitions import Partitions, Transfer
from towers.report.recording import record


def partitions(function, *args):
    recording = record(lambda: tf.function(function)(*args))
    (ran,) = recording.functions
    executed = Partitions(ran)
    crossings = executed.crossings(recording.batches)
    return executed, [t for t, _ in crossings], [v for _, v in crossings]


class PartitionsTest(absltest.TestCase):
    def test_nodes_are_where_they_ran(self):
        def both(x):
            with tf.device("/CPU:1"):
                y = tf.matmul(x, x)
            with tf.device("/CPU:2"):
                return tf.nn.softmax(y)

        executed, (one, two), _ = partitions(both, tf.ones([3, 3]))
        kinds = {kind: device for device, _, kind in executed.nodes}
        self.assertEqual(kinds, {"MatMul": "/CPU:1", "Softmax": "/CPU:2"})
        self.assertEqual((one.bytes, two.bytes), (36, 36))

    def test_a_value_that_is_passed_on_is_the_one_it_was(self):
        def around(x):
            with tf.device("/CPU:1"):
                y = tf.exp(x)
            with tf.device("/CPU:2"):
                z = tf.sin(y)
            with tf.device("/CPU:3"):
                return z + tf.cos(y)

        _, transfers, values = partitions(around, tf.ones([3]))
        origins = [origin for each in values for origin in each]
        by = {(t.source, t.target): o for t, o in zip(transfers, origins)}
        # exp(x) goes to devices 2 and 3: one value, two transfers.
        self.assertEqual(by["/CPU:1", "/CPU:2"], by["/CPU:1", "/CPU:3"])
        self.assertEqual(by["/CPU:1", "/CPU:2"][1], "/CPU:1")

    def test_values_are_told_apart_that_are_joined_for_their_way(self):
        def there_and_back(x):
            with tf.device("/CPU:0"):
                values = [tf.exp(x), tf.sin(x)]
                parcel = tf.concat([tf.reshape(v, [-1]) for v in values], 0)
            with tf.device("/CPU:1"):
                one, other = tf.split(parcel, [6, 6])
                y = tf.reshape(one, [2, 3]) * values[0]  # once more, alone
            with tf.device("/CPU:2"):
                return y + tf.reshape(other, [2, 3])

        _, transfers, values = partitions(there_and_back, tf.ones([2, 3]))
        results = [
            ((t.source, t.target, t.bytes), v)
            for t, v in zip(transfers, values)
        ]
        (parcel,) = [v for t, v in results if t == ("/CPU:0", "/CPU:1", 48)]
        (alone,) = [v for t, v in results if t == ("/CPU:0", "/CPU:1", 24)]
        passed_on = [v for t, v in results if t[:2] == ("/CPU:1", "/CPU:2")]
        self.assertEqual(list(parcel.values()), [24, 24])
        exp, sin = parcel
        self.assertEqual(alone, {exp: 24})
        self.assertIn({sin: 24}, passed_on)

    def test_waiting_for_another_device_carries_nothing(self):
        with tf.device("/CPU:1"):
            variable = tf.Variable(1.0)

        def wait(x):
            with tf.device("/CPU:1"):
                variable.assign_add(1.0)
            with tf.device("/CPU:0"):
                tf.print("", end="")
                return x + 1.0

        _, transfers, _ = partitions(wait, tf.ones([3]))
        self.assertEqual({t.bytes for t in transfers} - {0}, set())

    def test_bytes(self):
        transfer = Transfer("/CPU:0", "/CPU:1", "x", tf.float16, (3, 5), 2)
        self.assertEqual(transfer.bytes, 2 * 2 * 15)
        for shape, times in ((None, 1), ((3,), None)):
            unknown = Transfer("a", "b", "x", tf.float16, shape, times)
            self.assertIsNone(unknown.bytes)
