"""Step time of towers against the plain model and MirroredStrategy.

    python examples/step_time.py --model=cnn

Stock `fit` steps on two logical CPU devices, in interleaved rounds; prints the
median and quartiles of each ratio over the rounds.
"""

import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import towers

layers = keras.layers
FLAGS = flags.FLAGS
flags.DEFINE_enum("model", "cnn", ["cnn", "lstm"], "What is trained.")
flags.DEFINE_integer("rounds", 25, "Interleaved rounds.", lower_bound=1)
flags.DEFINE_integer("steps", 8, "Steps per round.", lower_bound=1)


def cnn() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input([28, 28, 1]),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )


def lstm() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input([20, 32]),
            layers.LSTM(64, return_sequences=True),
            layers.GRU(64),
            layers.Dense(10, activation="softmax"),
        ]
    )


def compiled(model: keras.Model) -> keras.Model:
    model.compile(
        keras.optimizers.SGD(0.01),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def main(_: list[str]) -> None:
    two = towers.Placement.cpus(2)
    one = towers.Placement(["/CPU:0"])
    make = {"cnn": cnn, "lstm": lstm}[FLAGS.model]
    strategy = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
    with strategy.scope():
        mirrored = compiled(make())
    models = {
        "plain": compiled(make()),
        "one tower": compiled(towers.TowerModel(make(), one)),
        "two towers": compiled(towers.TowerModel(make(), two)),
        "mirrored": mirrored,
    }
    rng = np.random.default_rng(0)
    x = rng.normal(size=[64, *models["plain"].input_shape[1:]])
    data = tf.data.Dataset.from_tensor_slices(
        (x.astype("float32"), rng.integers(0, 10, 64))
    )
    data = data.batch(64).cache().repeat()
    batches = {}
    for name, model in models.items():
        model.fit(data, steps_per_epoch=3, verbose=0)
        spread = name == "mirrored"
        batches[name] = iter(
            strategy.experimental_distribute_dataset(data) if spread else data
        )

    def seconds(name: str) -> float:
        start = time.perf_counter()
        for _ in range(FLAGS.steps):
            logs = models[name].train_function(batches[name])
        float(logs["loss"])  # wait for it
        return (time.perf_counter() - start) / FLAGS.steps

    times = {name: [] for name in models}
    for i in range(FLAGS.rounds + 1):
        for name in list(models)[:: 1 if i % 2 else -1]:
            took = seconds(name)
            if i:  # the first round warms up
                times[name].append(took)
    for a, b in (
        ("one tower", "plain"),
        ("two towers", "plain"),
        ("two towers", "mirrored"),
    ):
        ratios = np.divide(times[a], times[b])
        low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        print(f"{a} / {b}: {median:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    app.run(main)
