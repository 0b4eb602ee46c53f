"""whole_call: what Keras refuses is refused as it was given, not as a shard."""

import functools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import placement

import towers

layers = keras.layers


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.out = layers.Dense(2)

    def call(self, x):
        return self.out(x)


class Checked(Subclassed):
    """As people write them who want to see shapes."""

    def call(self, x):
        if x.shape[1] != 4:
            raise TypeError(f"This takes 4 features; got {x.shape}")
        return self.out(x)


def subclassed(kind=Subclassed):
    model = kind()
    model(np.ones([2, 4]))
    return model


def functional():
    x = keras.Input([4])
    return keras.Model(x, layers.Dense(2)(x))


def sequential(*shape):
    first = [] if len(shape) < 2 else [layers.Conv2D(2, 3), layers.Flatten()]
    return keras.Sequential([keras.Input(shape), *first, layers.Dense(2)])


def two():
    x, y = keras.Input([4], name="a"), keras.Input([3], name="b")
    both = layers.Concatenate()([x, y])
    return keras.Model([x, y], layers.Dense(2)(both))


def recurrent():
    return keras.Sequential([keras.Input([5, 3]), layers.LSTM(2)])


def nested():
    return keras.Sequential([keras.Input([4]), functional()])


def ones(*shape):
    return np.ones(shape, "float32")


GIVEN = [
    ("width", lambda: sequential(4), ones(6, 5)),
    ("width_of_a_functional_one", functional, ones(6, 5)),
    ("width_of_a_subclassed_one", subclassed, ones(6, 5)),
    ("width_of_one_inside", nested, ones(6, 5)),
    ("width_of_one_of_two", two, [ones(6, 4), ones(6, 4)]),
    ("channels", lambda: sequential(8, 8, 1), ones(6, 8, 8, 3)),
    ("rank", functional, ones(6, 4, 4)),
    ("rank_of_rows", lambda: sequential(4), ones(6)),
    ("rank_of_a_subclassed_one", subclassed, ones(6)),
    ("steps", recurrent, ones(6, 3)),
    ("features", recurrent, ones(6, 5, 4)),
    ("of_ones_own", lambda: subclassed(Checked), ones(6, 5)),
]
UNBATCHED = [
    ("sequential", lambda: sequential(4), ones(6, 4)),
    ("subclassed", subclassed, ones(6, 4)),
    ("convolution", lambda: sequential(8, 8, 1), ones(6, 8, 8, 1)),
]


def error_text(call):
    """What is said, without names of tensors and who called whom."""
    try:
        call()
    except Exception as error:
        text = str(error).split("Arguments received")[0]
        text = re.sub(r"Exception encountered .*\n|\x1b\[\d*m", "", text)
        return re.sub(r"Tensor\(\S*|\{\{.*?\)'", "", text).strip()
    raise AssertionError("nothing was refused")


class GivenTest(parameterized.TestCase):
    @parameterized.named_parameters(*GIVEN)
    @pytest.mark.rare(after=5)
    def test_it_is_as_plain_keras_says_it(self, make, x):
        plain = make()
        towered = towers.TowerModel(plain, placement(3, [3, 2, 1]))
        y = np.ones([6, 2])
        plain.compile("sgd", "mse")
        towered.compile("sgd", "mse")
        expected = error_text(lambda: plain.predict(x, verbose=0))
        self.assertRegex(expected, r"[\(\[]6, |\(6,\)|\b[34] and [34]\b")
        for call in (
            lambda: towered.predict(x, verbose=0),
            lambda: towered(x),
            lambda: towers.build_towers(plain, x, towered.placement),
        ):
            self.assertEqual(error_text(call), expected)
        fit, expected = (
            error_text(functools.partial(model.fit, x, y, 6, verbose=0))
            for model in (towered, plain)
        )
        self.assertEqual(fit, expected)

    @parameterized.named_parameters(*UNBATCHED)
    def test_so_are_datasets_that_have_no_batches(self, make, x):
        plain = make()
        towered = towers.TowerModel(plain, placement(2))
        data = tf.data.Dataset.from_tensor_slices((x, ones(6, 2)))
        for model in (plain, towered):
            model.compile("sgd", "mse")
        expected = error_text(lambda: plain.evaluate(data, verbose=0))
        for verb in (towered.evaluate, towered.fit):
            call = functools.partial(verb, data, verbose=0)
            self.assertEqual(error_text(call), expected)

    def test_so_is_what_the_losses_of_towers_are_given(self):
        model = sequential(8, 8, 1)
        model = towers.TowerModel(model, placement(2), loss_on_towers=True)
        model.compile("sgd", "mse")
        data = ones(6, 8, 8, 3), ones(6, 2)
        with self.assertRaisesRegex(ValueError, r"shape \(6, 8, 8, 3\)"):
            model.train_on_batch(*data)

    def test_what_is_of_towers_only_stays(self):
        class Counting(layers.Layer):
            def call(self, x):
                if x.shape[0] == 2:
                    raise RuntimeError("two rows")
                return x

        model = keras.Sequential([keras.Input([3]), Counting()])
        with self.assertRaisesRegex(RuntimeError, "two rows"):
            towers.build_towers(model, ones(4, 3), placement(2))
