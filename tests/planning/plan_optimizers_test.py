"""placement_plan: each optimizer's work is beside the variables that it updates."""

import re

import keras
import pytest
import tensorflow as tf
from absl.testing import parameterized

import towers
from towers.foreign import tf_kernels
from towers.foreign.keras_layers import device_of

optimizers = keras.optimizers
GPUS = ["/GPU:0", "/GPU:1"]
HOMES = {"cpu": "/CPU:0", "balanced": towers.balanced(GPUS)}
# Makers of optimizers: all that Keras has, and their options.
OPTIMIZERS = {
    name: lambda kind=kind: kind(0.05)
    for name, kind in vars(optimizers).items()
    if isinstance(kind, type)
    and issubclass(kind, optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
} | {
    name: lambda options=options: optimizers.AdamW(0.1, **options)
    for name, options in {
        "clipnorm": {"clipnorm": 0.1},
        "clipvalue": {"clipvalue": 0.1},
        "global_clipnorm": {"global_clipnorm": 0.1},
        "average": {"use_ema": True, "ema_overwrite_frequency": 2},
        "accumulation": {"gradient_accumulation_steps": 2},
        "amsgrad": {"amsgrad": True},
    }.items()
}
OPTIMIZERS["nesterov"] = lambda: optimizers.SGD(0.1, 0.9, nesterov=True)
OPTIMIZERS["schedule"] = lambda: optimizers.Adam(
    optimizers.schedules.CosineDecay(0.1, 10)
)
OPTIMIZERS["loss_scale"] = lambda: optimizers.LossScaleOptimizer(
    optimizers.Adam(0.1)
)
# With slots and numbers of their own making.
OWN = ("Adafactor", "Nadam", "loss_scale")
QUICK = ("Adafactor_cpu", "Adafactor_balanced", "loss_scale_cpu")
LINES = [
    (f"{name}_{home}", make, where)
    for name, make in OPTIMIZERS.items()
    for home, where in HOMES.items()
    if home == "balanced" or name in OWN
]
SLOW = [f"_{name}" for name, *_ in LINES if name not in QUICK]


class OptimizerTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        if not tf_kernels.knows_gpus():
            self.skipTest("This TensorFlow was built without kernels for GPUs.")

    @parameterized.named_parameters(*LINES)
    @pytest.mark.slow(of=[*SLOW])
    def test_updates_are_beside_the_variables(self, make, home):
        layers = [keras.layers.Dense(5), keras.layers.Dense(4)]
        model = towers.TowerModel(
            keras.Sequential([keras.Input([6]), *layers]),
            towers.Placement(GPUS, parameter_device=home, available="any"),
        )
        model.compile(make(), "mse")
        model.tower_functions.build_slots()
        variables = model.trainable_variables

        def update():
            gradients = []
            for variable in variables:
                with tf.device(device_of(variable)):
                    gradients.append(tf.ones(variable.shape))
            with tf.device(str(model.placement.output_device)):
                model.optimizer.apply(gradients, variables)

        plan = towers.placement_plan(update, machine={"GPU": 2}, strict=True)
        self.assertEqual((plan.refused, plan.moved), ((), ()))
        homes = set(GPUS) if callable(home) else {home}
        self.assertEqual({v.device for v in plan.variables}, homes)
        off = {
            node
            for node in plan.nodes
            if node[0] not in homes
            # What a LossScaleOptimizer counts in a branch, on the host.
            and not re.fullmatch(r"cond/\w+/_\d+/.*(Add|Mul)", node[1])
        }
        self.assertEqual(off, set())
        # Numbers cross, and not what is as large as a kernel.
        self.assertLess(max([t.bytes or 0 for t in plan.transfers] + [0]), 80)
