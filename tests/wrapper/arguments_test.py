"""More arguments of a call than inputs: which are shared, and which are whole."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized
from models import close, make, placement
from same import pair, same_fit

import towers

layers = keras.layers
RNG = np.random.default_rng(0)
X, T, TABLE = (
    tf.constant(RNG.normal(size=shape), tf.float32)
    for shape in ([7, 4], [7, 4], [4, 4])
)
WHERE = placement(3, [2, 1, 1])


class Conditioned(keras.Model):
    """What most models take besides their inputs."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, x, t=None, *, table=None, delta=1.0, mode="sum"):
        y = self.dense(x)
        if t is not None:
            y = y * self.dense(t)
        if table is not None:
            y = y + tf.reduce_sum(table * self.dense.kernel[0, 0])
        return delta * y if mode == "sum" else {"y": y, "more": [y - delta]}


class Pair(keras.Model):
    """Nests as arguments, and a phase in between."""

    def __init__(self):
        super().__init__()
        self.a, self.b = layers.Dense(3), layers.Dense(3)

    def call(self, x, training=False, others=None):
        y, factor = others["y"], others["factor"]
        return self.a(x) * self.b(y) * factor + (5.0 if training else 0.0)


class Starred(keras.Model):
    """Which names none of its arguments."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)
        self.dense.build([None, 4])  # as Keras cannot, from such a call

    def call(self, *tensors, **options):
        x = self.dense(tensors[0])
        for other in tensors[1:]:
            x = x + self.dense(other)
        return x * options.get("delta", 1.0)


class Masked(keras.Model):
    def __init__(self):
        super().__init__()
        self.lstm = layers.LSTM(3)

    def call(self, x, mask=None):
        return self.lstm(x, mask=mask)


def masked_input():
    ids = tf.constant([[1, 2, 0], [1, 0, 0], [2, 2, 2], [3, 0, 0], [4, 4, 0]])
    return layers.Embedding(5, 4, mask_zero=True)(ids)


def functional():
    x = keras.Input([3, 4])
    return keras.Model(x, layers.LSTM(3)(x))


def graph(model, call):
    """What a call gives in a graph, gradients of squares included."""

    @tf.function(autograph=False)
    def run():
        with tf.GradientTape() as tape:
            y = call(model)
            loss = tf.add_n([tf.nn.l2_loss(x) for x in tf.nest.flatten(y)])
        gradients = tape.gradient(loss, model.trainable_variables)
        return y, [g for g in gradients if g is not None]

    return run()


class CallTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("by_name", Conditioned, lambda m: m(X, t=T)),
        ("by_place", Conditioned, lambda m: m(X, T)),
        ("inputs_by_name", Conditioned, lambda m: m(t=T, x=X)),
        ("values", Conditioned, lambda m: m(X, delta=3.0, mode="nest")),
        ("scalar", Conditioned, lambda m: m(X, delta=tf.constant(3.0))),
        ("arrays", Conditioned, lambda m: m(np.array(X), t=np.array(T))),
        ("whole", Conditioned, lambda m: m(X, table=TABLE), ["table"]),
        ("whole_absent", Conditioned, lambda m: m(X, T), ["table"]),
        ("starred", Starred, lambda m: m(X)),
        ("starred_more", Starred, lambda m: m(X, T, delta=2.0)),
        ("nest", Pair, lambda m: m(X, others={"y": T, "factor": T[:, :1]})),
        (
            "whole_in_a_nest",
            Pair,
            lambda m: m(X, training=True, others={"y": T, "factor": T[:1, :3]}),
            [("others", "factor")],
        ),
    )
    def test_values_and_gradients_are_the_plain_model_s(
        self, model, call, whole=()
    ):
        expected = make(model)
        actual = towers.TowerModel(make(model), WHERE, whole=whole)
        result = graph(expected, call)
        close(graph(actual, call), result)
        close(call(actual), result[0])

    @parameterized.parameters(Masked, functional)
    @pytest.mark.rare
    def test_masks_are_shared_as_their_tensors_are(self, model):
        # Keras says that such a mask goes no further.
        self.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        x = masked_input()
        for call in (
            lambda m: m(x),
            lambda m: m(tf.identity(x), mask=x._keras_mask),
        ):
            expected, actual = make(model), make(model)
            actual = towers.TowerModel(actual, WHERE)
            result = call(expected)
            unmasked = expected(tf.identity(x))
            self.assertFalse(np.allclose(result, unmasked, atol=1e-4))
            close(call(actual), result)
            close(graph(actual, call)[0], result)
        tower_graph = towers.build_towers(expected, x, WHERE)
        close(tower_graph.outputs, result)

    def test_another_value_is_another_call(self):
        expected = make(Conditioned)
        actual = towers.TowerModel(make(Conditioned), WHERE)
        for delta in (1, 1.0, True, 2.0):
            close(actual(X, delta=delta), expected(X, delta=delta))

    def test_a_step_of_its_own_may_pass_them(self):
        class Own(Conditioned):
            def train_step(self, data):
                x, t = data
                with tf.GradientTape() as tape:
                    y = self(x, t, delta=3.0, training=True)
                    loss = tf.reduce_mean(tf.square(y - 1.0))
                gradients = tape.gradient(loss, self.trainable_variables)
                self.optimizer.apply(gradients, self.trainable_variables)
                return {"loss": loss}

        data = tf.data.Dataset.from_tensor_slices((X, T)).batch(3)
        same_fit(pair(Own, WHERE), data, loss=None)

    @pytest.mark.filterwarnings("ignore:.*makes its outputs of all rows")
    def test_rows_that_differ_are_refused_by_name(self):
        actual = towers.TowerModel(make(Conditioned), WHERE)
        with self.assertRaisesRegex(
            ValueError, "4 of `table`, 7 of `x`.*`whole`"
        ):
            actual(X, table=TABLE)
        open_rows = tf.TensorSpec([None, 4])

        @tf.function(input_signature=[open_rows, open_rows], autograph=False)
        def run(x, table):
            return actual(x, table=table)

        with self.assertRaisesRegex(Exception, "named in `whole`"):
            run(X, TABLE)


class BuildTest(absltest.TestCase):
    def test_build_towers_takes_them_by_name(self):
        model = make(Conditioned)
        expected = model(X, t=T, table=TABLE, delta=2.0)
        given = {"t": T, "table": TABLE, "delta": 2.0}
        graph = towers.build_towers(
            model, X, WHERE, whole=["table"], arguments=given
        )
        close(graph.outputs, expected)
        self.assertEqual(
            [tower.inputs.shape for tower in graph.towers],
            [[3, 4], [2, 4], [2, 4]],
        )

        @tf.function(autograph=False)
        def build(x, t):
            more = {**given, "t": t}
            return towers.build_towers(
                model, x, WHERE, whole=["table"], arguments=more
            ).outputs

        close(build(X, T), expected)

    def test_with_a_tower_fn_they_are_refused(self):
        with self.assertRaisesRegex(ValueError, "`arguments`.*`tower_fn`"):
            towers.build_towers(
                make(Conditioned),
                X,
                WHERE,
                tower_fn=lambda model, x: model(x),
                arguments={"t": T},
            )


class SymbolTest(parameterized.TestCase):
    @parameterized.parameters(Conditioned, Masked, functional)
    def test_a_wrapped_model_may_be_a_layer_of_another(self, model):
        inner = make(model)
        x = keras.Input([4] if model is Conditioned else [3, 4])
        y = towers.TowerModel(inner, WHERE)(x)
        self.assertEqual(y.shape, (None, 3))
        outer = keras.Model(x, layers.Dense(2)(y))
        data = RNG.normal(size=[5, *x.shape[1:]]).astype("float32")
        close(outer(data), outer.layers[-1](inner(data)))

    def test_so_with_more_arguments(self):
        inner = make(Conditioned)
        x, t = keras.Input([4]), keras.Input([4])
        outer = keras.Model([x, t], towers.TowerModel(inner, WHERE)(x, t=t))
        close(outer([X, T]), inner(X, t=T))
