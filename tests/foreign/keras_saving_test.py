"""TemplateProxy: what is written and read is the plain model."""

import copy
import os
import pickle
import subprocess
import sys
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized
from models import (
    NAMED,
    close,
    cnn,
    inputs,
    make,
    nested,
    placement,
    subclassed,
    targets,
)

import towers

layers = keras.layers
ADAM = keras.optimizers.Adam
# One of each kind, and those that are made of the same.
SAVED = [("cnn", cnn), ("nested", nested), ("subclassed", subclassed)]
OTHERS = [named for named in NAMED if named not in SAVED]


def fitted(model, seed=7, n=3, epochs=1):
    """A model after an epoch with Adam, towered or not, and its data."""
    plain = make(model, seed)
    x, y = inputs(plain, 6), targets(plain, 6)
    plain = towers.TowerModel(plain, placement(n)) if n else plain
    plain.compile(ADAM(0.01), "mse", run_eagerly=not n)
    fit(plain, x, y, epochs)
    return plain, x, y


def fit(model, x, y, epochs=1):
    model.fit(x, y, batch_size=3, epochs=epochs, verbose=0, shuffle=False)


def path(name):
    return os.path.join(tempfile.mkdtemp(), name)


class SavingTest(parameterized.TestCase):
    @parameterized.named_parameters(SAVED)
    @pytest.mark.rare(after=1)
    def test_any_number_of_towers_goes_on_from_what_another_saved(self, model):
        self.check(model)

    @parameterized.named_parameters(OTHERS)
    @pytest.mark.rare
    def test_so_with_models_of_the_same_kinds(self, model):
        self.check(model)

    def check(self, model):
        expected, x, y = fitted(model, n=0, epochs=2)
        towered, _, _ = fitted(model)

        def goes_on(loaded):
            close(loaded(x), towered(x))
            fit(loaded, x, y)
            close(loaded.get_weights(), expected.get_weights())
            close(
                [v.numpy() for v in loaded.optimizer.variables],
                [v.numpy() for v in expected.optimizer.variables],
            )

        if model is not subclassed:  # Keras knows its own layers
            for save in (
                towered.save,
                lambda file: keras.saving.save_model(towered, file),
            ):
                file = path("model.keras")
                save(file)
                loaded = keras.saving.load_model(file)
                self.assertIs(type(loaded), type(expected))
                if save == towered.save:
                    loaded = towers.TowerModel(loaded, placement(2))
                goes_on(loaded)
        others = [fitted(model, seed=3, n=n)[0] for n in (0, 2)]
        # By TensorFlow's checkpoints, there and back.
        file = tf.train.Checkpoint(model=towered).save(path("model"))
        for loaded in others:
            status = tf.train.Checkpoint(model=loaded).restore(file)
            status.assert_consumed()
            goes_on(loaded)
        file = tf.train.Checkpoint(model=others[1]).save(path("model"))
        plain, _, _ = fitted(model, seed=3, n=0)
        tf.train.Checkpoint(model=plain).restore(file).assert_consumed()
        close(plain.get_weights(), others[1].get_weights())
        # By Keras's weights, which hold the optimizer too.
        file = path("model.weights.h5")
        towered.save_weights(file)
        for loaded in others:
            loaded.load_weights(file)
            goes_on(loaded)

    def test_what_it_was_compiled_with_last_is_saved(self):
        towered, x, y = fitted(cnn)
        for loss in ("mse", "mae"):
            towered.compile(towered.optimizer, loss)
            file = path("model.keras")
            towered.save(file)
            self.assertEqual(keras.saving.load_model(file).loss, loss)

    def test_how_it_was_compiled_is_saved_as_the_plain_model_s(self):
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy("mixed_float16")
        plain = make(cnn)
        keras.config.set_dtype_policy(before)
        asked = {"jit_compile": True, "auto_scale_loss": False}
        plain.compile(ADAM(0.01), "mse", **asked)
        wrapped = towers.TowerModel(plain, placement(2))
        self.assertIs(type(wrapped.optimizer), ADAM)
        towered = towers.TowerModel(
            keras.models.clone_model(plain), placement(2)
        )
        towered.compile(ADAM(0.01), "mse", **asked)
        lent = [towered.get_compile_config(), plain.get_compile_config()]
        for config in lent:
            config["optimizer"]["config"].pop("name")
        self.assertEqual(*lent)
        self.assertTrue(lent[0]["jit_compile"])

    def test_a_process_without_towers_loads_it(self):
        towered, x, _ = fitted(cnn)
        folder = tempfile.mkdtemp()
        towered.save(os.path.join(folder, "a.keras"))
        keras.saving.save_model(towered, os.path.join(folder, "b.keras"))
        np.save(os.path.join(folder, "x.npy"), x)
        code = (
            "import sys; sys.modules['towers'] = None\n"
            "import keras, numpy as np\n"
            "for name in 'ab':\n"
            "    model = keras.saving.load_model(name + '.keras')\n"
            "    np.save(name, model(np.load('x.npy')))\n"
        )
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
        for name in "ab":
            close(np.load(os.path.join(folder, f"{name}.npy")), towered(x))


class CopyTest(absltest.TestCase):
    @pytest.mark.slow
    def test_copies_are_what_the_docstring_says(self):
        towered, x, y = fitted(cnn)
        copied = copy.deepcopy(towered)
        self.assertIs(type(copied), towers.TowerModel)
        self.assertEqual(copied.placement, towered.placement)
        pickled = pickle.loads(pickle.dumps(towered))
        self.assertIs(type(pickled), keras.Sequential)
        for other in (copied, pickled):
            close(other(x), towered(x))
        before = towered.get_weights()
        for other in (copied, pickled):
            fit(other, x, y)
        close(towered.get_weights(), before)
        close(copied.get_weights(), pickled.get_weights())
        for model, given in ((towered, x), fitted(nested)[:2]):
            cloned = keras.models.clone_model(model)
            self.assertIs(type(cloned), type(model.template))
            cloned.set_weights(model.get_weights())
            close(cloned(given), model(given))


class FaceTest(absltest.TestCase):
    def test_attributes_of_the_template_s_class_are_there(self):
        class Mine(keras.Model):
            def __init__(self):
                super().__init__()
                self.hidden = layers.Dense(3, name="hidden")

            def call(self, x):
                return self.encode(x) + 1

            def encode(self, x):
                return self.hidden(x)

        template = Mine()
        template(np.ones([1, 2]))
        model = towers.TowerModel(template, placement(2))
        x = np.ones([3, 2], "float32")
        close(model.encode(x) + 1, model(x))
        self.assertIs(model.hidden, template.hidden)
        self.assertIs(model.get_layer("hidden"), template.hidden)
        self.assertIsInstance(model, Mine)
        self.assertIsInstance(model, towers.TowerModel)
        self.assertIs(type(model), towers.TowerModel)
        with self.assertRaisesRegex(AttributeError, "decode"):
            model.decode(x)

    def test_what_its_class_does_in_another_way_is_done_in_that(self):
        class Mine(keras.Sequential):
            def count_params(self):
                return 17

            def compute_output_shape(self, shape):
                return [*shape, 17]

            def quantize(self, mode, **kwargs):
                self.quantized_as = mode

            def get_quantization_layer_structure(self, mode):
                return {mode: self.layers}

            def get_compile_config(self):
                return {"mine": 17}

            def compile_from_config(self, config):
                self.compile("sgd", "mae")
                self.compiled_from = config

        plain = Mine([keras.Input([3]), layers.Dense(2)])
        model = towers.TowerModel(plain, placement(2))
        for m, mode in ((plain, "int8"), (model, "float8")):
            plain.compiled_from = None
            self.assertEqual(m.count_params(), 17)
            self.assertEqual(m.compute_output_shape([3]), [3, 17])
            structure = m.get_quantization_layer_structure("gptq")
            self.assertEqual(structure, {"gptq": plain.layers})
            m.quantize(mode)
            m.compile_from_config(m.get_compile_config())
            self.assertEqual(m.quantized_as, mode)
            self.assertEqual(m.compiled_from, {"mine": 17})
            self.assertEqual(m.loss, "mae")
        self.assertEqual(model.path, plain.path)

    def test_freezing_counts_before_and_after_wrapping(self):
        for freeze in (
            lambda template, model: setattr(model, "trainable", False),
            lambda template, model: setattr(template, "trainable", False),
            lambda template, model: setattr(
                model.layers[0], "trainable", False
            ),
        ):
            template = make(cnn)
            model = towers.TowerModel(template, placement(2))
            freeze(template, model)
            before = model.layers[0].get_weights()
            model.compile("sgd", "mse")
            self.assertEqual(
                [v.path for v in model.trainable_variables],
                [v.path for v in template.trainable_variables],
            )
            fit(model, inputs(template, 6), targets(template, 6))
            close(model.layers[0].get_weights(), before)

    def test_summary_shows_the_placement_and_the_template(self):
        lines = []
        model = towers.TowerModel(make(cnn), placement(2))
        model.compile(ADAM(0.01), "mse")
        model.optimizer.build(model.trainable_variables)
        model.summary(print_fn=lines.append)
        text = "\n".join(lines)
        self.assertIn("tower_1 on /CPU:1 (50% of the rows)", text)
        self.assertIn("conv2d", text)
        self.assertIn("Optimizer params", text)
