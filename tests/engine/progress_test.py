"""progress: who waits for towers hears of them."""

from unittest import mock

import keras
import tensorflow as tf
from absl.testing import absltest
from models import make, placement

import towers
from towers.engine import progress


class ProgressTest(absltest.TestCase):
    def test_it_tells_how_many_are_built_and_copied(self):
        model = make(lambda: keras.Sequential([keras.Input([2])]))
        with (
            mock.patch.object(progress, "SECONDS", 0.0),
            self.assertLogs("absl", "INFO") as heard,
        ):
            towers.build_towers(model, tf.ones([4, 2]), placement(4))
        self.assertLen(heard.output, 4)
        self.assertIn("4 of 4 are built, 3 of them as copies", heard.output[-1])


if __name__ == "__main__":
    absltest.main()
