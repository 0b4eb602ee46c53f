"""The classic Keras CNN on MNIST, trained in towers.

    python examples/mnist_cnn.py --towers=2 --epochs=12

Takes GPUs if there are enough, else logical CPU devices. `--data` is a path to
an .npz with x_train, y_train, x_test and y_test, or "download"; by default it
is the small stratified part of MNIST beside this file.
"""

import pathlib

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import towers

FLAGS = flags.FLAGS
flags.DEFINE_integer("towers", 2, "How many towers.", lower_bound=1)
flags.DEFINE_integer("epochs", 12, "Passes over the data.", lower_bound=1)
flags.DEFINE_string(
    "data",
    str(pathlib.Path(__file__).parent / "mnist_small.npz"),
    'A path to an .npz, or "download".',
)
flags.DEFINE_string("parameter_device", "/CPU:0", "Where variables live.")


def load(data: str) -> tuple[np.ndarray, ...]:
    """Images as float32 [n, 28, 28, 1] in 0..1, labels as ints [n]."""
    if data == "download":
        (x, y), (x_test, y_test) = keras.datasets.mnist.load_data()
    else:
        with np.load(data) as arrays:
            x, y, x_test, y_test = (
                arrays[k] for k in ("x_train", "y_train", "x_test", "y_test")
            )

    def images(pixels: np.ndarray) -> np.ndarray:
        return pixels[..., None].astype("float32") / 255

    return images(x), y, images(x_test), y_test


def cnn() -> keras.Model:
    """The CNN of Keras's MNIST example."""
    return keras.Sequential(
        [
            keras.Input([28, 28, 1]),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Dropout(0.25),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


def place(n: int, parameter_device: str) -> towers.Placement:
    """`n` GPUs if there are as many, else `n` logical CPU devices."""
    enough = len(tf.config.list_physical_devices("GPU")) >= n
    devices = towers.Placement.gpus if enough else towers.Placement.cpus
    return devices(n, parameter_device=parameter_device)


def main(_: list[str]) -> None:
    placement = place(FLAGS.towers, FLAGS.parameter_device)
    print(placement)
    keras.utils.set_random_seed(0)
    x, y, x_test, y_test = load(FLAGS.data)
    model = towers.TowerModel(cnn(), placement)
    model.compile(
        keras.optimizers.Adadelta(learning_rate=1.0),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    model.fit(x, y, batch_size=128, epochs=FLAGS.epochs)
    _, accuracy = model.evaluate(x_test, y_test, verbose=0)
    print(f"Test accuracy: {accuracy:.4f}")


if __name__ == "__main__":
    app.run(main)
