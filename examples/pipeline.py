"""A pipeline: stages of a model on devices, micro-batches that follow on.

python examples/pipeline.py
python examples/pipeline.py --pipelines=2

trains on logical CPU devices, which show where things are, and not how fast. On
two machines, or two cores of one, pipelines gain:

taskset -c 0 python -m towers worker --port=2222 --threads=1 &
taskset -c 1 python -m towers worker --port=2223 --threads=1 &
python examples/pipeline.py --workers=127.0.0.1:2222,127.0.0.1:2223 --width=256

All micro-batches of a batch are in flight at once: a stage keeps what it computed
for each of them until their backward pass has come to it.
"""

import statistics
import time

import keras
import numpy as np
from absl import app, flags

import towers

FLAGS = flags.FLAGS
flags.DEFINE_integer("micro_batches", 4, "How many a pipeline has.")
flags.DEFINE_integer("pipelines", 1, "How many share the batch.")
flags.DEFINE_integer("width", 64, "Of the transformer.")
flags.DEFINE_list("workers", [], "Addresses of workers, one for each stage.")


def transformer() -> keras.Model:
    layers, width = keras.layers, FLAGS.width
    keras.utils.set_random_seed(0)
    x = keras.Input([16], dtype="int32")
    y = layers.Embedding(100, width)(x)
    for _ in range(2):
        # The key's bias has no gradient on paper, and noise in its place.
        attention = layers.MultiHeadAttention(4, width // 4, use_bias=False)
        y = layers.LayerNormalization()(y + attention(y, y))
        hidden = layers.Dense(4 * width, activation="gelu")(y)
        y = layers.LayerNormalization()(y + layers.Dense(width)(hidden))
    return keras.Model(x, layers.Dense(100)(y))


def compiled(model: keras.Model) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    return model


def piped(devices: list, micro_batches: int) -> keras.Model:
    model = transformer()
    placement = towers.pipeline(model, devices, micro_batches)
    return compiled(towers.TowerModel(model, placement))


def main(_: list[str]) -> None:
    n = 2 * FLAGS.pipelines
    if FLAGS.workers:
        devices = towers.Cluster(FLAGS.workers).devices("CPU")
        n = len(devices)
    else:
        devices = towers.Placement.cpus(n).devices
    stages = n // FLAGS.pipelines
    lines = [devices[i : i + stages] for i in range(0, n, stages)]
    print(towers.spread_layers(transformer(), lines[0], verbose=False))

    x = np.random.default_rng(0).integers(0, 100, [128, 16])
    plain = compiled(transformer())
    model = piped(lines, FLAGS.micro_batches)
    for m in (plain, model):
        m.fit(x, x, batch_size=32, verbose=0, shuffle=False)
    if FLAGS.workers:
        one = piped(devices[:1], 1)
        taken: dict[keras.Model, list[float]] = {one: [], model: []}
        for k in range(12):
            for m, seconds in taken.items():
                start = time.perf_counter()
                m.train_on_batch(x, x)
                if k > 1:
                    seconds.append(time.perf_counter() - start)
        alone, together = (statistics.median(s) for s in taken.values())
        print(f"{alone / together:.2f} times as fast as one worker")
        return
    difference = max(
        np.abs(a - b).max()
        for a, b in zip(model.get_weights(), plain.get_weights())
    )
    print(f"weights differ by {difference:.1e} from the plain model's")


if __name__ == "__main__":
    app.run(main)
