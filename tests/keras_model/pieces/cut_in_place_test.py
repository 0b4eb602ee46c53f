"""Variables in pieces: where they are, what files have of them, what is freed."""

import gc
import os
import tempfile
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import DEVICES, chain, close, make, placement

import towers

layers = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=[8, 6]).astype("float32")
Y = RNG.normal(size=[8, 3]).astype("float32")
OPTIMIZERS = {
    "adamw": lambda: keras.optimizers.AdamW(
        0.01, use_ema=True, gradient_accumulation_steps=2, global_clipnorm=1.0
    ),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1, 0.9)
    ),
    "adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True, clipvalue=0.5),
    "rmsprop": lambda: keras.optimizers.RMSprop(
        0.01, momentum=0.9, centered=True
    ),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "ftrl": lambda: keras.optimizers.Ftrl(0.1),
    "sgd": lambda: keras.optimizers.SGD(0.1),
}


def mlp() -> keras.Model:
    return chain(
        [6], layers.Dense(10, "relu", name="up"), layers.Dense(3, name="down")
    )


def cut(pieces, n=2):
    """A placement with both layers in so many pieces."""
    if not pieces:
        return placement(n)
    some = DEVICES[:pieces]
    pins = {"up": towers.column_wise(some), "down": towers.row_wise(some)}
    return placement(n, layer_devices=pins)


def trained(optimizer) -> keras.Model:
    """A plain model with something in all of its optimizer's slots."""
    model = make(mlp)
    model.compile(optimizer(), "mse")
    model.optimizer.build(model.trainable_variables)
    for k, variable in enumerate(model.optimizer.variables[2:]):
        if variable.shape.rank:
            value = RNG.uniform(0.1 + k, 0.2 + k, variable.shape)
            variable.assign(value)
    return model


def state(model):
    """All that a file has of a model, as plain Keras has it."""
    return [v.numpy() for v in [*model.weights, *model.optimizer.variables]]


def fit(model):
    model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)


class FilesTest(parameterized.TestCase):
    @parameterized.named_parameters(*OPTIMIZERS.items())
    @pytest.mark.slow(after=2)
    def test_are_the_plain_model_s_in_any_number_of_pieces(self, optimizer):
        plain = trained(optimizer)
        expected = state(plain)
        folder = tempfile.mkdtemp()
        file = os.path.join(folder, "a.keras")
        plain.save(file)
        for pieces in (2, 3):
            model = keras.models.load_model(file)
            model = towers.TowerModel(model, cut(pieces))
            close(model.get_weights(), plain.get_weights(), 0)
            model.save(file)
            close(state(keras.models.load_model(file)), expected, 0)
        model.save_weights(weights := os.path.join(folder, "a.weights.h5"))
        other = towers.TowerModel(make(mlp, 1), cut(2))
        other.compile(optimizer(), "mse")
        other.optimizer.build(other.trainable_variables)
        other.load_weights(weights)
        # Into other pieces, and together again, in place.
        for pieces in (4, 0):
            again = towers.TowerModel(other.template, cut(pieces))
        close(state(again.template), expected, 0)

    @parameterized.named_parameters(*OPTIMIZERS.items())
    @pytest.mark.slow(after=1)
    def test_so_are_tensorflow_s_checkpoints(self, optimizer):
        plain = trained(optimizer)
        folder = tempfile.mkdtemp()
        path = tf.train.Checkpoint(model=plain).write(f"{folder}/plain")
        for pieces in (2, 3, 0):
            model = make(mlp, 1)
            model.compile(optimizer(), "mse")
            model = towers.TowerModel(model, cut(pieces))
            model.optimizer.build(model.trainable_variables)
            checkpoint = tf.train.Checkpoint(model=model)
            checkpoint.read(path).assert_consumed()
            names = tf.train.list_variables(path)
            path = checkpoint.write(f"{folder}/{pieces}")
            self.assertEqual(tf.train.list_variables(path), names)
        close(state(model.template), state(plain), 0)

    @pytest.mark.rare
    def test_training_goes_on_from_them(self):
        optimizer = OPTIMIZERS["adam"]
        plain, folder = make(mlp), tempfile.mkdtemp()
        plain.compile(optimizer(), "mse")
        fit(plain)
        plain.save(f"{folder}/a.keras")
        model = keras.models.load_model(f"{folder}/a.keras")
        model = towers.TowerModel(model, cut(2))
        callbacks = [
            keras.callbacks.ModelCheckpoint(f"{folder}/b.keras"),
            keras.callbacks.BackupAndRestore(f"{folder}/backup"),
        ]
        model.fit(
            *(X, Y),
            batch_size=4,
            callbacks=callbacks,
            shuffle=False,
            verbose=0,
        )
        fit(plain)
        model = keras.models.load_model(f"{folder}/b.keras")
        close(state(model), state(plain), 1e-6)
        model = towers.TowerModel(model, cut(3))
        fit(model)
        fit(plain)
        close(model.get_weights(), plain.get_weights(), 1e-6)


class SplitTest(parameterized.TestCase):
    def test_nothing_holds_the_whole(self):
        model = trained(OPTIMIZERS["adam"])
        kernel = model.get_layer("up").kernel
        slots = model.optimizer.variables[2:4]
        whole = [weakref.ref(x) for x in (kernel, *slots, kernel.value)]
        self.assertEqual(slots[0].shape, kernel.shape)
        del kernel, slots
        where = cut(2)
        towers.place_variables(model, where)
        gc.collect()
        self.assertEqual([x() for x in whole], [None] * 4)
        up = model.get_layer("up")
        for variable in [*up.weights, *model.optimizer.variables[2:]]:
            if "up" in variable.path:
                j = int("_1" in variable.path.split("up")[1])
                device = variable.value.device
                self.assertEndsWith(device, DEVICES[j][1:], variable.path)
                self.assertIn(5, variable.shape)
        self.assertLen(up.weights, 4)
        self.assertEqual(up.kernel.shape, (6, 10))

    @pytest.mark.rare
    def test_a_plain_model_in_pieces_is_saved_and_fitted(self):
        plain, model = make(mlp), make(mlp)
        towers.place_variables(model, cut(3))
        folder = tempfile.mkdtemp()
        tf.saved_model.save(model, folder)
        loaded = tf.saved_model.load(folder)
        serve = loaded.signatures["serving_default"]
        (name,) = serve.structured_input_signature[1]
        (result,) = serve(**{name: tf.constant(X)}).values()
        close(result, plain(X), 1e-6)
        for each in (plain, model):
            each.compile("adam", "mse")
            fit(each)
        close(model.get_weights(), plain.get_weights(), 1e-6)

    def test_weights_are_got_and_set_whole(self):
        model, other = make(mlp), make(mlp, 1)
        cut_model = towers.TowerModel(model, cut(3))
        weights = other.get_weights()
        cut_model.set_weights(weights)
        close(model(X), other(X), 1e-6)  # plain, of what is in pieces
        for whose in (cut_model, model):
            close(whose.get_weights(), weights, 0)
        up = model.get_layer("up")
        up.set_weights([2 * w for w in weights[:2]])
        close(up.get_weights(), [2 * w for w in weights[:2]], 0)
        close(up.kernel + 0, 2 * weights[0], 0)
        with self.assertRaisesRegex(ValueError, "must be 4 arrays; got 3"):
            cut_model.set_weights(weights[1:])
        with self.assertRaisesRegex(ValueError, r"up/kernel' in the shape"):
            cut_model.set_weights([w.T for w in weights])
        close(up.get_weights(), [2 * w for w in weights[:2]], 0)

    def test_frozen_layers_are_frozen_in_pieces(self):
        model = make(mlp)
        model.get_layer("up").trainable = False
        model = towers.TowerModel(model, cut(2))
        self.assertLen(model.trainable_variables, 3)
        model.get_layer("up").trainable = True
        self.assertLen(model.trainable_variables, 7)
