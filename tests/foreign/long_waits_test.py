"""long_waits: who waits for long is told for what, and nobody else."""

import contextlib
import io
import threading
import types
from unittest import mock

import keras
import tensorflow as tf
from absl.testing import absltest
from cluster_workers import wait_until
from models import chain, make, placement

import towers
from towers.foreign import long_waits


@contextlib.contextmanager
def soon():
    """Who waits is told at once; what is said."""
    said = io.StringIO()
    with (
        mock.patch.object(long_waits, "SECONDS", 0.001),
        contextlib.redirect_stderr(said),
    ):
        yield said


class LongWaitsTest(absltest.TestCase):
    def test_what_takes_long_is_told_ever_less_often(self):
        clock, said = [0.0], io.StringIO()

        def wait(pause):
            """Whether it has ended, after so many seconds; after a minute."""
            clock[0] += pause
            return clock[0] > 60

        threads = types.SimpleNamespace(
            Event=lambda: mock.Mock(wait=wait), Thread=threading.Thread
        )
        times = types.SimpleNamespace(monotonic=lambda: clock[0])
        with (
            mock.patch.multiple(long_waits, threading=threads, time=times),
            contextlib.redirect_stderr(said),
            long_waits.announced("counting sheep"),
        ):
            pass
        self.assertEqual(
            said.getvalue().splitlines(),
            [
                f"towers: counting sheep ({seconds} s so far)"
                for seconds in (5, 15, 35)
            ],
        )

    def test_what_is_quick_is_not(self):
        said = io.StringIO()
        with contextlib.redirect_stderr(said), long_waits.announced("a moment"):
            pass
        self.assertEqual(said.getvalue(), "")

    def test_it_is_logged_where_keras_logs(self):
        keras.config.disable_interactive_logging()
        self.addCleanup(keras.config.enable_interactive_logging)
        with soon() as said, self.assertLogs("absl", "INFO") as heard:
            with long_waits.announced("counting sheep"):
                wait_until(lambda: heard.output)
        self.assertIn("counting sheep", heard.output[0])
        self.assertEqual(said.getvalue(), "")

    def test_who_waits_for_towers_or_for_a_report(self):
        model = make(lambda: chain([2], keras.layers.Dense(2), name="net"))

        @tf.function
        def step(x):
            return towers.build_towers(model, x, placement(4)).outputs

        with soon() as said:
            towers.execution_report(step, tf.ones([4, 2]))
        self.assertIn("towers: building 4 towers of net (", said.getvalue())
        self.assertIn("towers: running step for a report (", said.getvalue())
