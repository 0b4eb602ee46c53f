"""tf_custom_gradients: weights that custom gradients close over have theirs."""

import executed
import keras
import models
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from tensorflow.python.ops import custom_gradient

import towers

# `keras.remat` is newer than the oldest Keras, and is this.
remat = getattr(keras, "remat", tf.recompute_grad)
PLACEMENT = models.placement(3, weights=[2, 1, 1])
X = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")


class Own(keras.layers.Layer):
    """A layer of the weights `k` [4, 4] and `b` [4] that a function uses."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def build(self, shape):
        self.k = self.add_weight(shape=(shape[-1], shape[-1]), name="k")
        self.b = self.add_weight(shape=(shape[-1],), name="b")

    def call(self, x):
        return self.function(self, x)


def product(layer, x):
    return remat(lambda x: x @ layer.k)(x)


def tied(layer, x):
    return remat(lambda x: tf.tanh(x @ layer.k + layer.b))(x) @ layer.k


def nested(layer, x):
    def inner(x):
        return tf.tanh(x @ layer.k)

    return tf.recompute_grad(lambda x: remat(inner)(x) + layer.b)(x)


def said_twice(layer, x):
    """Several weights, of which the function says twice the gradients."""

    @tf.custom_gradient
    def function(x):
        def backward(upstream, variables=()):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.tanh(x @ layer.k + layer.b)
            sources = [x, *variables]
            gradients = tape.gradient(y, sources, output_gradients=upstream)
            return gradients[0], [2.0 * gradient for gradient in gradients[1:]]

        return tf.tanh(x @ layer.k + layer.b), backward

    return function(x)


def read_backward(layer, x):
    """A custom gradient of Keras that reads the weight when it is asked."""

    @keras.ops.custom_gradient
    def function(x):
        def backward(upstream, variables=()):
            del variables
            result = tf.matmul(x, upstream, transpose_a=True)
            return upstream @ keras.ops.transpose(layer.k), [result]

        return x @ layer.k, backward

    return function(x)


def stepped(layer, x):
    for _ in range(3):
        x = remat(lambda x: tf.tanh(x @ layer.k + layer.b))(x)
    return x


def looped(layer, x):
    """As `stepped`, where TensorFlow has no gradient for variables."""
    step = remat(lambda x: tf.tanh(x @ layer.k + layer.b))
    loop = tf.while_loop(
        lambda i, _: i < 3, lambda i, x: (i + 1, step(x)), [0, x]
    )
    return loop[1]


def branched(layer, x):
    return tf.cond(tf.size(x) > 99, lambda: x, lambda: stepped(layer, x))


CASES = [product, tied, nested, said_twice, read_backward, looped, branched]
# TensorFlow itself cannot take the gradients of these two.
SAME = {looped: stepped, branched: stepped}


def make(functions, plain=False):
    """A layer for each function, named by it."""
    keras.utils.set_random_seed(1)
    return models.chain(
        [4],
        keras.layers.Dense(4, name="first"),
        *[
            Own(SAME.get(f, f) if plain else f, name=f.__name__)
            for f in functions
        ],
        keras.layers.Dense(1),
    )


def gradients(model, placement=None):
    """Of the inputs and all weights, in a graph."""

    @tf.function(autograph=False)
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            if placement is None:
                y = model(x, training=True)
            else:
                graph = towers.build_towers(model, x, placement, training=True)
                y = graph.outputs
            loss = tf.reduce_sum(tf.square(y))
        return tape.gradient(loss, [x, *model.trainable_variables])

    return step(tf.constant(X))


class CustomGradientsTest(parameterized.TestCase):
    def assert_same(self, actual, expected):
        self.assertEqual(
            [g is None for g in actual], [g is None for g in expected]
        )
        models.close(
            [g for g in actual if g is not None],
            [g for g in expected if g is not None],
        )

    def test_weights_used_inside_get_their_gradient(self):
        self.assert_same(
            gradients(make(CASES), PLACEMENT),
            gradients(make(CASES, plain=True)),
        )

    @pytest.mark.slow
    def test_elsewhere(self):
        """In a pinned layer, in a Session, under an eager tape."""
        v1, model = tf.compat.v1, make([nested, tied])
        expected = gradients(model)
        with tf.Graph().as_default(), v1.Session() as session:
            x = tf.constant(X)
            graph = towers.build_towers(model, x, PLACEMENT, training=True)
            slopes = tf.gradients(
                tf.square(graph.outputs), [x, *v1.trainable_variables()]
            )
            session.run(v1.global_variables_initializer())
            self.assert_same(session.run(slopes), expected)
        with tf.GradientTape() as tape:
            graph = towers.build_towers(model, X, PLACEMENT, training=True)
            loss = tf.reduce_sum(tf.square(graph.outputs))
        slopes = tape.gradient(loss, model.trainable_variables)
        self.assert_same(slopes, expected[1:])
        pins = {"tied": "/CPU:3"}
        placement = models.placement(3, layer_devices=pins)
        self.assert_same(gradients(model, placement), expected)

    @parameterized.parameters(False, True)
    @pytest.mark.slow(after=1)
    def test_of_a_scope_in_fit(self, loss_on_towers):
        """Layers get `training=`, which TensorFlow allows in eager code only."""
        if not hasattr(keras, "RematScope"):
            self.skipTest("this Keras has no RematScope")

        def fit(wrap, **kwargs):
            keras.utils.set_random_seed(1)
            x = keras.Input([4])
            with keras.RematScope(mode="full"):
                y = keras.layers.Dense(8, "relu")(x)
                y = keras.layers.Dense(8, "tanh")(y)
            model = wrap(keras.Model(x, keras.layers.Dense(1)(y)))
            model.compile(keras.optimizers.SGD(0.1), "mse", **kwargs)
            model.fit(X, X[:, :1], batch_size=2, shuffle=False, verbose=0)
            return model.get_weights()

        def wrap(model):
            return towers.TowerModel(
                model, PLACEMENT, loss_on_towers=loss_on_towers
            )

        models.close(fit(wrap), fit(lambda m: m, run_eagerly=True))

    def test_what_is_computed_again_is_where_its_tower_is_and_as_it_was(self):
        """The same draws, and statistics that move once."""

        class Block(keras.layers.Layer):
            def __init__(self, again):
                super().__init__(name="block")
                self.again = again
                self.parts = [
                    keras.layers.Dense(4, name="inner"),
                    keras.layers.BatchNormalization(),
                    keras.layers.Dropout(0.5, seed=3),
                ]

            def build(self, shape):
                for part in self.parts:
                    part.build(shape)

            def call(self, x):
                def function(x):
                    for part in self.parts:
                        x = part(x)
                    return x

                return remat(function)(x) if self.again else function(x)

        def train(again):
            keras.utils.set_random_seed(1)
            model = models.chain([4], Block(again), keras.layers.Dense(1))
            model = towers.TowerModel(model, models.placement(2))
            model.compile(keras.optimizers.SGD(0.1), "mse")
            ran = executed.Executed(lambda: model.train_on_batch(X, X[:, :1]))
            return ran, model.get_weights()

        (ran, weights), (_, plain) = train(True), train(False)
        models.close(weights, plain)
        self.assertEqual(
            ran.heavy(), {"tower_0": {"/CPU:0"}, "tower_1": {"/CPU:1"}}
        )
        products = [
            (device, name[: len("tower_0")])
            for device, name, node in ran.nodes
            if name.startswith("tower_") and "/inner/" in name
            if "MatMul" in node.op
        ]
        self.assertCountEqual(  # forward, and again
            products, 2 * [("/CPU:0", "tower_0"), ("/CPU:1", "tower_1")]
        )

    def test_towers_cannot_meet_inside(self):
        def synchronized(layer, x):
            return remat(lambda x: layer.norm(x, training=True))(x)

        norm = keras.layers.BatchNormalization(synchronized=True)
        norm.build([None, 4])
        layer = Own(synchronized)
        layer.norm = norm
        model = models.chain([4], layer)
        with self.assertRaisesRegex(ValueError, "inside a custom gradient"):
            gradients(model, PLACEMENT)

    def test_gradients_by_variable_inside_a_tower(self):
        """Those of a tape within a tape, of an embedding's sparse."""
        model = models.chain(
            [2],
            keras.layers.Embedding(9, 4),
            keras.layers.Dense(4, "tanh"),
            dtype="int32",
        )
        kinds = []

        def function(model, x):
            weights = model.trainable_variables
            with tf.GradientTape() as outer:
                with tf.GradientTape() as tape:
                    loss = tf.reduce_sum(tf.square(model(x)))
                first = tape.gradient(loss, weights[:1])
                again = tf.reduce_sum(tf.square(tf.convert_to_tensor(first[0])))
                loss = tf.reduce_sum(model(x)) + again / 1e3
            gradients = outer.gradient(loss, weights)
            kinds.append([type(g).__name__ for g in first])
            return [
                None if g is None else tf.convert_to_tensor(g)
                for g in gradients
            ]

        def build(x):
            graph = towers.build_towers(
                model, x, models.placement(1), tower_fn=function, merge="sum"
            )
            return graph.outputs

        x = np.array([[0, 1], [1, 8], [3, 3]], "int32")
        actual = tf.function(build, autograph=False)(x)
        plain = tf.function(lambda x: function(model, x), autograph=False)
        self.assert_same(actual, plain(x))
        self.assertEqual(kinds, [["IndexedSlices"]] * 2)

    def test_what_tensorflow_calls_is_put_back(self):
        names = ("_graph_mode_decorator", "_get_dependent_variables")
        before = [getattr(custom_gradient, name) for name in names]
        tape = tf.GradientTape.__enter__, tf.GradientTape.__exit__
        gradients(make([product]), PLACEMENT)
        self.assertEqual(
            [getattr(custom_gradient, name) for name in names], before
        )
        self.assertEqual(
            (tf.GradientTape.__enter__, tf.GradientTape.__exit__), tape
        )
