"""profile: names that are on several devices, and how often loops send."""

import re

import tensorflow as tf
from absl.testing import absltest
from models import DEVICES

from towers.foreign.tf_profiler import ARRIVED, NODE, PROCESS, profiled
from towers.report.profile import profile, times_sent, union
from towers.report.recording import record

OP = re.compile(r"[^:]+:\w+")


def product(device):
    @tf.function
    def same_name(x):
        with tf.device(device):
            y = tf.matmul(x, x, name="product")
            return tf.nn.relu(y, name=f"only_{device[-1]}")

    return same_name


@tf.function
def loop(x, n):
    def step(i, x):
        with tf.device(DEVICES[1]):
            y = tf.nn.relu(x)
        with tf.device(DEVICES[0]):
            return i + 1, y + 1.0

    return tf.while_loop(lambda i, _: i < n, step, [0, x])[1]


def ran(call):
    found = []

    def listen():
        with profiled() as heard:
            call()
        found.extend(heard.events)

    functions = record(listen).functions
    return [g for f in functions for g in f.partitions], found


class ProfileTest(absltest.TestCase):
    def test_one_name_in_two_functions(self):
        there, here = product(DEVICES[1]), product(DEVICES[0])
        x = tf.ones([64, 64])
        found = profile(*ran(lambda: (there(x), here(x), there(x))))
        devices = [o.device for o in found.ops if o.name == "product"]
        # By the executor, which the other op tells.
        self.assertEqual(devices, [DEVICES[1], DEVICES[0], DEVICES[1]])

    def test_what_crossed_in_the_order_of_time(self):
        found = profile(*ran(lambda: loop(tf.ones([3]), 4)))
        self.assertEqual([o.kind for o in found.ops].count("Relu"), 4)
        back = [c for c in found.crossings if "Relu" in c.tensor]
        self.assertLen(back, 4)
        for c in back:
            self.assertEqual((c.source, c.target), (DEVICES[1], DEVICES[0]))
            self.assertLessEqual(c.asked, c.arrived)
            self.assertLessEqual(c.sent, c.arrived)

    def test_times_in_a_loop(self):
        for n in (1, 5):
            times = times_sent(*ran(lambda n=n: loop(tf.ones([3]), n)))
            # There and back, and the condition, which is asked once more.
            self.assertEqual(sorted(times.values()), [n, n, n + 1])

    def test_what_the_profiler_stopped_too_early_for(self):
        """An executor that has not left its thread, a receive not answered."""
        x = tf.ones([64, 64])
        for call in (lambda: product(DEVICES[1])(x), lambda: loop(x, 3)):
            graphs, events = ran(call)
            whole = profile(graphs, events)
            self.assertNotEmpty(whole.crossings)
            ended = {}
            for e in sorted(events, key=lambda e: e.start + e.seconds):
                if e.name == PROCESS:
                    ended[e.thread] = e
                elif e.name == ARRIVED:
                    ended[e.stats[NODE]] = e
                elif OP.fullmatch(e.name):
                    # Not within it: the thread's last one is missing already.
                    ended.pop(e.thread, None)
            for one in [[e] for e in ended.values()] + [[*ended.values()]]:
                heard = [e for e in events if e not in one]
                cut = profile(graphs, heard)
                self.assertCountEqual(cut.ops, whole.ops)
                self.assertCountEqual(
                    [(c.target, c.tensor, c.sent) for c in cut.crossings],
                    [(c.target, c.tensor, c.sent) for c in whole.crossings],
                )
                self.assertEqual(
                    times_sent(graphs, heard), times_sent(graphs, events)
                )

    def test_union(self):
        self.assertEqual(
            union([(3, 4), (0, 1), (1, 2), (0.5, 1.5)]), [(0, 2), (3, 4)]
        )
