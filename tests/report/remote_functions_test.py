"""remote_functions: what ran whole in another process is told, or refused."""

import tensorflow as tf
from absl.testing import absltest

from towers.foreign import tf_calls, tf_kernels
from towers.report.partitions import Partitions
from towers.report.recording import Ran
from towers.report.remote_functions import remote, remote_partitions

JOB = "/job:worker/replica:0/task:"
ONE, OTHER = f"{JOB}0/device:CPU:0", f"{JOB}1/device:CPU:0"
GPU = f"{JOB}1/device:GPU:0"


def parts(function, *args, device=OTHER, sources):
    traced = tf.function(function).get_concrete_function(*args)
    definition = tf_calls.definition(traced.name)
    given = [*args, *traced.captured_inputs]
    return Ran("", *remote_partitions(definition, device, sources), [given])


class PartsTest(absltest.TestCase):
    def test_a_device_of_this_process_is_none(self):
        self.assertEqual(remote(""), "")
        self.assertEqual(remote("/job:localhost/replica:0/task:0/CPU:1"), "")
        self.assertEqual(remote(OTHER), OTHER)

    def test_all_is_there_and_arguments_go_there(self):
        def branched(x, y):
            return tf.cond(x[0] > 0, lambda: tf.nn.relu(y), lambda: y + x)

        x, y = tf.ones([3]), tf.ones([2, 3])
        ran = parts(branched, x, y, sources=["/CPU:0", OTHER])
        executed = Partitions(ran)
        self.assertEqual({d for d, _, _ in executed.nodes}, {OTHER})
        kinds = [kind for _, _, kind in executed.nodes]
        self.assertContainsSubset({"Relu", "AddV2"}, kinds)  # in functions
        (sent,) = executed.transfers([])
        self.assertEqual((sent.source, sent.target), ("/CPU:0", OTHER))
        self.assertEqual((sent.shape, sent.bytes), ((3,), 12))

    def test_a_function_of_several_places_is_refused(self):
        variable = tf.Variable(1.0)

        def elsewhere(x):
            with tf.device(ONE):
                return x + 1.0

        for function, source, words in (
            (elsewhere, [OTHER], f"'add/y' is for {ONE}"),
            (
                lambda x: x + variable,
                [OTHER, "/CPU:0"],
                "variable .* on /CPU:0",
            ),
        ):
            with self.assertRaisesRegex(RuntimeError, words):
                parts(function, tf.constant(1.0), sources=source)

    def test_on_a_gpu_is_what_has_a_kernel_there(self):
        if not tf_kernels.knows_gpus():
            self.skipTest("This TensorFlow has no kernels for GPUs.")
        x = tf.ones([3])
        ran = parts(lambda x: x * 2.0, x, device=GPU, sources=[GPU])
        self.assertEqual({d for d, _, _ in Partitions(ran).nodes}, {GPU})
        with self.assertRaisesRegex(RuntimeError, "'AsString' has no kernel"):
            parts(tf.strings.as_string, x, device=GPU, sources=[GPU])
