"""What becomes of a template's `jit_compile`."""

import warnings

import keras
import numpy as np
from absl.testing import absltest
from models import placement

import towers


class WarningTest(absltest.TestCase):
    def heard(self, **kwargs):
        """What is said when a compiled template is wrapped and trained."""
        model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
        model.compile("sgd", "mse", **kwargs)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            towered = towers.TowerModel(model, placement(2))
            towered.fit(np.ones([4, 3]), np.ones([4, 1]), verbose=0)
        self.assertFalse(towered.jit_compile)
        return [w for w in caught if "XLA" in str(w.message)]

    def test_one_says_that_xla_stays_off(self):
        (warning,) = self.heard(jit_compile=True)
        self.assertEqual(warning.filename, __file__)
        self.assertRegex(str(warning.message), 'jit_compile=True or.*"auto"')

    def test_none_says_so_where_it_was_off(self):
        self.assertEmpty(self.heard(jit_compile=False))


if __name__ == "__main__":
    absltest.main()
