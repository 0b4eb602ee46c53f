"""tf_traces: a report within a trace of somebody else's leaves that on."""

import glob
import os
import tempfile

import tensorflow as tf
from absl.testing import absltest

import towers


class TracesTest(absltest.TestCase):
    def test_a_trace_goes_on_after_a_report(self):
        double = tf.function(lambda x: 2 * x)
        triple = tf.function(lambda x: tf.multiply(3.0, x, name="tripled"))
        folder = tempfile.mkdtemp()
        tf.summary.trace_on(graph=True)
        self.addCleanup(tf.summary.trace_off)
        report = towers.execution_report(double, tf.constant(1.0))
        self.assertEqual(report.ops["/CPU:0", "Mul"], 1)
        triple(tf.constant(1.0))
        with tf.summary.create_file_writer(folder).as_default() as writer:
            tf.summary.trace_export("theirs", 0)
            writer.flush()
        (path,) = glob.glob(os.path.join(folder, "*"))
        with open(path, "rb") as file:
            text = file.read()
        self.assertTrue(b"theirs" in text and b"tripled" in text)

    def test_none_is_begun(self):
        towers.execution_report(tf.function(lambda: tf.constant(1.0)))
        with self.assertRaisesRegex(ValueError, "Must enable trace"):
            tf.summary.trace_export("none", 0)
