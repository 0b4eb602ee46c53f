"""What a cluster that is not here would send: a plan of towers in many machines.

    python examples/planned_cluster.py --model=bert --machines=1,4,8

Nothing runs, so any machine will do. A row for each number of machines and each place
of the parameters: transfers between devices, and what the busiest machine's network
carries in a step with a row for each tower; beside it what a formula says: a variable
goes once to each other machine, and from each comes one sum of its gradients.
"""

import collections
import math
import re
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import towers

layers = keras.layers

flags.DEFINE_enum("model", "bert", ["bert", "resnet50"], "What is trained.")
flags.DEFINE_list("machines", ["1"], "How many there are.")
flags.DEFINE_integer("gpus", 8, "Of each machine, a tower for each.")
flags.DEFINE_integer(
    "planned", 8, "Of more machines, only the formula is told."
)


class Places(layers.Layer):
    """Adds to each word what its place in the text says."""

    def __init__(self, words: int, width: int):
        super().__init__()
        self.table = layers.Embedding(words, width)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x + self.table(tf.range(x.shape[1]))


def bert(words: int = 128, width: int = 512, depth: int = 4) -> keras.Model:
    """The encoder of BERT small, by which a text is one of two kinds."""
    text = keras.Input([words], dtype="int32")
    x = Places(words, width)(layers.Embedding(30522, width)(text))
    for _ in range(depth):
        heard = layers.MultiHeadAttention(8, width // 8)(x, x)
        x = layers.LayerNormalization()(x + heard)
        inner = layers.Dense(4 * width, activation="gelu")(x)
        x = layers.LayerNormalization()(x + layers.Dense(width)(inner))
    return keras.Model(text, layers.Dense(2)(x[:, 0]))


def resnet50() -> keras.Model:
    return keras.applications.ResNet50(weights=None)


def names(machines: int, gpus: int) -> list[str]:
    return [
        f"/job:worker/task:{i}/GPU:{k}"
        for i in range(machines)
        for k in range(gpus)
    ]


def homes(machines: int, gpus: int) -> dict[str, Callable | str]:
    """Where parameters may live."""
    cpus = [f"/job:worker/task:{i}/CPU:0" for i in range(machines)]
    return {
        "the chief": "/CPU:0",
        "a CPU of each machine": towers.balanced(cpus),
        "all GPUs": towers.balanced(names(machines, gpus)),
    }


def sizes(model: keras.Model, gpus: int) -> Iterator[tuple[int, int]]:
    """Bytes of each variable, and of a machine's gradients of it."""
    rows = gpus * model.input_shape[1]  # that a machine reads of a table
    trained = {id(v) for v in model.trainable_variables}
    for v in model.variables:
        size = 4 * v.shape.num_elements()
        if v.path.endswith("embeddings"):
            yield size, rows * (size // v.shape[0] + 4)
        else:
            yield size, size * (id(v) in trained)


def formula(
    model: keras.Model, home: Callable | str, machines: int, gpus: int
) -> tuple[int, int]:
    """Bytes that the busiest machine sends and receives; -1 is the chief."""
    sent: collections.Counter = collections.Counter()
    received: collections.Counter = collections.Counter()
    variables = model.variables
    devices = home(variables) if callable(home) else [home] * len(variables)
    for device, (size, gradients) in zip(devices, sizes(model, gpus)):
        match = re.search(r"task:(\d+)", device)
        owner = int(match[1]) if match else -1
        for machine in set(range(machines)) - {owner}:
            sent[owner] += size
            received[machine] += size
            sent[machine] += gradients
            received[owner] += gradients
    count = 4 * machines * gpus
    outputs = count * math.prod(model.output_shape[1:])
    sent[-1] += count * math.prod(model.input_shape[1:]) + outputs
    received[-1] += outputs
    busiest = max(
        received, key=lambda machine: sent[machine] + received[machine]
    )
    return sent[busiest], received[busiest]


def planned(
    model: keras.Model, home: Callable | str, machines: int, gpus: int
) -> towers.PlacementPlan:
    """The plan of a step with a row for each tower."""
    placement = towers.Placement(
        names(machines, gpus),
        parameter_device=home,
        output_device="/CPU:0",
        available="any",
    )
    model = towers.TowerModel(model, placement)
    model.compile("sgd", "sparse_categorical_crossentropy")
    x = np.zeros(
        [machines * gpus, *model.input_shape[1:]], model.inputs[0].dtype
    )
    y = np.zeros([len(x)], "int32")
    machine = [{"CPU": 1, "GPU": gpus}] * machines
    return towers.placement_plan(model, x, y, machine=machine)


def main(_: list[str]) -> None:
    options = flags.FLAGS
    make = {"bert": bert, "resnet50": resnet50}[options.model]
    print("| towers | parameters on | transfers | sent | received | formula |")
    print("| --- | --- | --- | --- | --- | --- |")
    for machines in map(int, options.machines):
        for name, home in homes(machines, options.gpus).items():
            model, cells = make(), ["", "", ""]
            numbers = formula(model, home, machines, options.gpus)
            if machines <= options.planned:
                plan = planned(model, home, machines, options.gpus)
                _, *crossed = plan.busiest_link or ("", 0, 0)
                cells = [f"{len(plan.transfers):,}", *map(megabytes, crossed)]
            row = [f"{machines * options.gpus}", name, *cells]
            print(
                "|", " | ".join([*row, ", ".join(map(megabytes, numbers))]), "|"
            )


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


if __name__ == "__main__":
    app.run(main)
