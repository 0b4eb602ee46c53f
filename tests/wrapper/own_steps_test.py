"""Steps of the user's that call sub-models: in towers, with the plain numbers."""

import keras
import keras_io
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from executed import Executed
from keras import layers, ops
from models import close, make, placement

import towers
from towers.foreign import keras_compile

RNG = np.random.default_rng(0)
X = RNG.normal(size=[10, 6]).astype("float32")
LABELS = RNG.integers(0, 3, [10, 1])
WHERE = placement(3, [2, 1, 1], parameter_device="/CPU:3")


def sgd():
    return keras.optimizers.SGD(0.02, momentum=0.5)


def batches(*arrays, rows=4):
    """Batches of 4, 4 and 2 rows."""
    arrays = arrays if len(arrays) > 1 else arrays[0]
    return tf.data.Dataset.from_tensor_slices(arrays).batch(rows)


def vae(sampled=False):
    model = keras_io.VAE(sampled)
    model.compile(sgd())
    return model, batches(X)


def sampled_vae():
    return vae(sampled=True)


def gan():
    model = keras_io.GAN()
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(d_optimizer=sgd(), g_optimizer=sgd(), loss_fn=loss)
    return model, batches(X)


def wgan():
    model = keras_io.WGAN(d_steps=1)
    model.compile(
        sgd(),
        sgd(),
        lambda real, fake: ops.mean(fake) - ops.mean(real),
        lambda fake: -ops.mean(fake),
    )
    return model, batches(X)


def distiller():
    model = keras_io.Distiller()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(sgd(), ["mae"], loss, keras.losses.KLDivergence())
    return model, batches(X, LABELS)


def simclr():
    model = keras_io.SimCLR()
    model.compile(sgd(), sgd())
    labeled = batches(X[::-1], LABELS, rows=3)
    return model, tf.data.Dataset.zip((batches(X, LABELS), labeled))


def diffusion():
    model = keras_io.Diffusion()
    model.normalizer.adapt(X)
    model.compile(optimizer=sgd(), loss=keras.losses.MeanAbsoluteError())
    return model, batches(X)


def trained(example, where, epochs=2):
    """Logs of two epochs, and the model."""
    model, data = make(example)
    if where is not None:
        model = towers.TowerModel(model, where)
    return model.fit(data, epochs=epochs, verbose=0).history, model


class KerasIoTest(parameterized.TestCase):
    @parameterized.parameters(
        vae, gan, wgan, distiller, diffusion, sampled_vae, simclr
    )
    @pytest.mark.slow(of=["s2", "s6"])
    @pytest.mark.rare(of=["s0", "s3", "s4", "s5"])
    def test_weights_are_the_plain_model_s(self, example):
        logs, expected = trained(example, None)
        results = []
        ran = Executed(lambda: results.append(trained(example, WHERE)))
        (answer, actual) = results[0]
        close(answer, logs)
        close(actual.get_weights(), expected.get_weights())
        kept = [
            v
            for optimizer in keras_compile.optimizers(actual)
            for v in optimizer.variables
        ]
        self.assertNotEmpty(kept)
        for variable in (*actual.variables, *kept):
            self.assertEndsWith(variable.value.device, "CPU:3", variable.path)
        # Not of gradients of gradients, nor of products that a step computes.
        if example not in (wgan, simclr):
            ran_on = {f"tower_{i}": {f"/CPU:{i}"} for i in range(3)}
            self.assertEqual(ran.heavy(), ran_on)

    def test_evaluate_calls_sub_models_too(self):
        results = []
        for where in (None, WHERE):
            model, _ = make(simclr)
            if where is not None:
                model = towers.TowerModel(model, where)
            ran = Executed(
                lambda model=model: results.append(
                    model.evaluate(batches(X, LABELS), verbose=0)
                )
            )
        close(*results)
        ran_on = {f"tower_{i}": {f"/CPU:{i}"} for i in range(3)}
        self.assertEqual(ran.heavy(), ran_on)


class Step(keras.Model):
    """A regression whose step is told how to compute."""

    def forward(self, x):
        raise NotImplementedError

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.forward(x) - y))
            loss = loss + sum(self.losses)
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights))
        return {"loss": loss}


class Containers(Step):
    """Layers in lists and dicts, one called twice, `self(x)` in between.

    And one of whose rows only a call with others tells in which order they are.
    """

    def __init__(self):
        super().__init__()

        class Token(layers.Layer):
            def build(self, shape):
                self.token = self.add_weight(shape=(1, 6))

            def call(self, x):
                return ops.repeat(self.token, ops.shape(x)[0], 0)

        self.token = Token()
        self.blocks = [layers.Dense(6, activation="tanh") for _ in range(2)]
        self.heads = {
            "a": layers.Dense(1, kernel_regularizer="l2"),
            "b": keras.Sequential([layers.Dense(3), layers.Dense(1)]),
        }

    def build(self, input_shape):
        """Nothing, so that Keras does not warn of the layers."""

    def call(self, x):
        return self.blocks[1](x)

    def forward(self, x):
        assert isinstance(self.blocks[0], layers.Dense)
        for _ in range(2):
            x = self.blocks[0](x)
        x = self(x) * self.token(x)
        return self.heads["a"](x) + self.heads["b"](x)


class Losses(Step):
    """Losses of inputs and outputs, and a layer that makes one of all rows."""

    def __init__(self):
        super().__init__()

        class Spread(layers.Layer):
            def call(self, x):
                return ops.var(x)

        class Penalized(layers.Layer):
            def __init__(self):
                super().__init__()
                self.inner = layers.Dense(6, activity_regularizer="l2")

            def call(self, x):
                self.add_loss(0.1 * ops.mean(ops.square(x)))
                return self.inner(x)

        self.first, self.spread = Penalized(), Spread()
        self.out = layers.Dense(1, activity_regularizer="l1")

    def forward(self, x):
        x = self.first(x)
        y = self.out(x) + self.spread(x)
        # Each layer says what it added itself, and what is inside of it.
        assert len(self.first.losses) == 2 and len(self.losses) == 3
        return y + sum(self.first.inner.losses) - 2.0 * self.first.losses[0]


class Arguments(Step):
    """Several arguments, phases, values, and what has no rows."""

    def __init__(self):
        super().__init__()

        class Mixed(layers.Layer):
            def __init__(self):
                super().__init__()
                self.dense = layers.Dense(4)

            def build(self, x_shape):
                self.dense.build(x_shape)

            def call(self, x, others, *, scale=1.0, training=False):
                y = self.dense(x) * others["y"] * scale
                return y, {"more": y + (1.0 if training else 0.0)}

        self.embed = layers.Embedding(3, 4)
        self.mixed = Mixed()
        self.out = layers.Dense(1)

    def forward(self, x):
        row = self.embed(tf.constant(1))  # a scalar: no rows
        others = {"y": x[:, :1]}
        y, more = self.mixed(x, others, scale=2.0, training=True)
        return self.out(tf.concat([y, more["more"]], 0))[: tf.shape(x)[0]] + (
            tf.reduce_sum(row)
        )


class Masks(Step):
    """A mask goes from a layer to the next, by way of the gathered outputs."""

    def __init__(self):
        super().__init__()
        self.embed = layers.Embedding(5, 4, mask_zero=True)
        self.lstm = layers.LSTM(3)
        self.out = layers.Dense(1)

    def forward(self, x):
        ids = tf.cast(tf.abs(x) * 2.0, tf.int32) % 5
        return self.out(self.lstm(self.embed(ids)))


class Frozen(keras.Model):
    """Keras's own step, with a loss by another network."""

    def __init__(self):
        super().__init__()
        self.net = keras.Sequential([keras.Input([1]), layers.Dense(3)])
        self.net.trainable = False
        self.out = layers.Dense(1)

    def call(self, x):
        return self.out(x)

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return tf.reduce_mean(tf.square(self.net(y) - self.net(y_pred)))


class Normalized(Step):
    """Statistics of two calls, each moved by both."""

    def __init__(self):
        super().__init__()
        self.norm = layers.BatchNormalization(momentum=0.5)
        self.out = layers.Dense(1)

    def forward(self, x):
        y = self.norm(x, training=True)
        self.norm(2.0 * x + 1.0, training=True)
        return self.out(y)


class Graphed(Step):
    """A part that is a tf.function, and so built once for all steps."""

    def __init__(self):
        super().__init__()
        self.net = layers.Dense(3, activation="tanh")
        self.out = layers.Dense(1)

    @tf.function
    def forward(self, x):
        return self.out(self.net(x))


Y = RNG.normal(size=[10, 1]).astype("float32")
SMALL = [Containers, Losses, Arguments, Frozen, Graphed, Masks]


def fitted(model, **kwargs):
    model.compile(sgd(), **kwargs)
    history = model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    return history.history, model.get_weights()


class OfItsKindTest(parameterized.TestCase):
    @parameterized.parameters(*SMALL)
    @pytest.mark.rare(after=1)
    def test_weights_are_the_plain_model_s(self, model):
        expected = fitted(make(model))
        actual = towers.TowerModel(make(model), WHERE)
        ran = Executed(lambda: close(fitted(actual), expected))
        for name, devices in ran.heavy().items():
            i = name[-1] if name.startswith("tower_") else "none: " + name
            self.assertEqual(devices, {f"/CPU:{i}"})

    @parameterized.parameters(Arguments, Containers)
    @pytest.mark.rare
    def test_eagerly_too(self, model):
        expected = fitted(make(model), run_eagerly=True)
        actual = towers.TowerModel(make(model), WHERE)
        close(fitted(actual, run_eagerly=True), expected)

    @pytest.mark.rare
    def test_state_is_applied_after_each_call(self):
        expected, actual = make(Normalized), make(Normalized)
        for model in (expected, towers.TowerModel(actual, WHERE)):
            fitted(model)
        for name in ("moving_mean", "moving_variance"):
            close(getattr(actual.norm, name), getattr(expected.norm, name))
        one = towers.TowerModel(make(Normalized), placement(1))
        close(fitted(one), fitted(make(Normalized)))

    def test_layers_are_what_they_were_after_a_step(self):
        model = make(Containers)
        before = [set(vars(layer)) for layer in model.blocks]
        actual = towers.TowerModel(model, WHERE)
        fitted(actual)
        for layer, names in zip(model.blocks, before):
            self.assertNotIn("call", set(vars(layer)) - names)
        close(model.blocks[0](X), np.array(actual.blocks[0](X)))

    def test_a_pinned_layer_is_where_it_is_pinned(self):
        where = placement(2, layer_devices={"pinned": "/CPU:3"})

        class Pinned(Step):
            def __init__(self):
                super().__init__()
                self.net = keras.Sequential(
                    [layers.Dense(4, name="pinned"), layers.Dense(1)],
                    name="net",
                )

            def forward(self, x):
                return self.net(x)

        expected = fitted(make(Pinned))
        actual = towers.TowerModel(make(Pinned), where)
        ran = Executed(lambda: close(fitted(actual), expected))
        self.assertEqual(
            ran.devices("tower_1/net/pinned", "MatMul"), {"/CPU:3"}
        )

    def test_a_step_that_calls_nothing_is_refused(self):
        class Own(keras.Sequential):
            def train_step(self, data):
                return {}

        actual = towers.TowerModel(Own([keras.Input([6])]), WHERE)
        actual.compile("sgd")
        with self.assertRaisesRegex(ValueError, "nor any of its layers"):
            actual.fit(X, verbose=0)
