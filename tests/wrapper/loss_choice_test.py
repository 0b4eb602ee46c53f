"""loss_choice: where "auto" puts the loss."""

import keras
import numpy as np
from absl.testing import parameterized
from models import chain, cnn, inputs, targets
from same import pair, same_fit

import towers

LOSSES, METRICS = keras.losses, keras.metrics
AWAY = towers.Placement(["/CPU:0", "/CPU:1"])


class Mine(keras.losses.MeanSquaredError):
    """May do anything."""


class First(keras.layers.Layer):
    """Makes [rows, 4] of [rows, 1, 4], and says [rows, 4, 1]."""

    def call(self, x):
        return x[:, 0]

    def compute_output_shape(self, shape):
        return (shape[0], shape[2], shape[1])


class Stepped(keras.Sequential):
    def train_step(self, data):
        return super().train_step(data)


def away(**kwargs):
    return towers.Placement(["/CPU:1", "/CPU:2"], **kwargs)


class ChoiceTest(parameterized.TestCase):
    @parameterized.parameters(
        (True, {"loss": "mse"}),
        (True, {"loss": "mse", "metrics": ["accuracy", METRICS.AUC()]}),
        (True, {"loss": [LOSSES.Huber(), None], "metrics": [["mae"], None]}),
        (True, {"loss": LOSSES.mean_squared_error}),
        (False, {"loss": None}),
        (False, {"loss": lambda y, p: p - y}),
        (False, {"loss": Mine()}),
        (False, {"loss": LOSSES.Circle()}),
        (False, {"loss": "dice"}),
        (False, {"loss": LOSSES.Tversky()}),
        (False, {"loss": LOSSES.CosineSimilarity(axis=0)}),
        (False, {"loss": LOSSES.MeanSquaredError(reduction=None)}),
        (False, {"loss": "mse", "metrics": [lambda y, p: p]}),
        (False, {"loss": "mse", "weighted_metrics": [METRICS.R2Score()]}),
        (False, {"loss": "mse", "run_eagerly": True}),
        (True, {"loss": "mse"}, away(parameter_device="/CPU:1")),
        (False, {"loss": "mse"}, away(output_device="/CPU:1")),
        (False, {"loss": "mse"}, towers.Placement(["/CPU:0"] * 2)),
        (False, {"loss": "mse"}, away(), "sum"),
    )
    def test_where(self, expected, arguments, where=AWAY, merge="concat"):
        model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
        model = towers.TowerModel(model, where, merge, "auto")
        model.compile("sgd", **arguments)
        self.assertEqual(model.loss_belongs_there, expected)

    def test_outputs_of_other_shapes_than_said_are_gathered_or_refused(self):
        def first():
            return chain([1, 4], keras.layers.Dense(4), First())

        data = np.ones([5, 1, 4]), np.ones([5, 4])
        same_fit(pair(first, away(), loss_on_towers="auto"), *data)
        _, model = pair(first, away(), loss_on_towers=True)
        model.compile("sgd", "mse")
        with self.assertRaisesRegex(
            ValueError, r"says .* \(None, 4, 1\).*made \(None, 4\).*leave out"
        ):
            model.train_on_batch(*data)

    def test_a_step_of_one_s_own_needs_the_outputs(self):
        model = Stepped([keras.Input([4]), keras.layers.Dense(2)])
        model = towers.TowerModel(model, AWAY, loss_on_towers="auto")
        model.compile("sgd", "mse")
        model.fit(np.ones([4, 4]), np.ones([4, 2]), verbose=0)

    def test_no_output_crosses_and_the_numbers_are_the_plain_model_s(self):
        plain, towered = pair(cnn, away(), loss_on_towers="auto")
        x, y = inputs(plain, 7), targets(plain, 7)
        for m in (plain, towered):
            m.compile("sgd", "mse", metrics=["mae"], run_eagerly=m is plain)
        report = towers.execution_report(towered.train_on_batch, x, y)
        # Weights, x and y down; sums of the loss and its metric, gradients up.
        self.assertLen(report.transfers, 2 * (3 + 2), report.transfers)
        self.assertNotIn(
            (3, 3), {t.shape for t in report.transfers if t.target == "/CPU:0"}
        )
        same_fit((plain, towered), x, y, optimizer=None, batch_size=4)

    def test_another_word_is_refused(self):
        model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
        with self.assertRaisesRegex(ValueError, "True, False or 'auto'"):
            towers.TowerModel(model, AWAY, loss_on_towers="sometimes")
