"""TemplateProxy: what is written and read is the plain model."""

import copy
import os
import pickle
import subprocess
import sys
import tempfile

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest, parameterized
from models import NAMED, close, cnn, inputs, make, nested, placement, targets

import towers

layers = keras.layers
ADAM = keras.optimizers.Adam
KERAS_MODELS = [
    (name, model) for name, model in NAMED if name != "subclassed"
]  # those of built-in layers


def fitted(model, seed=7, n=4, epochs=1):
    """A towered model after an epoch with Adam, and its data."""
    plain = make(model, seed)
    x, y = inputs(plain, 6), targets(plain, 6)
    towered = towers.TowerModel(plain, placement(n)) if n else plain
    towered.compile(ADAM(0.01), "mse")
    fit(towered, x, y, epochs)
    return towered, x, y


def fit(model, x, y, epochs=1):
    model.fit(x, y, batch_size=3, epochs=epochs, verbose=0, shuffle=False)


def path(name):
    return os.path.join(tempfile.mkdtemp(), name)


class SavingTest(parameterized.TestCase):
    @parameterized.named_parameters(KERAS_MODELS)
    def test_any_number_of_towers_loads_what_another_saved(self, model):
        expected, x, y = fitted(model, n=0, epochs=2)
        towered, _, _ = fitted(model, n=4)
        for save, counts in (
            (towered.save, (0, 3)),
            (lambda f: keras.saving.save_model(towered, f), (1,)),
        ):
            file = path("model.keras")
            save(file)
            for n in counts:
                loaded = keras.saving.load_model(file)
                self.assertIs(type(loaded), type(expected))
                if n:
                    loaded = towers.TowerModel(loaded, placement(n))
                close(loaded(x), towered(x))
                fit(loaded, x, y)
                close(loaded.get_weights(), expected.get_weights())
                close(
                    [v.numpy() for v in loaded.optimizer.variables],
                    [v.numpy() for v in expected.optimizer.variables],
                )

    @parameterized.named_parameters(NAMED)
    def test_checkpoints_of_tensorflow_are_the_plain_model_s(self, model):
        expected, x, y = fitted(model, n=0, epochs=2)
        towered, _, _ = fitted(model, n=4)
        file = tf.train.Checkpoint(model=towered).save(path("model"))
        for n in (0, 2):
            loaded, _, _ = fitted(model, seed=3, n=n)
            status = tf.train.Checkpoint(model=loaded).restore(file)
            status.assert_consumed()
            close(loaded(x), towered(x))
            fit(loaded, x, y)
            close(loaded.get_weights(), expected.get_weights())
        file = tf.train.Checkpoint(model=loaded).save(path("model"))
        plain, _, _ = fitted(model, seed=3, n=0)
        tf.train.Checkpoint(model=plain).restore(file).assert_consumed()
        close(plain.get_weights(), loaded.get_weights())

    @parameterized.named_parameters(NAMED)
    def test_weights_hold_the_optimizer_too(self, model):
        expected, x, y = fitted(model, n=0, epochs=2)
        towered, _, _ = fitted(model, n=4)
        file = path("model.weights.h5")
        towered.save_weights(file)
        for n in (0, 3):
            loaded, _, _ = fitted(model, seed=3, n=n)
            loaded.load_weights(file)
            fit(loaded, x, y)
            close(loaded.get_weights(), expected.get_weights())

    def test_what_it_was_compiled_with_last_is_saved(self):
        towered, x, y = fitted(cnn)
        for loss in ("mse", "mae"):
            towered.compile(towered.optimizer, loss)
            file = path("model.keras")
            towered.save(file)
            self.assertEqual(keras.saving.load_model(file).loss, loss)

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
        functional, x, _ = fitted(nested)
        cloned = keras.models.clone_model(functional)
        self.assertIs(type(cloned), type(functional.template))
        cloned.set_weights(functional.get_weights())
        close(cloned(x), functional(x))


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
        model.summary(print_fn=lines.append)
        text = "\n".join(lines)
        self.assertIn("tower_1 on /CPU:1 (50% of the rows)", text)
        self.assertIn("conv2d", text)


if __name__ == "__main__":
    absltest.main()
