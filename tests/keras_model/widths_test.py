"""widths: ragged rows are made dense as wide as the batch's longest."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import chain, close, make, placement
from same import pair, same_fit

import towers

layers = keras.layers
TEXT = ["a b c a b c", "a", "b c", "c b a c", "b"]  # the last batch is "b"
PLACEMENTS = [("two", 2, None), ("unequal", 3, [3, 2, 1])]


def text():
    """Neither the average nor a mask hides how wide a batch is."""
    return chain(
        [],
        layers.TextVectorization(vocabulary=["a", "b", "c"]),
        layers.Embedding(5, 3),
        layers.GlobalAveragePooling1D(),
        layers.Dense(1),
        dtype="string",
    )


class Read(keras.Model):
    """Ragged in three axes, dense in one way or another."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.hashed = layers.Hashing(9)
        self.embedded = layers.Embedding(9, 2)
        self.out = layers.Dense(1)

    def call(self, x):
        x = tf.strings.unicode_split(tf.strings.split(x, " "), "UTF-8")
        x = self.hashed(tf.strings.reduce_join(self.way(x), 2))
        return self.out(tf.reduce_mean(self.embedded(x), 1))


def way(**kwargs):
    return lambda x: x.to_tensor("", **kwargs)


def by_sparse(x):
    return tf.sparse.to_dense(x.to_sparse(), default_value="")


READ = [
    ("dense", way()),
    ("of_three_letters", way(shape=[None, None, 3])),
    ("of_a_constant_shape", way(shape=tf.constant([-1, -1, 2]))),
    ("sparse", by_sparse),
]


class WidthTest(parameterized.TestCase):
    @parameterized.named_parameters(*PLACEMENTS)
    @pytest.mark.slow(of=["_unequal"])
    def test_text_is_read_as_the_plain_model_reads_it(self, n, weights):
        x, y = np.array(TEXT, object), np.arange(5.0)[:, None]
        models = pair(text, placement(n, weights))
        how = {"optimizer": lambda: keras.optimizers.SGD(0.3)}
        same_fit(models, x, y, batch_size=4, **how)
        close(*(m.predict(x, batch_size=3, verbose=0) for m in models))

    @parameterized.named_parameters(*READ)
    @pytest.mark.slow(after=2)
    def test_ragged_rows_are_made_dense_as_in_the_plain_model(self, way):
        model = make(lambda: Read(way))
        x = tf.constant(TEXT)
        graph = towers.build_towers(model, x, placement(3, [3, 2, 1]))
        close(graph.outputs, model(x))

    def test_gradients_loops_of_ones_own_and_functions_of_towers(self):
        model, where = make(text), placement(2)

        def loss(model, x):
            counts = tf.strings.split(x, " ").to_tensor("") == ""
            return model(x) + tf.reduce_mean(
                tf.cast(counts, "float32"), 1, True
            )

        @tf.function
        def step(x):
            with tf.GradientTape() as tape:
                outputs = towers.build_towers(
                    model, x, where, tower_fn=loss
                ).outputs
            return outputs, tape.gradient(outputs, model.trainable_variables)

        x = tf.constant(TEXT)
        with tf.GradientTape() as tape:
            outputs = loss(model, x)
        gradients = tape.gradient(outputs, model.trainable_variables)
        both = [step(x), (outputs, gradients)]
        for actual, expected in zip(*map(tf.nest.flatten, both)):
            close(tf.convert_to_tensor(actual), tf.convert_to_tensor(expected))

    @pytest.mark.slow
    def test_what_is_as_wide_in_all_towers_needs_no_other(self):
        class Fixed(keras.Model):
            def call(self, x):
                constant = tf.ragged.constant([[1.0], [2.0, 3.0]]).to_tensor()
                return x.to_tensor(shape=[None, 2]) + constant[1]

        model, x = Fixed(), tf.ragged.constant([[1.0], [2.0, 3.0, 4.0], []])
        model(x)
        close(
            towers.build_towers(model, x, placement(2)).outputs,
            np.array([[3.0, 3.0], [4.0, 6.0], [2.0, 3.0]]),
        )
        self.assertFalse(
            [
                op.name
                for op in self._ops(model, x)
                if op.name.startswith("all_towers")
            ]
        )

    def test_a_loop_is_warned_of_once_by_name(self):
        class Looped(layers.Layer):
            def call(self, x):
                length = tf.cond(
                    tf.reduce_all(x == x),
                    lambda: tf.shape(tf.strings.split(x).to_tensor())[1],
                    lambda: 0,
                )
                return tf.fill([tf.shape(x)[0], 1], length)

        words = keras.Input([], dtype="string")
        model = keras.Sequential([words, Looped(name="looped")])
        with self.assertWarnsRegex(
            UserWarning, "'looped' makes ragged .*shape"
        ):
            towers.build_towers(model, tf.constant(TEXT), placement(3))
        towers.build_towers(model, tf.constant(TEXT[:3]), placement(3))

    def test_xla_is_refused_by_name(self):
        class Ragged(keras.Model):
            def call(self, x):
                return x.to_tensor()

        x = tf.ragged.constant([[1.0], [2.0, 3.0]])
        model = Ragged(name="dense")
        model(x)
        with self.assertRaisesRegex(ValueError, "jit_compile.*'dense'.*shape"):
            towers.build_towers(model, x, placement(2), jit_compile=True)

    def _ops(self, model, x):
        graphs = []

        def build(x):
            graphs.append(tf.compat.v1.get_default_graph())
            return towers.build_towers(model, x, placement(2)).outputs

        tf.function(build, autograph=False).get_concrete_function(x)
        return graphs[0].get_operations()
