"""An optimizer's slots of variables that are cut: in the place of others."""

import tempfile

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from towers.foreign import keras_slots


class KerasSlotsTest(parameterized.TestCase):
    def test_variables_are_trained_in_the_place_of_one(self):
        first, last = (keras.Variable(np.ones([2]), name=x) for x in "ab")
        optimizer = keras.optimizers.AdamW(use_ema=True, weight_decay=0.1)
        optimizer.exclude_from_weight_decay(var_list=[first])
        optimizer.build([first, last])
        for k, variable in enumerate(optimizer.variables[2:]):
            variable.assign([k, k + 10])
        old = [v.numpy() for v in optimizer.variables]
        new = [keras.Variable(np.ones([1]), name=f"a_{j}") for j in range(2)]
        keras_slots.replace_trained(
            *(optimizer, [first], new),
            lambda values: values[0],
            lambda value: np.split(value, 2),
        )
        shapes = [tuple(v.shape) for v in optimizer.variables]
        some, one = (1,), (2,)
        self.assertEqual(shapes[2:], [some, some, one, *[some] * 4, one, one])
        tf.train.Checkpoint(optimizer=optimizer).write(
            tempfile.mkdtemp() + "/a"
        )
        gradients = [np.ones(v.shape, "float32") for v in [*new, last]]
        optimizer.apply(gradients, [*new, last])
        self.assertEqual([float(v[0]) < 1 for v in [*new, last]], [True] * 3)
        self.assertGreater(new[0].numpy()[0], last.numpy()[0])  # no decay
        self.assertEqual(old[2].tolist(), [0, 10])

    @parameterized.parameters("adafactor", "lamb", "muon")
    def test_those_that_look_at_whole_variables_are_known(self, name):
        try:
            optimizer = keras.optimizers.get(name)
        except ValueError:
            self.skipTest(f"this Keras has no {name}")
        with self.assertRaisesRegex(ValueError, "looks at whole variables"):
            keras_slots.check_by_piece(optimizer)

    def test_so_is_one_inside_of_another(self):
        inner = keras.optimizers.Adam(clipnorm=1.0)
        with self.assertRaisesRegex(ValueError, "`clipnorm` is of the norm"):
            keras_slots.check_by_piece(
                keras.optimizers.LossScaleOptimizer(inner)
            )
        keras_slots.check_by_piece(keras.optimizers.Adam(global_clipnorm=1.0))
