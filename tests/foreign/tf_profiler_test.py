"""tf_profiler: what TensorFlow's profiler says, by the names that we know."""

import time

import tensorflow as tf
from absl.testing import absltest
from models import DEVICES

from towers.foreign import tf_nodes, tf_profiler


@tf.function
def crossing(x):
    with tf.device(DEVICES[1]):
        return tf.matmul(x, x, name="there")


class ProfiledTest(absltest.TestCase):
    def test_executors_tell_of_ops_sends_and_receives(self):
        with tf.device(DEVICES[0]):
            x = tf.ones([4, 4])
        crossing(x)
        start = time.time()
        with tf_profiler.profiled() as heard:
            crossing(x)
        events = heard.events
        named = {e.name: e for e in events}
        self.assertIn("there:MatMul", named)
        there = named["there:MatMul"]
        self.assertBetween(heard.began + there.start, start, time.time())
        self.assertGreater(there.seconds, 0)
        process = [e for e in events if e.name == tf_profiler.PROCESS]
        around = [
            e
            for e in process
            if e.thread == there.thread
            and e.start <= there.start < e.start + e.seconds
        ]
        self.assertLen(around, 1)
        self.assertIn(tf_profiler.EXECUTOR, around[0].stats)
        kinds = {e.name.rpartition(":")[2] for e in events}
        self.assertNotEmpty(kinds & set(tf_nodes.SENDS))
        asked, came = named[tf_profiler.ISSUED], named[tf_profiler.ARRIVED]
        self.assertEqual(
            asked.stats[tf_profiler.NODE], came.stats[tf_profiler.NODE]
        )
        self.assertLess(asked.start, came.start)
        for event, key in zip((around[0], asked), tf_profiler.RUN):
            self.assertIn(key, event.stats)

    def test_there_is_one_profiler_only(self):
        with tf_profiler.profiled():
            with self.assertRaisesRegex(RuntimeError, "runs already"):
                with tf_profiler.profiled():
                    pass
