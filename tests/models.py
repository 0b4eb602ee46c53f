"""The models that every promise is checked on: a new one is one more line."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import towers

layers = keras.layers
DEVICES = ("/CPU:0", "/CPU:1", "/CPU:2", "/CPU:3")
GPUS = ["/GPU:0", "/GPU:1"]  # that are not here


def chain(
    shape: Any, *stack: keras.Layer, dtype: Any = None, name: Any = None
) -> keras.Model:
    """A sequential model of layers, of inputs of such a shape without the rows'."""
    return keras.Sequential(
        [keras.Input(shape, dtype=dtype), *stack], name=name
    )


def cnn() -> keras.Model:
    return chain(
        [8, 8, 2],
        layers.Conv2D(4, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(3),
    )


def recurrent() -> keras.Model:
    return chain([5, 3], layers.LSTM(4), layers.Dense(2))


def attention() -> keras.Model:
    tokens = keras.Input([6], dtype="int32")
    x = layers.Embedding(11, 8, mask_zero=True)(tokens)
    # The key's bias has no gradient on paper; left out, so has it no noise.
    x = layers.MultiHeadAttention(2, 4, use_bias=False)(x, x)
    return keras.Model(tokens, layers.Dense(2)(x))


def two_by_two() -> keras.Model:
    a, b = keras.Input([4], name="a"), keras.Input([3], name="b")
    shared = layers.Dense(5, activation="tanh", kernel_regularizer="l2")
    x = shared(layers.Dense(6)(a))
    y = shared(layers.Dense(6, activity_regularizer="l2")(b))
    both = layers.Concatenate()([x, y])
    return keras.Model(
        {"a": a, "b": b},
        {"sum": layers.Dense(1, name="sum")(both), "rest": layers.Dense(2)(y)},
    )


def nested() -> keras.Model:
    inner = chain(
        [4], layers.Dense(4, activation="relu", name="deep"), name="inner"
    )
    x = keras.Input([4])
    return keras.Model(x, layers.Dense(2)(inner(inner(x)) + keras.ops.sin(x)))


def unrolled() -> keras.Model:
    """Layers that ask for static shapes."""
    return chain(
        [3, 4],
        layers.SimpleRNN(4, unroll=True, return_sequences=True),
        layers.GroupNormalization(2),
        layers.TimeDistributed(layers.Dense(2)),
    )


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = layers.Dense(5, activation="gelu")
        self.out = layers.Dense(2)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.out(self.hidden(x))


def subclassed() -> keras.Model:
    model = Subclassed()
    model(np.zeros([1, 4], "float32"))
    return model


MODELS: list[Callable[[], keras.Model]] = [
    cnn,
    recurrent,
    attention,
    two_by_two,
    nested,
    unrolled,
    subclassed,
]
NAMED = [(m.__name__, m) for m in MODELS]


def make(model: Callable[[], keras.Model], seed: int = 7) -> keras.Model:
    """The model with weights that depend on the seed only."""
    keras.utils.set_random_seed(seed)
    return model()


def leaves(model: keras.Model, prefix: str = "") -> list[str]:
    """Paths of the layers that do something."""
    paths = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            paths += leaves(layer, f"{prefix}{layer.name}/")
        elif not isinstance(layer, layers.InputLayer):
            paths.append(prefix + layer.name)
    return paths


def inputs(model: keras.Model, rows: int) -> object:
    """Random inputs for a model: ints for token ids."""
    rng = np.random.default_rng(rows)

    def one(x: object) -> np.ndarray:
        shape = (rows, *x.shape[1:])
        if x.dtype == "int32":
            return rng.integers(0, 11, shape)
        return rng.normal(size=shape).astype("float32")

    if isinstance(model, Subclassed):
        return rng.normal(size=[rows, 4]).astype("float32")
    if isinstance(model, keras.Sequential):
        return one(model.inputs[0])
    return tf.nest.map_structure(one, model.input)


def targets(model: keras.Model, rows: int) -> object:
    """Random targets like the outputs."""
    rng = np.random.default_rng(rows + 1)
    return tf.nest.map_structure(
        lambda y: rng.normal(size=y.shape).astype("float32"),
        model(inputs(model, rows)),
    )


def placement(
    n: int = 3, weights: object = None, **kwargs: object
) -> towers.Placement:
    return towers.Placement(
        [DEVICES[i % 4] for i in range(n)], weights=weights, **kwargs
    )


def on_gpus(**kwargs: object) -> towers.Placement:
    """Two towers for plans and exports, that do not run here."""
    return towers.Placement(GPUS, available="any", **kwargs)


def close(actual: object, expected: object, tolerance: float = 1e-5) -> None:
    """Equal to float32 rounding, measured against the largest element."""
    actual, expected = (
        [np.asarray(x).astype("float64") for x in tf.nest.flatten(nest)]
        for nest in (actual, expected)
    )
    scale = max([1.0, *(np.abs(e).max(initial=0) for e in expected)])
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * scale)
