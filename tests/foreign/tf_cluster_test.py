"""What TensorFlow calls its connection; it is used in tests/cluster."""

import inspect

import tensorflow as tf
from absl.testing import absltest
from tensorflow.python.eager import context

from towers.foreign import tf_cluster


class TfClusterTest(absltest.TestCase):
    def test_the_names(self):
        self.assertIsNone(context.get_server_def())
        self.assertIsNone(tf_cluster.own_address())
        parameters = inspect.signature(context.update_server_def).parameters
        self.assertEqual(next(iter(parameters)), "server_def")

    def test_connecting_anew_still_does_not_do(self):
        # When this source no longer says so, the public function may do.
        source = inspect.getsource(tf.config.experimental_connect_to_cluster)
        self.assertIn("context.set_server_def(server_def)", source)
        self.assertIn("context.update_server_def(server_def)", source)


if __name__ == "__main__":
    absltest.main()
