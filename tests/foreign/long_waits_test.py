"""long_waits: who waits for long is told for what, and nobody else."""

import contextlib
import io
import time
from unittest import mock

import keras
import tensorflow as tf
from absl.testing import absltest
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
        with soon() as said, long_waits.announced("counting sheep"):
            time.sleep(0.1)
        lines = said.getvalue().splitlines()
        self.assertBetween(len(lines), 2, 7)  # 1, 2, 4 ... 64 ms apart
        self.assertEqual(lines[0], "towers: counting sheep (0 s so far)")

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
                time.sleep(0.05)
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
