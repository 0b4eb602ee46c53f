"""Random models, and what people do with them, each drawn from a number.

`drawn(seed)` is always the same `Drawn`; its `str` tells how it came out.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from models import DEVICES

import towers

layers, ops = keras.layers, keras.ops
# What an input is: of [rows, 5], [rows, 6, 4], [rows, 6, 6, 2], or ids [rows, 7].
_INPUTS = {
    "vector": ((5,), "float32"),
    "sequence": ((6, 4), "float32"),
    "image": ((6, 6, 2), "float32"),
    "ids": ((7,), "int32"),
}
# Nests in which outputs are declared, by how many there are.
_NESTS: dict[int, list[Any]] = {
    1: [0, [0], (0,), {"a": 0}, [[0]], {"a": [0]}, [{"a": 0}]],
    2: [[0, 0], (0, 0), {"b": 0, "a": 0}, [0, [0]], {"a": 0, "c": [0]}],
    3: [[0, 0, 0], {"a": 0, "b": [0, 0]}, [0, {"a": 0, "b": 0}], [0, (0, 0)]],
}


class Penalty(layers.Layer):
    """Adds a loss: a mean over rows, or of its weight."""

    def __init__(self, of_weight: bool) -> None:
        super().__init__()
        self.of_weight = of_weight

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x: Any) -> Any:
        y = x * self.scale
        self.add_loss(
            0.1 * ops.sum(ops.square(self.scale if self.of_weight else 0.0))
        )
        self.add_loss(0.1 * ops.mean(ops.square(y)))
        return y


class Wrapped(keras.Model):
    """A model of somebody's own, around one that is a graph."""

    def __init__(self, inner: keras.Model) -> None:
        super().__init__()
        self.inner = inner

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.inner(inputs, training=training)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A model, its data, its towers and how it is compiled.

    Attributes:
      model: makes it, with the same weights each time.
      x, y, sample_weight: arrays for `fit`.
      placement: where its towers are.
      options: of `TowerModel`.
      compile: makes arguments of `compile`.
      batch_size: that of `fit`.
      words: how each came out.
    """

    model: Callable[[], keras.Model]
    x: Any
    y: Any
    sample_weight: Any
    placement: towers.Placement
    options: dict[str, Any]
    compile: Callable[[], dict[str, Any]]
    batch_size: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.words)


def drawn(seed: int) -> Drawn:
    """The model of this number."""
    return _Draw(seed).all()


class _Draw:
    """Dice, and a record of how they fell."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.words: list[str] = []

    def one_of(self, what: str, choices: Any) -> Any:
        chosen = list(choices)[self.rng.integers(len(list(choices)))]
        self.words.append(f"{what} {chosen}")
        return chosen

    def maybe(self, what: str, chance: float) -> bool:
        falls = bool(self.rng.random() < chance)
        if falls:
            self.words.append(what)
        return falls

    def all(self) -> Drawn:
        rows = int(self.rng.integers(7, 14))
        kinds = [
            self.one_of("input", _INPUTS)
            for _ in range(self.one_of("inputs", (1, 1, 1, 2)))
        ]
        count = self.one_of("outputs", (1, 1, 2, 3))
        nest = self.one_of("in", _NESTS[count])
        model = self._model(kinds, nest)
        keys = self.one_of("fed as", ("list", "dict")) if kinds[1:] else "bare"
        arrays = [self._array(rows, *_INPUTS[kind]) for kind in kinds]
        x = {
            "bare": arrays[0],
            "list": arrays,
            "dict": {f"x{i}": a for i, a in enumerate(arrays)},
        }[keys]
        targets = [self._array(rows, (2,), "float32") for _ in range(count)]
        y = tf.nest.pack_sequence_as(nest, targets)
        if count == 1 and self.maybe("bare target", 0.6):
            y = targets[0]
        weights = None
        if self.maybe("sample weights", 0.3):
            weights = self.rng.uniform(size=[rows]).astype("float32")
        placement = self._placement()
        options = self._options()
        return Drawn(
            model,
            x,
            y,
            weights,
            placement,
            options,
            self._compiled(nest, count),
            int(self.one_of("batch", (1, 4, 5, 6))),
            (f"seed {self.seed}", f"{rows} rows", *self.words),
        )

    def _array(self, rows: int, shape: Any, dtype: str) -> np.ndarray:
        if dtype == "int32":
            return self.rng.integers(0, 11, (rows, *shape)).astype(dtype)
        return self.rng.normal(size=(rows, *shape)).astype(dtype)

    # ------------------------------------------------------------- the model
    def _model(self, kinds: list[str], nest: Any) -> Callable[[], keras.Model]:
        """A factory: branches, joined, with a head for each output."""
        branches = [list(self._branch(kind)) for kind in kinds]
        join = self.one_of("joined by", ("concatenate", "add", "multiply"))
        trunk = list(self._trunk())
        flat = tf.nest.flatten(nest)
        heads = [
            self.one_of("head", ("linear", "tanh", "softmax", "sigmoid"))
            for _ in flat
        ]
        around = self.one_of(
            "around it", ("nothing", "nothing", "a class", "a model", "a stack")
        )
        if kinds[1:] and around == "a stack":
            around = "nothing"

        def model() -> keras.Model:
            keras.utils.set_random_seed(self.seed)
            inputs = [
                keras.Input(shape, dtype=dtype, name=f"x{i}")
                for i, (shape, dtype) in enumerate(map(_INPUTS.get, kinds))
            ]
            ends = []
            for x, branch in zip(inputs, branches, strict=True):
                for layer in branch:
                    x = layer()(x)
                ends.append(layers.Dense(6)(x))
            x = ends[0]
            if ends[1:]:
                x = getattr(layers, join)(ends)
            for layer in trunk:
                y = layer()(x)
                x = y + x if y.shape == x.shape else y
            outputs = [
                layers.Dense(2, head, name=name)(x)
                for head, name in zip(heads, "abc", strict=False)
            ]
            outputs = tf.nest.pack_sequence_as(nest, outputs)
            given = inputs if kinds[1:] else inputs[0]
            graph = keras.Model(given, outputs, name="graph")
            return _around(graph, around)

        return model

    def _branch(self, kind: str) -> Iterator[Callable[[], Any]]:
        """Factories of layers, from an input to a vector per row."""
        if kind == "ids":
            masked = self.maybe("masked", 0.5)
            yield lambda: layers.Embedding(11, 4, mask_zero=masked)
            kind = "sequence"
        if kind == "sequence":
            if self.maybe("an RNN first", 0.3):
                yield lambda: layers.SimpleRNN(4, return_sequences=True)
            yield {
                "LSTM": lambda: layers.LSTM(4),
                "GRU": lambda: layers.GRU(3, go_backwards=True),
                "both ways": lambda: layers.Bidirectional(layers.SimpleRNN(3)),
                "pooling": layers.GlobalAveragePooling1D,
                "flat": lambda: keras.Sequential(
                    [layers.Conv1D(4, 3), layers.Flatten()]
                ),
            }[self._of_sequences()]
        if kind == "image":
            if self.maybe("separable", 0.3):
                yield lambda: layers.SeparableConv2D(3, 3, activation="relu")
            else:
                yield lambda: layers.Conv2D(3, 3, padding="same")
            yield self.one_of("pool", (_max_pooling, layers.AveragePooling2D))
            yield layers.Flatten

    def _of_sequences(self) -> str:
        choices = ["LSTM", "GRU", "both ways", "pooling"]
        if "masked" not in self.words:
            choices.append("flat")
        return self.one_of("by", choices)

    def _trunk(self) -> Iterator[Callable[[], Any]]:
        for _ in range(self.one_of("depth", (0, 1, 2))):
            yield {
                "dense": lambda: layers.Dense(6, "relu"),
                "norm": layers.LayerNormalization,
                "regular": lambda: layers.Dense(
                    6, kernel_regularizer="l2", activity_regularizer="l2"
                ),
                "loss": lambda: Penalty(False),
                "loss of weights": lambda: Penalty(True),
                "batch norm": lambda: layers.BatchNormalization(
                    synchronized=True
                ),
                "units": lambda: layers.UnitNormalization(),
                "frozen": lambda: layers.Dense(5, trainable=False),
            }[
                self.one_of(
                    "layer",
                    (
                        *("dense", "norm", "regular", "loss", "units"),
                        *("loss of weights", "batch norm", "frozen"),
                    ),
                )
            ]

    # ------------------------------------------------- how it is trained, where
    def _compiled(self, nest: Any, count: int) -> Callable[[], dict[str, Any]]:
        each = [
            self.one_of("loss", ("mse", "mae", "huber")) for _ in range(count)
        ]
        how = self.one_of("losses as", ("string", "nest", "list"))
        losses = {
            "string": each[0],
            "nest": tf.nest.pack_sequence_as(nest, each),
            "list": each,
        }[how]
        weights = None
        if how == "nest" and self.maybe("loss weights", 0.4):
            weights = tf.nest.map_structure(lambda _: 0.5, nest)
        metrics = None
        if self.maybe("metrics", 0.5):
            metrics = tf.nest.map_structure(lambda _: "mae", nest)
        if how == "string" and count > 1:
            losses = tf.nest.map_structure(lambda _: each[0], nest)
        optimizer = self.one_of("with", ("sgd", "momentum", "adagrad"))
        accumulated = self.maybe("accumulated gradients", 0.1)
        clipped = self.maybe("clipped", 0.2)

        def compiled() -> dict[str, Any]:
            further: dict[str, Any] = (
                {"global_clipnorm": 0.5} if clipped else {}
            )
            if accumulated:
                further["gradient_accumulation_steps"] = 2
            if optimizer == "momentum":
                chosen = keras.optimizers.SGD(0.05, 0.9, **further)
            else:
                kind = {"sgd": "SGD", "adagrad": "Adagrad"}[optimizer]
                chosen = getattr(keras.optimizers, kind)(0.05, **further)
            return {
                "optimizer": chosen,
                "loss": losses,
                "loss_weights": weights,
                "metrics": metrics,
            }

        return compiled

    def _placement(self) -> towers.Placement:
        count = self.one_of("towers", (1, 2, 2, 3, 4))
        weights = None
        if self.maybe("unequal", 0.4):
            weights = self.rng.integers(1, 4, count).tolist()
            self.words.append(f"weights {weights}")
        devices = list(DEVICES[:count])
        if self.maybe("two on a device", 0.1):
            devices[-1] = devices[0]
        where: dict[str, Any] = {"parameter_device": "/CPU:0"}
        if self.maybe("balanced", 0.3):
            where["parameter_device"] = towers.balanced(devices)
        if self.maybe("outputs elsewhere", 0.2):
            where["output_device"] = DEVICES[3]
        if self.maybe("a pinned head", 0.2):
            where["layer_devices"] = {"a": DEVICES[self.rng.integers(4)]}
        return towers.Placement(devices, weights=weights, **where)

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.maybe("quick start", 0.2):
            options["quick_start"] = True
        if self.maybe("prefetch", 0.2):
            options["prefetch"] = True
        options["loss_on_towers"] = self.one_of(
            "loss on towers", (False, False, True, "auto")
        )
        return options


def _around(graph: keras.Model, around: str) -> keras.Model:
    if around == "a class":
        model = Wrapped(graph)
        model(
            tf.nest.map_structure(
                lambda x: np.zeros([1, *x.shape[1:]], x.dtype), graph.input
            )
        )
        return model
    if around == "a model":
        again = tf.nest.map_structure(
            lambda x: keras.Input(x.shape[1:], dtype=x.dtype, name=x.name),
            graph.input,
        )
        return keras.Model(again, graph(again), name="around")
    if around == "a stack":
        first = graph.inputs[0]
        start = keras.Input(first.shape[1:], dtype=first.dtype)
        return keras.Sequential([start, graph])
    return graph


def _max_pooling() -> layers.Layer:
    return layers.MaxPooling2D()
