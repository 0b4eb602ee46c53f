"""Variables in the place of a layer's: in all lists that Keras and TensorFlow keep."""

import gc
import tempfile
import weakref

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest

from towers.foreign import keras_tracking
from towers.foreign.keras_cut import kernel_of


class KerasTrackingTest(absltest.TestCase):
    def test_a_layer_has_others_in_the_place_of_one(self):
        layer = keras.layers.Dense(4)
        layer.build([None, 3])
        name, kernel = kernel_of(layer), layer.kernel
        path, value, ref = kernel.path, kernel.numpy(), weakref.ref(kernel)
        new = [
            keras_tracking.like(kernel, part, "/CPU:1", f"{path}_{j}")
            for j, part in enumerate(np.split(value, 2, 1))
        ]
        keras_tracking.replace_variables(layer, name, [kernel], new, new[1])
        del kernel
        gc.collect()
        self.assertIsNone(ref())
        self.assertEqual(
            [v.path for v in layer.trainable_variables],
            [f"{path}_0", f"{path}_1", layer.bias.path],
        )
        self.assertEqual(
            [id(v) for v in keras_tracking.own_variables(layer)],
            [id(v) for v in [*new, layer.bias]],
        )
        self.assertIs(vars(layer)[name], new[1])
        saved = tf.train.Checkpoint(layer=layer).write(
            tempfile.mkdtemp() + "/a"
        )
        shapes = [shape for _, shape in tf.train.list_variables(saved)]
        self.assertCountEqual(shapes, [[], [3, 2], [4]])
        self.assertEndsWith(new[0].value.device, "CPU:1")
        # And back.
        whole = keras_tracking.like(new[0], value, "/CPU:0", path)
        keras_tracking.replace_variables(layer, name, new, [whole], whole)
        self.assertLen(layer.weights, 2)
        np.testing.assert_array_equal(layer.kernel, value)
