"""row_widths: who takes a width from a tower's rows is told of, or refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import close, placement
from warned import messages

import towers

layers = keras.layers
X = np.array([[1, 0, 0], [1, 2, 0], [1, 0, 0], [3, 2, 1], [1, 0, 0]], "int32")


def longest(x):
    return tf.reduce_max(tf.reduce_sum(tf.cast(x != 0, tf.int32), 1))


def cut(x):
    return x[:, : longest(x)]


def looped(x):
    n = longest(x)
    taken = tf.TensorArray(x.dtype, n)
    _, taken = tf.while_loop(
        lambda i, _: i < n,
        lambda i, taken: (i + 1, taken.write(i, tf.gather(x, i, axis=1))),
        [0, taken],
    )
    return tf.transpose(taken.stack())


def of_words(x):
    text = tf.strings.reduce_join(tf.strings.as_string(x), 1, separator="0")
    words = tf.compat.v1.string_split(text, "0")
    return tf.strings.length(tf.sparse.to_dense(words, default_value=""))


def by_keras(x):
    length = keras.ops.max(keras.ops.sum(keras.ops.cast(x != 0, "int32"), 1))
    return x[:, :length]


def lengths(x):
    return tf.reduce_sum(tf.cast(x != 0, tf.int32), 1)


def ragged(x):
    return tf.RaggedTensor.from_tensor(x, lengths(x))


def masked(x, n=None):
    return cut(x) * tf.sequence_mask(
        lengths(x) if n is None else n, dtype="int32"
    )


def others(x):
    n = lengths(x)
    return tf.sequence_mask(n * n, tf.reduce_max(n), dtype="int32") * cut(x)


def masked_by_keras(x):
    n = keras.ops.sum(keras.ops.cast(x != 0, "int32"), 1)
    places = keras.ops.arange(keras.ops.max(n))
    mask = keras.ops.cast(places < n[:, None], "int32")
    return keras.ops.sum(x[:, : keras.ops.max(n)] * mask, 1)


HIDDEN = [
    ("of_masked", lambda x: tf.reduce_mean(masked(x), 1)),
    ("other_lengths", lambda x: tf.reduce_sum(others(x + 1), 1)),
    (
        "masked_by_one",
        lambda x: tf.reduce_sum(
            tf.where(tf.sequence_mask(lengths(x)), cut(x), 1), 1
        ),
    ),
    ("cut", cut),
    ("by_keras", by_keras),
    ("slice", lambda x: tf.slice(x, [0, 0], [-1, longest(x)])),
    ("mask", lambda x: tf.sequence_mask(tf.reduce_sum(x, 1))),
    ("counts", lambda x: tf.math.bincount(x, axis=-1)),
    ("one_hot", lambda x: tf.one_hot(x[:, 0], longest(x))),
    ("pad", lambda x: tf.pad(x, [[0, 0], [0, longest(x)]])),
    ("tile", lambda x: tf.tile(x, [1, longest(x)])),
    ("fill", lambda x: tf.fill([tf.shape(x)[0], longest(x)], 1)),
    ("top", lambda x: tf.math.top_k(x, longest(x))[0]),
    ("loop", looped),
    ("words", of_words),
]
NONE = [
    ("repeated", lambda x: tf.repeat(x[:, 0], lengths(x))),
    ("ragged_sum", lambda x: tf.reduce_sum(ragged(x), 1)),
    ("ragged_mean", lambda x: tf.reduce_mean(ragged(x), 1)),
    ("masked_sum", lambda x: tf.reduce_sum(masked(x), 1)),
    (
        "where",
        lambda x: tf.reduce_sum(
            tf.where(tf.sequence_mask(lengths(x)), cut(x), 0), 1
        ),
    ),
    (
        "places",
        lambda x: tf.gather_nd(x, tf.where(tf.sequence_mask(lengths(x)))),
    ),
    ("by_keras_masked", masked_by_keras),
    ("repeated_one", lambda x: tf.repeat(x[:1, 0], lengths(x[:1]))),
    ("of_rows", lambda x: tf.reshape(x, [tf.shape(x)[0], -1])),
    ("of_axes", lambda x: x[:, : tf.shape(x)[1] - 1]),
    ("of_one", lambda x: x[:, x[0, 0] * 0, None]),
    ("other_rows", lambda x: tf.boolean_mask(x, x[:, 0] > 0)[: longest(x)]),
    ("weights", lambda x: x[:, : longest(tf.constant([[1, 2]]))]),
    (
        "of_all_towers",
        lambda x: x[:, : towers.all_towers(tf.reduce_max, longest(x)[None])],
    ),
]


class Averaged(layers.Layer):
    """Hides how wide its rows are."""

    needs_all_towers = True

    def __init__(self, function):
        super().__init__(name="averaged")
        self.function = function

    def call(self, x):
        wide = tf.cast(self.function(x), tf.float32)
        return tf.zeros([tf.shape(x)[0], 1]) + tf.reduce_mean(wide)


class Cut(layers.Layer):
    def call(self, x):
        return cut(x)


def built(layer, x=X, spec=(None, None)):
    """Towers of a layer that cannot see how many rows there are."""
    model = keras.Sequential([keras.Input([None], dtype="int32"), layer])

    @tf.function(input_signature=[tf.TensorSpec(spec, "int32")])
    def outputs(x):
        return towers.build_towers(model, x, placement(2)).outputs

    return outputs(x)


# As `Averaged` does, for a width to make a difference.
@pytest.mark.filterwarnings("ignore:.*makes its outputs of all rows")
class RowWidthTest(parameterized.TestCase):
    @parameterized.named_parameters(*HIDDEN)
    @pytest.mark.rare(after=6)
    def test_a_width_that_is_hidden_is_warned_of_by_name(self, function):
        with self.assertWarnsRegex(UserWarning, "'averaged' takes .*all_towe"):
            built(Averaged(function))

    @parameterized.named_parameters(*NONE)
    @pytest.mark.rare(after=6)
    def test_nothing_else_is(self, function):
        built(Averaged(function))  # warnings are errors

    def test_it_is_warned_of_once(self):
        inputs = keras.Input([3], dtype="int32")
        model = keras.Sequential([inputs, Averaged(cut)])

        def call():
            for rows in (5, 4):
                towers.build_towers(model, X[:rows], placement(3, [3, 2, 1]))

        self.assertLen(messages(call, "takes a width"), 1)

    @parameterized.parameters((2, None), (3, [3, 2, 1]))
    def test_outputs_that_do_not_join_are_refused_in_a_sentence(self, n, w):
        model = towers.TowerModel(
            keras.Sequential([keras.Input([3], dtype="int32"), Cut()]),
            placement(n, w),
        )
        close(model(X[::2]), X[::2, :1])  # these do
        model.compile("sgd", "mse")
        calls = [
            lambda: model(X),
            lambda: towers.build_towers(model.template, X, model.placement),
            lambda: model.predict(X, verbose=0),
            lambda: model.evaluate(X, X, verbose=0),
        ]
        for call in calls[: 4 if n == 2 else 1]:
            with self.assertRaisesRegex(
                ValueError,
                r"`merge` is 'concat' for output 0, .*tower 0 has shape \[\d,2\]"
                r".*tower 1 \[\d,3\].*axis 1.*all_towers",
            ) as error:
                call()
            self.assertNotIn("ConcatOp", str(error.exception))
