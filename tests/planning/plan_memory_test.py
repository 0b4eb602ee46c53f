"""plan_memory: bytes of a step by device, against those that shapes make."""

import json
import math

import keras
import numpy as np
from absl.testing import absltest

import towers

layers = keras.layers
ROWS, TOWERS = 12, ["/CPU:0", "/CPU:1"]


def bytes_of(*shape):
    return 4 * math.prod(shape)


def planned(stack, shape, step="train", **kwargs):
    where = towers.Placement(
        TOWERS, parameter_device="/CPU:2", output_device="/CPU:2", **kwargs
    )
    model = towers.TowerModel(keras.Sequential(stack), where)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    x = np.zeros([ROWS, *shape], "float32")
    y = np.zeros([ROWS, *model.output_shape[1:]], "float32")
    data = [x, y] if step == "train" else [x]
    return model, towers.placement_plan(
        model, *data, machine={"CPU": 3}, step=step
    )


class MemoryTest(absltest.TestCase):
    def test_of_each_kind(self):
        model, plan = planned(
            [
                keras.Input([6, 6, 2]),
                layers.Conv2D(4, 3, activation="relu"),
                layers.Flatten(),  # the same bytes
                layers.Dense(300, activation="tanh"),
                layers.Dense(2),
            ],
            [6, 6, 2],
        )
        parameters = sum(v.numpy().nbytes for v in model.trainable_variables)
        rows = ROWS // 2
        kept = bytes_of(rows, 4, 4, 4) + bytes_of(rows, 300)
        shard = bytes_of(rows, 6, 6, 2)
        here, there, home = (plan.memory[f"/CPU:{i}"] for i in range(3))
        self.assertEqual(here.activations, kept)
        self.assertEqual(there.activations, kept)
        self.assertEqual((here.batch, there.batch), (0, shard))
        self.assertEqual((here.copies, here.variables), (parameters, 0))
        self.assertEqual((here.gradients, home.gradients), (parameters,) * 2)
        self.assertGreaterEqual(home.variables, 2 * parameters)  # with slots
        self.assertEqual(home.activations, 0)
        self.assertEqual(there.total, 2 * parameters + kept + shard)
        self.assertIn("What a step would hold", str(plan))
        data = json.loads(json.dumps(plan.to_dict()))["memory"]["/CPU:1"]
        self.assertEqual(data["total"], there.total)

    def test_a_pinned_layer_keeps_its_own(self):
        _, plan = planned(
            [
                keras.Input([3]),
                layers.Dense(5, activation="relu"),
                layers.Dense(7, activation="relu", name="far"),
                layers.Dense(2),
            ],
            [3],
            layer_devices={"far": "/CPU:2"},
        )
        # What crosses to a layer is kept for its kernel's gradient there.
        both = bytes_of(6, 5) + bytes_of(6, 7)
        self.assertEqual(plan.memory["/CPU:0"].activations, both)
        self.assertEqual(plan.memory["/CPU:2"].activations, 2 * both)

    def test_nothing_waits_where_nothing_is_trained(self):
        stack = [keras.Input([3]), layers.Dense(5, activation="relu")]
        _, plan = planned(stack, [3], "predict")
        self.assertEqual(plan.memory["/CPU:1"].activations, 0)
        self.assertNotIn("would hold", str(plan))
