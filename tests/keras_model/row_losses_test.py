"""row_losses: what is known of a loss or a metric, whether it adds up."""

import functools

import keras
from absl.testing import parameterized

from towers.keras_model.row_losses import adds_up

CIRCLE = getattr(keras.losses, "circle", None)


class Heir(keras.losses.Circle):
    pass


def mine(y, y_pred):
    return y - y_pred


def wrapping(function):
    return functools.wraps(function)(lambda *given: 2 * function(*given))


class JudgeTest(parameterized.TestCase):
    @parameterized.parameters(
        (keras.losses.MeanSquaredError(), None, True),
        (keras.losses.MeanSquaredError(), 1, None),  # the mean of all rows
        (keras.losses.MeanSquaredError(reduction=None), None, None),
        (keras.losses.MeanSquaredError, None, None),
        (keras.losses.mean_squared_error, None, True),
        (wrapping(keras.losses.mean_squared_error), None, None),
        (mine, None, None),
        (Heir(), None, False),
        (wrapping(CIRCLE), None, False),
        (keras.losses.CosineSimilarity(axis=-2), None, None),
        (keras.losses.CosineSimilarity(axis=-2), 2, False),
        (keras.metrics.AUC(), None, True),
        (keras.metrics.R2Score(), None, None),
        (keras.metrics.CosineSimilarity(axis=0), None, False),
        (keras.metrics.MeanMetricWrapper(CIRCLE), None, False),
        (keras.metrics.MeanMetricWrapper(mine), None, None),
    )
    def test_what_is_known_of_it(self, one, rank, expected):
        self.assertIs(adds_up(one, rank), expected)
