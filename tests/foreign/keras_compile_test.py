"""keras_compile: the private names of Keras behind `compile`."""

import keras
import numpy as np
from absl.testing import absltest
from models import cnn, make

from towers.foreign import keras_compile


class CompiledTest(absltest.TestCase):
    def test_keras_still_has_the_private_names(self):
        model = make(cnn)
        model.compile("sgd", "mse", loss_weights=[2.0], metrics=["mae"])
        arguments = keras_compile.compile_arguments(model)
        self.assertEqual(arguments["loss"], "mse")
        self.assertEqual(arguments["loss_weights"], [2.0])
        self.assertEqual(arguments["metrics"], ["mae"])
        self.assertTrue(callable(model.optimizer._all_reduce_sum_gradients))
        model.fit(np.ones([2, 8, 8, 2]), np.ones([2, 3]), verbose=0)
        self.assertLen(model.optimizer._trainable_variables, 4)
        patient = keras.optimizers.SGD(gradient_accumulation_steps=2)
        patient.build(model.trainable_variables)
        self.assertLen(patient._accumulated_gradients, 4)
        self.assertTrue(callable(patient._backend_reset_gradient_accumulators))
        self.assertTrue(keras_compile.is_told_phase(model))
        compiled = keras_compile.Compiled.of(model)
        self.assertTrue(compiled.built)
        self.assertEqual(compiled.tracker.name, "loss")
        (loss,), (metric,) = compiled.flat_losses, compiled.flat_metrics
        self.assertIsInstance(loss, keras.losses.Loss)
        self.assertTrue(callable(metric._fn))

    def test_other_losses_stand_in_for_a_while(self):
        x = keras.Input([2])
        model = keras.Model(
            x, [keras.layers.Dense(1)(x), keras.layers.Dense(1)(x)]
        )
        model.compile("sgd", ["mse", "mae"], loss_weights=[2.0, 1.0])
        y = [np.ones([3, 1]), np.ones([3, 1])]
        model.fit(np.ones([3, 2]), y, verbose=0)
        compiled = keras_compile.Compiled.of(model)
        before = (
            compiled.loss(y, y),
            [float(m.result()) for m in compiled.loss.metrics],
        )
        with compiled.replaced([lambda *_: 10.0, lambda *_: 1.0]):
            self.assertEqual(compiled.loss(y, y), 21.0)
        results = [float(m.result()) for m in compiled.loss.metrics]
        self.assertEqual((compiled.loss(y, y), results), before)
        with compiled.replaced([lambda *_: 10.0, lambda *_: 1.0], tracked=True):
            compiled.loss(y, y)
        self.assertGreater(compiled.loss.metrics[0].result(), before[1][0])
