"""tf_profiler: what TensorFlow's profiler says, by the names that we know."""

import collections
import os
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
        # When it stops, each thread may have one thing left to tell.
        runs = 2 + (os.cpu_count() or 1)
        with tf_profiler.profiled() as heard:
            for _ in range(runs):
                crossing(x)
        named = collections.defaultdict(list)
        for event in heard.events:
            named[event.name].append(event)
        there = named["there:MatMul"]
        self.assertLen(there, runs)
        around = []
        for op in there:
            self.assertBetween(heard.began + op.start, start, time.time())
            self.assertGreater(op.seconds, 0)
            around += [
                e
                for e in named[tf_profiler.PROCESS]
                if e.thread == op.thread
                and e.start <= op.start < e.start + e.seconds
            ]
        self.assertBetween(len(around), 1, runs)
        kinds = {name.rpartition(":")[2] for name in named}
        self.assertNotEmpty(kinds & set(tf_nodes.SENDS))
        of_executor, of_receive = tf_profiler.RUN
        for event in around:
            self.assertIn(tf_profiler.EXECUTOR, event.stats)
            self.assertIn(of_executor, event.stats)
        asked, came = (
            {(e.stats[of_receive], e.stats[tf_profiler.NODE]): e for e in some}
            for some in (named[tf_profiler.ISSUED], named[tf_profiler.ARRIVED])
        )
        self.assertLen(asked, runs)
        self.assertNotEmpty(came)
        for which, event in came.items():
            self.assertLess(asked[which].start, event.start)

    def test_a_mark_that_took_long_does_not_tell_when_it_started(self):
        def mark(start):
            return tf_profiler.Event("", 1, tf_profiler._MARK, start, 0.0, {})

        asked = [(100.0, 103.0), (103.0, 103.25)]
        events = [mark(5.0), mark(4.0)]
        self.assertEqual(tf_profiler._began(asked, events), 98.0)

    def test_there_is_one_profiler_only(self):
        with tf_profiler.profiled():
            with self.assertRaisesRegex(RuntimeError, "runs already"):
                with tf_profiler.profiled():
                    pass
