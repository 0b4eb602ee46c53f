"""What TensorFlow calls its connection; it is used in tests/cluster."""

import inspect
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from tensorflow.python.eager import context

from towers.foreign import tf_cluster


class TfClusterTest(absltest.TestCase):
    def test_the_names(self):
        self.assertIsNone(context.get_server_def())
        self.assertIsNone(tf_cluster.connected_address())
        parameters = inspect.signature(context.update_server_def).parameters
        self.assertEqual(next(iter(parameters)), "server_def")

    def test_connecting_anew_still_does_not_do(self):
        # When this source no longer says so, the public function may do.
        source = inspect.getsource(tf.config.experimental_connect_to_cluster)
        self.assertIn("context.set_server_def(server_def)", source)
        self.assertIn("context.update_server_def(server_def)", source)

    def test_what_keras_and_checkpoints_wait_with_can_be_another(self):
        kind, waits = context.Context, []
        with mock.patch.object(kind, "sync_executors", kind.sync_executors):
            for number in range(2):  # the second takes the place of the first
                tf_cluster.wait_by(
                    lambda wait, number=number: waits.append((number, wait()))
                )
            tf_cluster.wait_for_all()
            context.async_wait()
            self.assertEqual(waits, [(1, None)] * 2)
            waits.clear()
            model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
            model.predict(np.ones([2, 1]), verbose=0)
            # Older Keras does not wait.
            self.assertIn(waits, ([], [(1, None)]))
