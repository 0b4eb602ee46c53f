"""parameters: policies, moving, and what an empty tower's gradient does."""

from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized
from models import close, cnn, make, placement
from same import pair, same_fit

import towers
from towers.keras_model import parameters

DEVICES = ["/CPU:0", "/CPU:1", "/CPU:2", "/CPU:3"]


def mlp() -> keras.Model:
    """Kernels of 4, 4, 4, 4 and 0.5 thousand floats, and biases."""
    hidden = [keras.layers.Dense(64, activation="tanh") for _ in range(4)]
    return keras.Sequential([keras.Input([64]), *hidden, keras.layers.Dense(8)])


class PoliciesTest(parameterized.TestCase):
    def test_balanced_puts_the_largest_first_where_least_is(self):
        sizes = [1, 5, 3, 8, 8, 2]
        variables = [tf.Variable(tf.zeros([n])) for n in sizes]
        variables.append(tf.Variable(tf.zeros([20]), trainable=False))
        policy = towers.balanced(["/CPU:0", "/CPU:1"])
        results = [name[-1] for name in policy(variables)]
        # 8 | 8, then 5 | 3 + 2, then 1 where as much is, then what is frozen.
        self.assertEqual("".join(results), "0010111")
        self.assertEqual(policy(variables), policy(variables))

    def test_devices_must_be_a_list(self):
        for policy in (towers.balanced, towers.round_robin):
            with self.assertRaisesRegex(TypeError, "list of device names"):
                policy("/CPU:0")
            with self.assertRaisesRegex(ValueError, "is empty"):
                policy([])
            with self.assertRaisesRegex(ValueError, "CPU:9"):
                where = placement(2, parameter_device=policy(["/CPU:9"]))
                towers.TowerModel(make(cnn), where)

    @parameterized.parameters(
        keras.optimizers.Adam,
        lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.1),
        lambda: keras.optimizers.SGD(use_ema=True, ema_overwrite_frequency=2),
        lambda: keras.optimizers.Adam(gradient_accumulation_steps=2),
    )
    @pytest.mark.rare
    def test_each_device_holds_and_updates_its_share(self, optimizer):
        self.check(optimizer)

    @parameterized.parameters(
        lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        keras.optimizers.AdamW,
        lambda: keras.optimizers.SGD(0.1, clipnorm=0.1),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
    )
    @pytest.mark.rare
    def test_so_with_other_optimizers(self, optimizer):
        self.check(optimizer)

    def check(self, optimizer):
        where = placement(4, parameter_device=towers.balanced(DEVICES))
        plain, towered = pair(mlp, where)
        rng = np.random.default_rng(0)
        x = rng.normal(size=[8, 64]).astype("float32")
        y = rng.normal(size=[8, 8]).astype("float32")
        for m in (plain, towered):
            m.compile(optimizer(), "mse", run_eagerly=m is plain)

        def step():
            towered.fit(x, y, batch_size=8, verbose=0)

        report = towers.execution_report(step)
        total = sum(w.nbytes for w in plain.get_weights())
        # Each weight to three towers and three gradients back; of the rows of
        # x, outputs and their gradients three quarters. Scalars aside.
        least = 6 * total + (x.nbytes + 2 * y.nbytes) * 3 // 4
        self.assertBetween(report.total_bytes, least, 1.001 * least)
        for held in (report.parameter_bytes, report.slot_bytes):
            quarter = sum(held.values()) / 4
            if max(held.values()) > 100:  # plain SGD has scalars only
                self.assertLess(max(held.values()), 1.25 * quarter)
        how = {"optimizer": None, "batch_size": 8, "epochs": 4}
        same_fit((plain, towered), x, y, **how)

    @pytest.mark.rare
    def test_no_device_s_traffic_grows_with_the_towers(self):
        busiest = []
        for n in (2, 4):
            where = towers.Placement(
                DEVICES[:n], parameter_device=towers.balanced(DEVICES[:n])
            )
            model = towers.TowerModel(make(mlp), where)
            model.compile("sgd", "mse")
            x, y = np.ones([8, 64]), np.ones([8, 8])
            report = towers.execution_report(model.train_on_batch, x, y)
            busiest.append(
                max(
                    sum(
                        b
                        for pair, b in report.bytes_between.items()
                        if d in pair
                    )
                    for d in DEVICES[:n]
                )
            )
        # (n - 1) / n of all weights down and gradients up, there and back.
        weights = sum(w.nbytes for w in make(mlp).get_weights())
        self.assertLess(busiest[0], 1.1 * 2 * weights * (1 / 2 + 1 / 2))
        self.assertLess(busiest[1], 1.2 * 2 * weights * (3 / 4 + 3 / 4))


class ParametersTest(absltest.TestCase):
    def test_a_policy_places_each_variable_and_its_slots(self):
        model = make(cnn)
        model.compile(keras.optimizers.Adam(), "mse")
        model.optimizer.build(model.trainable_variables)
        names = ["/CPU:1", "/CPU:2", "/CPU:3", "/CPU:1"]
        where = placement(2, parameter_device=lambda variables: names)
        towers.place_variables(model, where)
        for i, (variable, name) in enumerate(zip(model.variables, names)):
            self.assertEndsWith(variable.value.device, name[1:])
            slot = model.optimizer._momentums[i]
            self.assertEndsWith(slot.value.device, name[1:])

    def test_bad_policies_are_refused(self):
        for policy, message in (
            (lambda v: ["/CPU:0"], "4 devices, one per variable; got 1"),
            (lambda v: ["/CPU:9"] * len(v), "parameter_device.*CPU:9"),
            (
                towers.balanced,
                r"got <function.*Write towers.balanced\(devices\)",
            ),
            (lambda v: "/CPU:0", "a list of 4 devices.*got '/CPU:0'"),
        ):
            with self.assertRaisesRegex((TypeError, ValueError), message):
                towers.place_variables(
                    make(cnn), placement(2, parameter_device=policy)
                )

    def test_a_move_to_another_process_is_waited_for(self):
        far = "/job:worker/task:1/device:CPU:0"
        where = placement(2, parameter_device=far, available="any")
        for place, waits in ((where, 1), (placement(2), 0)):
            with mock.patch.object(parameters, "wait_for_all") as wait:
                towers.place_variables(make(cnn), place)
            self.assertEqual(wait.call_count, waits)

    def test_moving_inside_a_graph_is_refused(self):
        model = make(cnn)

        @tf.function
        def move():
            towers.place_variables(model, placement(2))

        with self.assertRaisesRegex(RuntimeError, "eagerly"):
            move()

    @pytest.mark.filterwarnings("ignore:.*makes its outputs of all rows")
    def test_nan_gradients_of_an_empty_tower_are_dropped(self):
        class Spread(keras.layers.Layer):
            """Divides by the rows' deviation: 0 / 0 in the gradient at one row."""

            def build(self, shape):
                self.scale = self.add_weight(shape=(1,), initializer="ones")

            def call(self, x):
                x = x * self.scale
                return x + 1e-30 * (x / tf.math.reduce_std(x, 0))

        model = keras.Sequential([keras.Input([2]), Spread()])

        def gradient(x, weights):
            @tf.function(input_signature=[tf.TensorSpec([None, 2])])
            def run(x):
                with tf.GradientTape() as tape:
                    where = placement(2, weights)
                    graph = towers.build_towers(model, x, where)
                    loss = tf.reduce_sum(graph.outputs[:, 0])
                return tape.gradient(loss, model.trainable_variables[0])

            return run(x)

        x = np.array([[1, 2], [3, 5]], "float32")
        # The plain model says NaN of one row, and so does a tower that has it.
        self.assertTrue(np.isnan(gradient(x, [1, 1])).all())
        # An empty first tower runs on one spare row, and is not heard.
        close(gradient(x, [0, 1]), np.array([4.0]))
