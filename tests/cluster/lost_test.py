"""What of TensorFlow's errors means that a worker is lost."""

import copy
import pickle

import tensorflow as tf
from absl.testing import absltest

from towers.cluster import lost


class LostTest(absltest.TestCase):
    def test_connections_are_and_mistakes_are_not(self):
        gone = tf.errors.UnavailableError(
            None, None, "from remote target /job:worker/replica:0/task:3/device"
        )
        self.assertTrue(lost.is_sign(gone))
        self.assertEqual(lost.tasks_named(gone), [3])
        mistake = tf.errors.InvalidArgumentError
        self.assertFalse(lost.is_sign(mistake(None, None, "shapes")))
        # Of an op on a worker, which says where it was told.
        for kind in (mistake, tf.errors.OutOfRangeError):
            self.assertFalse(lost.is_sign(kind(None, None, gone.message)))
        anew = mistake(None, None, "Unable to find a context_id matching")
        self.assertTrue(lost.is_sign(anew))
        self.assertFalse(lost.is_sign(KeyError("Socket closed")))

    def test_it_names_the_workers_and_what_to_do(self):
        error = lost.WorkerLost(["a:1", "b:2"])
        self.assertIsInstance(error, RuntimeError)
        self.assertEqual(error.workers, ("a:1", "b:2"))
        self.assertRegex(str(error), r"a:1, b:2.*update\(\).*Backup")
        for one in (copy.copy(error), pickle.loads(pickle.dumps(error))):
            self.assertEqual(one.workers, error.workers)
