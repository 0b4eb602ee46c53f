"""What benchmark.py measures: four models, each trained in four ways."""

from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

import towers

layers = keras.layers
VOCABULARY = 100_000
CLASSES = 10


def cnn(width: int) -> keras.Model:
    """Convolutions, and one layer with most of the weights."""
    return keras.Sequential(
        [
            keras.Input([28, 28, 1]),
            layers.Conv2D(width, 3, activation="relu"),
            layers.Conv2D(2 * width, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(4 * width, activation="relu"),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )


def lstm(width: int) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input([20, 32]),
            layers.LSTM(2 * width, return_sequences=True),
            layers.LSTM(2 * width),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )


def resnet(width: int) -> keras.Model:
    """Residual blocks with batch normalisation."""

    def normed(x: tf.Tensor, filters: int, strides: int = 1) -> tf.Tensor:
        x = layers.Conv2D(filters, 3, strides, "same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    image = keras.Input([32, 32, 3])
    x = layers.ReLU()(normed(image, width))
    for filters, strides in [(width, 1), (2 * width, 2), (4 * width, 2)]:
        y = layers.ReLU()(normed(x, filters, strides))
        y = normed(y, filters)
        if strides > 1:
            x = layers.Conv2D(filters, 1, strides)(x)
        x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(CLASSES, activation="softmax")(x))


def embedding(width: int) -> keras.Model:
    """A large table of which a step needs a few rows."""
    return keras.Sequential(
        [
            keras.Input([64], dtype="int32"),
            layers.Embedding(VOCABULARY, width),
            layers.GlobalAveragePooling1D(),
            layers.Dense(2 * width, activation="relu"),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )


def pooled(width: int) -> keras.Model:
    """A CNN that computes much and has few weights."""
    return keras.Sequential(
        [
            keras.Input([28, 28, 1]),
            layers.Conv2D(width, 3, activation="relu"),
            layers.Conv2D(2 * width, 3, activation="relu"),
            layers.Conv2D(2 * width, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )


def dense(width: int) -> keras.Model:
    """Little to compute for many weights: 16.8 MB at a width of 32."""
    return keras.Sequential(
        [
            keras.Input([1024]),
            layers.Dense(64 * width, activation="relu"),
            layers.Dense(32 * width, activation="relu"),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )


def resnet50(width: int) -> keras.Model:
    """Of one size: for how long it takes to build. Not measured unasked."""
    del width
    return keras.applications.ResNet50(
        weights=None, input_shape=(32, 32, 3), classes=CLASSES
    )


MODELS = {"cnn": cnn, "lstm": lstm, "resnet": resnet, "embedding": embedding}
ALL = {**MODELS, "pooled": pooled, "dense": dense, "resnet50": resnet50}


def batches(model: keras.Model, rows: int) -> tf.data.Dataset:
    """The same random batch without end."""
    rng = np.random.default_rng(0)
    (spec,) = model.inputs
    shape = [rows, *spec.shape[1:]]
    if spec.dtype == "int32":
        x = rng.integers(0, VOCABULARY, shape, "int32")
    else:
        x = rng.normal(size=shape).astype("float32")
    data = tf.data.Dataset.from_tensor_slices(
        (x, rng.integers(0, CLASSES, rows))
    )
    return data.batch(rows).cache().repeat()


class OnDevice(layers.Layer):
    """Calls a model under a device.

    Keras 3 forgets a `tf.device` around symbolic calls, so that all of the
    classic algorithm would run on one device: it is entered at the call.
    """

    def __init__(self, model: keras.Model, device: str):
        super().__init__()
        self.model = model
        self.device = device

    def call(self, x: tf.Tensor) -> tf.Tensor:
        with tf.device(self.device):
            return self.model(x)


def split_and_concat(model: keras.Model, devices: Sequence[str]) -> keras.Model:
    """The algorithm of Keras 2's `multi_gpu_model`."""

    def shard(x: tf.Tensor, i: int) -> tf.Tensor:
        size = tf.shape(x)[0] // len(devices)
        return x[i * size :] if i == len(devices) - 1 else x[i * size :][:size]

    (spec,) = model.inputs
    x = keras.Input(spec.shape[1:], dtype=spec.dtype)
    outputs = []
    for i, device in enumerate(devices):
        rows = layers.Lambda(shard, spec.shape[1:], arguments={"i": i})(x)
        outputs.append(OnDevice(model, device)(rows))
    with tf.device("/CPU:0"):
        return keras.Model(x, layers.Concatenate(axis=0)(outputs))


def compiled(model: keras.Model, jit: bool = False) -> keras.Model:
    # XLA, which Keras takes on GPUs, makes one device of all but towers.
    model.compile(
        keras.optimizers.SGD(0.01),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=jit,
    )
    return model


def contender(
    kind: str, make: Callable[[], keras.Model], devices: Sequence[str]
) -> keras.Model:
    """The model, compiled, to be trained on the devices in the given way."""
    if kind == "mirrored":
        with tf.distribute.MirroredStrategy(devices).scope():
            return compiled(make())
    model = make()
    if kind.startswith(("towers", "balanced")):
        even = towers.balanced(devices) if kind == "balanced" else "/CPU:0"
        placement = towers.Placement(devices, parameter_device=even)
        model = towers.TowerModel(
            model, placement, quick_start=kind == "towers_quick"
        )
    elif kind == "classic":
        model = split_and_concat(model, devices)
    return compiled(model, jit=kind.endswith("_jit"))
