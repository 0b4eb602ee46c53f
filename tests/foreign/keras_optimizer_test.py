"""keras_optimizer: an optimizer's own numbers, and the names behind them."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from models import close, make

import towers
from towers.foreign.keras_optimizer import _read_once

DEVICES = ["/CPU:1", "/CPU:2"]


def deep():
    layers = [keras.layers.Dense(4, "tanh") for _ in range(8)]
    return keras.Sequential([keras.Input([4]), *layers])


class NumbersTest(absltest.TestCase):
    def test_keras_and_tensorflow_still_have_the_private_names(self):
        optimizer = keras.optimizers.Nadam(0.1)
        optimizer.build([keras.Variable(1.0)])
        for name in ("_iterations", "_learning_rate", "_u_product"):
            self.assertIsInstance(getattr(optimizer, name), keras.Variable)
        for name in (
            "_backend_apply_gradients",
            "_clip_gradients",
            "_get_current_learning_rate",
        ):
            self.assertTrue(callable(getattr(optimizer, name)))
        self.assertIsNone(tf.Variable(1.0)._cached_value)

    def test_they_cross_once_to_each_device(self):
        plain, towered = make(deep), make(deep)
        where = towers.Placement(
            DEVICES, parameter_device=towers.balanced(DEVICES)
        )
        towered = towers.TowerModel(towered, where)
        x, y = np.ones([7, 4]), np.ones([7, 4])
        rate = keras.optimizers.schedules.CosineDecay(0.1, 10)
        for m in (plain, towered):
            m.compile(
                keras.optimizers.AdamW(
                    rate,
                    use_ema=True,
                    ema_overwrite_frequency=2,
                    global_clipnorm=0.1,
                ),
                "mse",
                run_eagerly=m is plain,
            )
        report = towers.execution_report(towered.train_on_batch, x, y)
        numbers = [
            (t.source, t.target) for t in report.transfers if not t.shape
        ]
        # The step, the rate, the clipping, and for averages the share of the
        # old, that of the new, and whether they overwrite; a norm back.
        self.assertLessEqual(numbers.count(("/CPU:1", "/CPU:2")), 7)
        self.assertLessEqual(len(numbers), 9)
        for m in (plain, towered):
            m.fit(x, y, batch_size=4, verbose=0, shuffle=False)
        close(towered.get_weights(), plain.get_weights())

    def test_a_number_that_is_assigned_is_read_anew(self):
        number = tf.Variable(1.0)

        @tf.function
        def run():
            with _read_once(number):
                before = number.value(), number.value()
                number.assign_add(1.0)
                return before, number.value()

        (one, same), after = run()
        np.testing.assert_array_equal([one, same, after], [1.0, 1.0, 2.0])
        self.assertIsNone(number._cached_value)


if __name__ == "__main__":
    absltest.main()
