"""row_sums: the graph of a number tells whether it adds up from rows."""

import keras
import tensorflow as tf
from absl.testing import parameterized

from towers.engine.row_kinds import MEAN, SAME, SUM, OfRows, Total
from towers.engine.row_sums import Judge

ops, total = keras.ops, tf.reduce_sum
EACH = OfRows(0)  # a value for each row


def rows_of(x):
    return tf.cast(tf.shape(x)[0], tf.float32)


def positive(x):
    return tf.cast(x > 0, tf.float32)


def importance(x, w):
    """The balance of a mixture of experts: a product of means."""
    taken = tf.one_hot(tf.argmax(x @ w, -1), 3)
    return total(tf.reduce_mean(tf.nn.softmax(x), 0) * tf.reduce_mean(taken, 0))


def quantized(x, w):
    far = total(x**2, 1, keepdims=True) + total(w**2, 0) - 2 * x @ w
    nearest = tf.gather(w, tf.argmin(far, 1))
    return tf.reduce_mean((tf.stop_gradient(nearest) - x) ** 2)


# What is made of rows x [rows, 3] and weights w [3, 3], and what it is.
CASES = {
    "mean": (lambda x, w: tf.reduce_mean(x @ w), MEAN),
    "keras_mean": (lambda x, w: ops.mean(ops.square(x @ w)), MEAN),
    "sum": (lambda x, w: 0.1 * total(x**2), SUM),
    "half_of_squares": (lambda x, w: tf.nn.l2_loss(x), SUM),
    "of_weights": (lambda x, w: total(w**2), SAME),
    "a_value_for_each_row": (lambda x, w: total(x**2, -1), EACH),
    "divided_by_rows": (lambda x, w: total(x) / rows_of(x), MEAN),
    "divided_by_size": (
        lambda x, w: total(x) / tf.cast(tf.size(x), tf.float32),
        MEAN,
    ),
    "divided_by_ones": (lambda x, w: total(x) / total(x[:, 0] * 0 + 1), None),
    "divided_by_a_count_of_ones": (
        lambda x, w: total(x) / total(tf.ones_like(x[:, 0])),
        MEAN,
    ),
    "divided_by_no_zero": (
        lambda x, w: total(x) / tf.maximum(rows_of(x), 1.0),
        MEAN,
    ),
    "divided_by_a_constant": (lambda x, w: total(x) / 8, SUM),
    "each_divided_by_rows": (
        lambda x, w: total(total(x, 1) / rows_of(x)),
        MEAN,
    ),
    "mean_times_rows": (lambda x, w: tf.reduce_mean(x) * rows_of(x), SUM),
    "rows": (lambda x, w: rows_of(x), Total(power=1, exact=True)),
    "one_less_mean": (lambda x, w: 1 - tf.reduce_mean(x), MEAN),
    "sums": (lambda x, w: sum([total(x), total(x**2)]), SUM),
    "stacked": (lambda x, w: total(tf.stack([total(x), total(-x)])), SUM),
    "sum_and_mean": (lambda x, w: total(x) + tf.reduce_mean(x), None),
    "sum_and_constant": (lambda x, w: total(x) + 1, None),
    "of_features": (lambda x, w: total(tf.reduce_mean(x, 0)), MEAN),
    "divergence": (
        lambda x, w: -0.5 * ops.mean(ops.sum(1 + x - x**2 - ops.exp(x), 1)),
        MEAN,
    ),
    "gram": (lambda x, w: total(w * tf.matmul(x, x, transpose_a=True)), SUM),
    "einsum": (lambda x, w: total(tf.einsum("bi,bj->ij", x, x)), SUM),
    "flattened": (lambda x, w: tf.reduce_mean(tf.reshape(x, [-1])), MEAN),
    "picked": (lambda x, w: total(tf.boolean_mask(x, x[:, 0] > 0)), SUM),
    "counted": (
        lambda x, w: tf.math.confusion_matrix(
            tf.argmax(x, 1), tf.argmax(x @ w, 1), 3
        ),
        SUM,
    ),
    "noisy": (
        lambda x, w: ops.mean(x + keras.random.normal(ops.shape(x), seed=3)),
        MEAN,
    ),
    "quantized": (quantized, MEAN),
    "repeated": (
        lambda x, w: tf.reduce_mean(
            tf.while_loop(
                lambda i, y: i < 3, lambda i, y: (i + 1, y @ w), (0, x)
            )[1]
        ),
        MEAN,
    ),
    "branched": (
        lambda x, w: tf.cond(
            w[0, 0] > 0, lambda: tf.reduce_mean(x), lambda: tf.reduce_mean(-x)
        ),
        MEAN,
    ),
    "branched_by_rows": (
        lambda x, w: tf.cond(
            x[0, 0] > 0, lambda: tf.reduce_mean(x), lambda: tf.reduce_mean(-x)
        ),
        None,
    ),
    "branches_that_differ": (
        lambda x, w: tf.cond(
            w[0, 0] > 0, lambda: tf.reduce_mean(x), lambda: total(x)
        ),
        None,
    ),
    "computed_again": (
        lambda x, w: tf.reduce_mean(
            tf.recompute_grad(lambda y: tf.nn.swish(y @ w))(x)
        ),
        MEAN,
    ),
    "keras_loss": (
        lambda x, w: keras.losses.CategoricalCrossentropy(True)(x, x @ w),
        MEAN,
    ),
    "keras_loss_for_each_row": (
        lambda x, w: keras.losses.mean_squared_error(x, x @ w),
        EACH,
    ),
    "keras_loss_with_weights": (
        lambda x, w: keras.losses.MeanSquaredError()(x, x @ w, x[:, 0]),
        MEAN,
    ),
    "keras_loss_of_all_rows": (
        lambda x, w: keras.losses.Dice()(x, x @ w),
        None,
    ),
    "maximum": (lambda x, w: tf.reduce_max(x), None),
    "norm": (lambda x, w: tf.norm(x), None),
    "variance": (lambda x, w: total(tf.math.reduce_variance(x, 0)), None),
    "mean_squared": (lambda x, w: tf.reduce_mean(x) ** 2, None),
    "balance": (importance, None),
    "masked_mean": (
        lambda x, w: total(x * positive(x)) / total(positive(x)),
        None,
    ),
    "less_its_mean": (
        lambda x, w: tf.reduce_mean((x - tf.reduce_mean(x, 0)) ** 2),
        None,
    ),
    "pairs": (lambda x, w: tf.reduce_mean(x @ tf.transpose(x)), None),
    "two_rows_as_one": (
        lambda x, w: tf.reduce_mean(tf.reduce_max(tf.reshape(x, [-1, 6]), 1)),
        None,
    ),
    "by_place": (
        lambda x, w: total(x[:, 0] * tf.range(rows_of(x))),
        None,
    ),
    "first_row": (lambda x, w: x[0, 0], None),
    "sorted": (lambda x, w: tf.reduce_mean(tf.sort(x, 0)[0]), None),
    "summed_up": (lambda x, w: tf.reduce_mean(tf.cumsum(x, 0)), None),
}
# Layers of Keras, by the shape of a row.
LAYERS = {
    "lstm": (lambda: keras.layers.LSTM(2, return_sequences=True), (4, 3)),
    "bidirectional": (
        lambda: keras.layers.Bidirectional(keras.layers.GRU(2)),
        (4, 3),
    ),
    "attention": (lambda: Attends(), (None, 3)),
    "convolutions": (
        lambda: keras.Sequential(
            [
                keras.layers.RandomCrop(7, 8),
                keras.layers.RandomRotation(0.1),
                keras.layers.Conv2D(2, 3, dilation_rate=2),
                keras.layers.MaxPooling2D(),
                keras.layers.Conv2DTranspose(2, 3, strides=2),
                keras.layers.BatchNormalization(),  # not in training
                keras.layers.LayerNormalization(),
                keras.layers.UpSampling2D(),
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dropout(0.5),
            ]
        ),
        (9, 9, 3),
    ),
    "dense": (lambda: keras.layers.Dense(2), (None, 3)),
    "time_distributed": (
        lambda: keras.layers.TimeDistributed(keras.layers.Dense(2)),
        (4, 3),
    ),
}


class Attends(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.attention = keras.layers.MultiHeadAttention(2, 3)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x, use_causal_mask=True)


class RowSumsTest(parameterized.TestCase):
    @parameterized.named_parameters(
        *((name, case) for name, case in CASES.items())
    )
    def test_a_number_is(self, case):
        function, expected = case
        kinds = []

        def judged(x, w):
            kinds.append(Judge([x]).kind(tf.convert_to_tensor(function(x, w))))

        tf.function(judged, autograph=False).get_concrete_function(
            tf.TensorSpec([None, 3]), tf.TensorSpec([3, 3])
        )
        self.assertEqual(kinds[0], expected)

    @parameterized.named_parameters(
        *((name, case) for name, case in LAYERS.items())
    )
    def test_layers_go_row_by_row(self, case):
        make, shape = case
        layer, kinds = make(), []
        inputs = keras.Input(shape)
        model = keras.Model(inputs, layer(inputs))

        def judged(x):
            y = model(x, training=False)
            kinds.append(Judge([x]).kind(tf.reduce_mean(y**2)))
            kinds.append(Judge([x]).kind(tf.reduce_sum(y**2)))

        tf.function(judged, autograph=False).get_concrete_function(
            tf.TensorSpec([None, *shape])
        )
        self.assertEqual(kinds, [MEAN, SUM])

    @parameterized.named_parameters(
        ("added", lambda old, x: old + total(x), SUM),
        ("twice", lambda old, x: (old + total(x)) + total(x**2), SUM),
        ("counted", lambda old, x: old + 1.0, SAME),
        ("kept", lambda old, x: tf.identity(old), SAME),
        ("moved", lambda old, x: 0.9 * old + 0.1 * tf.reduce_mean(x), MEAN),
        ("decayed", lambda old, x: 0.9 * old + total(x), None),
        ("replaced", lambda old, x: total(x), None),
        ("doubled", lambda old, x: old + old + total(x), None),
        ("largest", lambda old, x: tf.maximum(old, total(x)), None),
    )
    def test_what_is_added_to_a_value(self, function, expected):
        kinds = []

        def judged(old, x):
            kinds.append(Judge([x]).change(function(old, x), old))

        tf.function(judged, autograph=False).get_concrete_function(
            tf.TensorSpec([]), tf.TensorSpec([None, 3])
        )
        self.assertEqual(kinds[0], expected)

    def test_of_values_of_ragged_rows_there_are_some_for_each(self):
        kinds = []

        def judged(x):
            judge = Judge([], [x.flat_values], [], [x.row_splits])
            kinds.append(judge.kind(tf.reduce_sum(x.flat_values)))
            kinds.append(judge.kind(tf.reduce_mean(x.flat_values)))

        tf.function(judged, autograph=False).get_concrete_function(
            tf.RaggedTensorSpec([None, None], tf.float32)
        )
        self.assertEqual(kinds, [SUM, None])

    def test_what_becomes_of_the_values_of_each_ragged_row_is_one_of_a_row(
        self,
    ):
        kinds = []

        def judged(x):
            splits = [x.row_splits]
            places, n = x.value_rowids(), x.nrows()
            sums = tf.math.unsorted_segment_sum
            asked = [
                tf.reduce_sum(x, 1),
                tf.reduce_max(x, 1) + tf.reduce_mean(x * x, 1),
                tf.reduce_mean(tf.reduce_sum(x, 1)),
                sums(x.values, places, 2 * n),
                sums(x.values, tf.cast(x.values, places.dtype), n),
                sums(x.values - tf.reduce_max(x.values), places, n),
            ]
            judge = Judge([], [x.flat_values], [], splits, splits=splits)
            kinds.extend(map(judge.kind, asked))

        tf.function(judged, autograph=False).get_concrete_function(
            tf.RaggedTensorSpec([None, None], tf.float32)
        )
        self.assertEqual(kinds, [OfRows(0), OfRows(0), MEAN, None, None, None])
