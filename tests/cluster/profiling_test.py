"""profiling: a worker tells what it ran, told by one in this process."""

import socket

import tensorflow as tf
from absl.testing import absltest
from cluster_workers import free_ports
from models import DEVICES

from towers.cluster import profiling
from towers.cluster.heartbeat import Heartbeat, Line, Refused
from towers.foreign.tf_profiler import profiled


@tf.function
def product(x):
    with tf.device(DEVICES[1]):
        return tf.matmul(x, x, name="there")


class ProfilingTest(absltest.TestCase):
    def line(self, profile):
        (port,) = free_ports(1)
        beat = Heartbeat("127.0.0.1", port, {}, lambda why: None, profile)
        beat.start()
        self.addCleanup(beat.server_close)
        self.addCleanup(beat.shutdown)
        connection = socket.create_connection(("127.0.0.1", port), 20)
        line = self.enter_context(Line(connection, 20))
        line.ask(hello=1, chief="test")
        return line

    def test_what_ran_between_start_and_stop(self):
        line = self.line(profiling.tell)
        x = tf.ones([4, 4])
        product(x)
        self.assertEqual(profiling._ahead(line), 0.0)  # the same clock
        self.assertIn("started", line.ask(profile=True))
        product(x)
        events = profiling._collected(line, "/job:worker/replica:0/task:3", 0.0)
        ran = [e for e in events if e.name == "there:MatMul"]
        self.assertLen(ran, 1)
        self.assertEqual(ran[0].process, "/job:worker/replica:0/task:3")
        self.assertIn("pong", line.ask(ping=1))  # the line goes on

    def test_one_that_cannot(self):
        with profiled():
            self.assertIn("trouble", self.line(profiling.tell).ask(profile=1))
        old = self.line(None)
        self.assertNotIn("started", old.ask(profile=True))
        with self.assertRaises(Refused):
            profiling._collected(old, "", 0.0)

    def test_clocks_that_differ(self):
        class Ahead:
            def ask(self, ping):
                return {"time": profiling.time.time() + 7}

        self.assertAlmostEqual(profiling._ahead(Ahead()), 7, places=2)
