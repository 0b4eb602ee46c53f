"""keras_updates: each device updates its own variables, told numbers once."""

import functools

import keras
import numpy as np
import pytest
from absl.testing import parameterized
from models import close
from same import pair, same_fit

import towers
from towers.foreign.keras_optimizer import optimizer_variables

optimizers = keras.optimizers
DEVICES = ["/CPU:0", "/CPU:1"]
X, Y = np.ones([8, 4], "float32"), np.ones([8, 4], "float32")


def deep():
    layers = [keras.layers.Dense(4, "tanh") for _ in range(4)]
    return keras.Sequential([keras.Input([4]), *layers])


def everything(**kwargs):
    rate = optimizers.schedules.CosineDecay(0.1, 10)
    kwargs |= {"use_ema": True, "ema_overwrite_frequency": 2}
    return optimizers.AdamW(rate, **kwargs)


# What crosses besides parameters, gradients, a shard, outputs and their gradient,
# and that a device has done: to the other device the numbers, with what comes of a
# norm, and what of whether all is finite, and its part of those back.
MADE = {
    "accumulated_norm": (
        lambda: everything(global_clipnorm=0.1, gradient_accumulation_steps=2),
        2,
    ),
    "scaled": (
        lambda: optimizers.LossScaleOptimizer(everything(global_clipnorm=0.1)),
        2 + 3 + 1,
    ),
    # It has a number that it changes before the updates.
    "its_own_way": (lambda: optimizers.Nadam(0.1, clipvalue=0.01), 2),
    "a_function": (lambda: optimizers.RMSprop(lambda: 0.01 + X.sum() * 0), 1),
}


class UpdatesTest(parameterized.TestCase):
    def test_keras_still_has_the_private_names(self):
        optimizer = optimizers.LossScaleOptimizer(optimizers.SGD(0.1))
        for name in (
            "_backend_apply_gradients",
            "_backend_update_step",
            "_backend_reset_gradient_accumulators",
            "_all_reduce_sum_gradients",
            "_clip_gradients",
            "_stateful_handle_finite_grads",
        ):
            self.assertTrue(callable(getattr(optimizer, name)), name)
        one = everything(gradient_accumulation_steps=2)
        one.build([keras.Variable(1.0)])
        for name in (
            "_trainable_variables",
            "_accumulated_gradients",
            "_model_variables_moving_average",
        ):
            self.assertLen(getattr(one, name), 1)

    def test_numbers_are_no_slots(self):
        one = optimizers.SGD(0.1)
        one.build([keras.Variable(1.0), keras.Variable(2.0)])
        self.assertLen(one.variables, 2)  # as many as there are to train
        self.assertEqual(
            [owner for _, owner in optimizer_variables(one)], [None, None]
        )

    @parameterized.named_parameters((k, *v) for k, v in MADE.items())
    @pytest.mark.rare
    def test_numbers_cross_once(self, optimizer, most):
        balanced = towers.balanced(DEVICES)
        plain, towered = pair(deep, towers.Placement(DEVICES, balanced))
        plain.compile(optimizer(), "mse", run_eagerly=True)
        towered.compile(optimizer(), "mse")
        data = {"batch_size": 4, "verbose": 0, "shuffle": False}
        step = functools.partial(towered.fit, X[:4], Y[:4], **data)
        transfers = towers.execution_report(step).transfers
        self.assertLessEqual(len(transfers), 8 + most, transfers)
        same_fit((plain, towered), X, Y, optimizer=None, **data)
        for mine, theirs in zip(
            towered.optimizer.variables, plain.optimizer.variables, strict=True
        ):
            close(mine.numpy(), theirs.numpy())
