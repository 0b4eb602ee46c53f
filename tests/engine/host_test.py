"""host: whose host a device has, and the scope of what is there."""

import tensorflow as tf
from absl.testing import parameterized

from towers.engine import host


class HostTest(parameterized.TestCase):
    @parameterized.parameters(
        ("/GPU:1", "/device:CPU:0"),
        ("/CPU:2", "/CPU:2"),
        ("", ""),
        (
            "/job:worker/task:1/device:GPU:0",
            "/job:worker/task:1/device:CPU:0",
        ),
    )
    def test_the_host_of_a_device(self, device, expected):
        self.assertEqual(host.host_of(device), expected)

    def test_the_scope_and_the_device(self):
        with tf.Graph().as_default(), tf.device("/GPU:1"):
            with tf.name_scope("tower_1"), host.on_host("/GPU:1"):
                with host.on_host("/GPU:1"):
                    there = tf.no_op(name="twice")
                self.assertEqual(host.device_here(), "/device:CPU:0")
            self.assertEqual(host.device_here(), "/device:GPU:1")
            self.assertEqual(there.name, "host/tower_1/twice")
            with host.on_host("/CPU:1"), tf.name_scope("here"):
                self.assertEqual(tf.no_op(name="x").name, "here/x")
