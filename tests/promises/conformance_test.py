"""What Keras does with a model, it does with towers: plain against towered.

A new feature of Keras is one more line in one of the lists below.
"""

import csv
import dataclasses
import os
import tempfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized
from models import chain, close, make, placement

import towers

layers, optimizers = keras.layers, keras.optimizers
ROWS = 11  # batches of 4, 4 and 3 rows, on 3 towers
RNG = np.random.default_rng(0)
X = RNG.normal(size=[ROWS, 6]).astype("float32")
Y = RNG.normal(size=[ROWS, 2]).astype("float32")
CLASSES = RNG.integers(0, 2, [ROWS])
IDS = RNG.integers(1, 9, [ROWS, 6]).astype("int32")
SEQUENCE = RNG.normal(size=[ROWS, 4, 3]).astype("float32")
WEIGHTS = RNG.uniform(size=[ROWS])


def dense() -> keras.Model:
    return chain([6], layers.Dense(2))


def two_layers() -> keras.Model:
    return chain([6], layers.Dense(5, "tanh"), layers.Dense(2))


def sequential(*stack: Any, shape: Any = (6,), **kwargs: Any) -> Callable:
    """A factory; `stack` are factories of layers."""

    def model() -> keras.Model:
        start = keras.Input(shape, **kwargs)
        return keras.Sequential([start, *(layer() for layer in stack)])

    return model


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, what it is compiled with and what it is fitted to."""

    model: Callable[[], keras.Model] = dense
    x: Any = dataclasses.field(default_factory=lambda: X)
    y: Any = dataclasses.field(default_factory=lambda: Y)
    compile: Callable[[], dict[str, Any]] = dict
    fit: Callable[[], dict[str, Any]] = dict
    tolerance: float = 1e-5
    built: bool = False  # whether the optimizer is, before `fit`
    answers: bool = False  # whether it predicts and evaluates as well
    placed: Callable[[], dict[str, Any]] = dict  # further of `placement`


def run(case: Case, wrap: bool, loss_on_towers: bool = False) -> Any:
    """(history, weights) and maybe (predictions, evaluation) of a model.

    The plain one runs op by op: it takes two steps of each kind, and a trace
    takes as long as a hundred. Not with several outputs, whose losses Keras
    weighs by rows there, and not in a graph.
    """
    model = make(case.model)
    optimizer = {"optimizer": optimizers.SGD(0.1, 0.5), "loss": "mse"}
    optimizer = {**optimizer, **case.compile()}
    if wrap:
        where = placement(3, [2, 1, 1], **case.placed())
        model = towers.TowerModel(model, where, loss_on_towers=loss_on_towers)
        model.compile(**optimizer)
    else:
        eagerly = (
            {} if isinstance(case.y, (dict, list)) else {"run_eagerly": True}
        )
        model.compile(**{**optimizer, **eagerly})
    if case.built:
        model.optimizer.build(model.trainable_variables)
    data = {"x": case.x, "y": case.y, "batch_size": 4, "shuffle": False}
    fit = {**data, "epochs": 2, "verbose": 0, **case.fit()}
    history = model.fit(**{k: v for k, v in fit.items() if v is not None})
    variables = [v.numpy() for v in model.variables]
    if not case.answers or loss_on_towers:
        return history.history, variables
    return (
        history.history,
        variables,
        model.predict(fit["x"], verbose=0),
        model.evaluate(fit["x"], fit["y"], batch_size=5, verbose=0),
    )


def assert_same(actual: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_array_equal(list(actual[0]), list(expected[0]))
    for key, values in expected[0].items():
        close(actual[0][key], values, tolerance)
    for a, e in zip(actual[1:], expected[1:]):
        close(a, e, tolerance)


# ---------------------------------------------------------------- optimizers
def optimizer(make_one: Callable[[], Any], **kwargs: Any) -> Case:
    """With each variable, its slots and its update on one of two devices."""
    return Case(
        compile=lambda: {"optimizer": make_one()},
        placed=lambda: {
            "parameter_device": towers.round_robin(["/CPU:1", "/CPU:3"])
        },
        **kwargs,
    )


OPTIMIZERS = {
    name: optimizer(
        lambda name=name: getattr(optimizers, name)(0.05), tolerance=1e-4
    )
    for name in sorted(dir(optimizers))
    if isinstance(getattr(optimizers, name), type)
    and issubclass(getattr(optimizers, name), optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
} | {
    name: optimizer(lambda kw=kw: optimizers.SGD(0.1, momentum=0.5, **kw))
    for name, kw in {
        "clipnorm": {"clipnorm": 0.1},
        "clipvalue": {"clipvalue": 0.01},
        "global_clipnorm": {"global_clipnorm": 0.1},
        "weight_decay": {"weight_decay": 0.1},
        "ema": {"use_ema": True, "ema_momentum": 0.5},
        "ema_overwritten": {"use_ema": True, "ema_overwrite_frequency": 2},
        "accumulated": {"gradient_accumulation_steps": 2},
        "nesterov": {"nesterov": True},
    }.items()
}
# What it assigns to its slots when it is built is lost where that is while a step
# is traced, see `tower_model_test`, and not in a plain model that runs eagerly.
if "ScheduleFreeAdamW" in OPTIMIZERS:
    OPTIMIZERS["ScheduleFreeAdamW"] = dataclasses.replace(
        OPTIMIZERS["ScheduleFreeAdamW"], built=True
    )
if hasattr(optimizers, "MultiOptimizer"):
    OPTIMIZERS["MultiOptimizer"] = optimizer(
        lambda: optimizers.MultiOptimizer(
            optimizers.OptimizerMap(optimizers.SGD(0.1))
        )
    )
OPTIMIZERS["schedule"] = optimizer(
    lambda: optimizers.SGD(optimizers.schedules.ExponentialDecay(0.1, 2, 0.5))
)
OPTIMIZERS["loss_scale"] = optimizer(
    lambda: optimizers.LossScaleOptimizer(
        optimizers.Adam(0.01), initial_scale=256.0, dynamic_growth_steps=2
    )
)


# ---------------------------------------------------------------------- data
class Batches(keras.utils.PyDataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Any:
        return X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]


def generator() -> Any:
    while True:
        for i in range(3):
            yield X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]


def fitted(**fit: Any) -> Case:
    return Case(fit=lambda: fit)


def data(x: Any, **fit: Any) -> Case:
    return Case(
        x=None,
        y=None,
        fit=lambda: {"x": x(), "y": None, "batch_size": None, **fit},
    )


DATA = {
    "numpy": Case(answers=True),
    "tf_data": data(
        lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    ),
    "tf_data_with_weights": data(
        lambda: tf.data.Dataset.from_tensor_slices((X, Y, WEIGHTS)).batch(4)
    ),
    "tf_data_that_repeats": data(
        lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(4).repeat(),
        steps_per_epoch=4,
    ),
    "tf_data_of_fixed_batches": data(
        lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(5, True)
    ),
    "py_dataset": data(Batches),
    "generator": data(generator, steps_per_epoch=3),
    "fewer_rows_than_towers": fitted(batch_size=2),
    "one_row": fitted(batch_size=1, epochs=1),
    "sample_weights": fitted(sample_weight=WEIGHTS),
    "class_weights": Case(
        y=CLASSES,
        compile=lambda: {
            "loss": keras.losses.SparseCategoricalCrossentropy(True),
            "metrics": ["accuracy"],
        },
        fit=lambda: {"class_weight": {0: 0.3, 1: 2.0}},
    ),
    "validation_of_another_batch_size": fitted(
        validation_data=(X[:7], Y[:7], WEIGHTS[:7]), validation_batch_size=3
    ),
    "validation_split": fitted(validation_split=0.3),
    "integers": Case(
        sequential(
            lambda: layers.Embedding(9, 3),
            layers.Flatten,
            lambda: layers.Dense(2),
            dtype="int32",
        ),
        x=IDS,
        answers=True,
    ),
    "booleans": Case(
        sequential(
            lambda: layers.Lambda(lambda x: keras.ops.cast(x, "float32")),
            lambda: layers.Dense(2),
            dtype="bool",
        ),
        x=X > 0,
    ),
    "doubles": Case(x=X.astype("float64"), y=Y.astype("float64"), answers=True),
}


# -------------------------------------------------------------------- models
class Penalized(layers.Layer):
    """With a loss of its own, a counter and a metric."""

    def build(self, shape: Any) -> None:
        self.calls = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="calls"
        )
        self.size = keras.metrics.Mean(name="size")

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.calls.assign_add(1.0)
        self.size.update_state(keras.ops.mean(x**2, axis=-1))
        self.add_loss(0.1 * keras.ops.mean(x**2))
        return x


def added(**losses: Any) -> dict[str, Case]:
    """Models of a layer that adds a loss, and keeps a metric of it."""

    class Adds(layers.Layer):
        def __init__(self, name: str, loss: Any) -> None:
            super().__init__()
            self.needs_all_towers = name == "balance"
            self.loss, self.hidden = loss, layers.Dense(3)
            self.kept = keras.metrics.Mean(name="kept")
            self.summed = keras.metrics.Sum(name="summed")

        def build(self, shape: Any) -> None:
            self.hidden.build(shape)

        def call(self, x: Any) -> Any:
            x = self.hidden(x)
            loss = self.loss(x, self.hidden.kernel)
            self.add_loss(loss)
            self.kept.update_state(loss)
            self.summed.update_state(loss)
            return x

    return {
        f"added_{name}": Case(
            sequential(
                lambda name=name, loss=loss: Adds(name, loss),
                lambda: layers.Dense(2),
            )
        )
        for name, loss in losses.items()
    }


def balance(x: Any) -> Any:
    """A mixture of experts', of the whole batch: a product of means."""
    taken = keras.ops.one_hot(keras.ops.argmax(x, -1), 3)
    share = keras.ops.mean(keras.ops.softmax(x), 0)
    return keras.ops.sum(share * keras.ops.mean(taken, 0))


ADDED = added(
    mean=lambda x, w: keras.ops.mean(x**2),
    sum=lambda x, w: 0.1 * keras.ops.sum(x**2),
    per_row=lambda x, w: 0.1 * keras.ops.sum(x**2, -1),
    constant=lambda x, w: keras.ops.convert_to_tensor(2.0),
    of_weights=lambda x, w: 0.1 * keras.ops.sum(w**2),
    balance=lambda x, w: towers.all_towers(balance, x),
)


class Tied(keras.Model):
    """An embedding whose table is its output layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = layers.Embedding(9, 4)

    def call(self, ids: Any) -> Any:
        x = keras.ops.mean(self.embed(ids), axis=1)
        return keras.ops.matmul(x, keras.ops.transpose(self.embed.embeddings))


class Phaseless(keras.Model):
    """Whose dropout does nothing in a step: `call` takes no phase."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = keras.Sequential([layers.Dropout(0.5), layers.Dense(2)])

    def call(self, x: Any) -> Any:
        return self.stack(x)


class WithArguments(keras.Model):
    def __init__(self, units: int = 3) -> None:
        super().__init__()
        self.units = units
        self.hidden = layers.Dense(units)
        self.drop = layers.Dropout(0.0)
        self.out = layers.Dense(2)
        self.blocks: list[Any] = [self.hidden, self.out]
        self.blocks.append(self.blocks)  # as Keras allows

    def call(self, x: Any, training: bool = False) -> Any:
        return self.out(self.drop(self.hidden(x), training=training))


class OwnStep(WithArguments):
    """With a train_step, a metric list and attributes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mine = keras.metrics.Mean(name="mine")

    @property
    def metrics(self) -> Any:
        return [self.mine]

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        self.mine.update_state(loss)
        return {m.name: m.result() for m in self.metrics}

    def test_step(self, data: Any) -> Any:
        super().test_step(data)
        self.mine.update_state(1.0)
        return {"mine": self.mine.result()}


class Heir(OwnStep):
    """With all of that by inheritance."""


class OwnLoss(WithArguments):
    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        return loss + 0.1 * keras.ops.mean(y_pred**2)

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> Any:
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        return {**logs, "twice": 2 * logs["loss"]}


def nested_outputs() -> keras.Model:
    a, b = keras.Input([6], name="a"), keras.Input([6], name="b")
    shared = layers.Dense(3)
    x, y = shared(a), shared(b)
    return keras.Model(
        {"a": a, "b": b},
        {
            "sum": layers.Dense(2, name="sum")(x + y),
            "rest": layers.Dense(1, name="rest")(y),
        },
    )


def two_lists() -> keras.Model:
    a, b = keras.Input([6]), keras.Input([6])
    x = layers.Concatenate()([a, b])
    return keras.Model(
        [a, b], [layers.Dense(2, name="u")(x), layers.Dense(1, name="v")(x)]
    )


def initial_state() -> keras.Model:
    x = keras.Input([4, 3])
    first = layers.Dense(5)(x[:, 0])
    return keras.Model(
        x, layers.Dense(2)(layers.GRU(5)(x, initial_state=first))
    )


def of_texts() -> keras.Model:
    """Keras says that its text layer makes [rows, 1, 4], and it makes [rows, 4]."""
    words = keras.Input([1], dtype="string")
    counted = layers.TextVectorization(
        4, output_mode="count", vocabulary=["a", "b"]
    )
    return keras.Model(words, layers.Dense(1, "sigmoid")(counted(words)))


def frozen(which: Callable[[keras.Model], Any]) -> Callable:
    def model() -> keras.Model:
        plain = two_layers()
        which(plain).trainable = False
        return plain

    return model


def inside() -> keras.Model:
    inner = chain([6], layers.Dense(6, "relu"))
    x = keras.Input([6])
    return keras.Model(x, layers.Dense(2)(inner(inner(x))))


MODELS = ADDED | {
    "dicts": Case(
        nested_outputs,
        answers=True,
        x={"a": X, "b": X[:, ::-1]},
        y={"sum": Y, "rest": Y[:, :1]},
        compile=lambda: {
            "loss": {"sum": "mse", "rest": "mae"},
            "loss_weights": {"sum": 2.0, "rest": 0.5},
            "metrics": {"sum": ["mae"], "rest": ["mse"]},
            "weighted_metrics": {"rest": ["mae"]},
        },
        fit=lambda: {"sample_weight": {"sum": WEIGHTS, "rest": WEIGHTS}},
    ),
    "lists": Case(
        two_lists,
        x=[X, X[::-1]],
        y=[Y, Y[:, :1]],
        compile=lambda: {"loss": ["mse", "mae"], "metrics": [["mae"], ["mse"]]},
    ),
    "models_in_models": Case(inside),
    "subclassed_with_arguments": Case(WithArguments, answers=True),
    "tied_weights": Case(
        Tied,
        x=IDS,
        y=CLASSES,
        compile=lambda: {
            "loss": keras.losses.SparseCategoricalCrossentropy(True)
        },
    ),
    "not_built_yet": Case(
        lambda: keras.Sequential([layers.Dense(3), layers.Dense(2)])
    ),
    "told_no_phase": Case(Phaseless),
    "of_texts": dataclasses.replace(
        data(
            lambda: (
                tf.data.Dataset.from_tensor_slices(
                    (["a b", "b", "a c", "c", "b c", "a"], CLASSES[:6])
                )
                .batch(4)
                .map(lambda x, y: (x[:, None], y))
            )
        ),
        model=of_texts,
        compile=lambda: {"loss": "binary_crossentropy", "metrics": ["acc"]},
    ),
    "frozen": Case(frozen(lambda m: m)),
    "partly_frozen": Case(frozen(lambda m: m.layers[0])),
    "two_layers": Case(two_layers),
    "lambda": Case(
        sequential(
            lambda: layers.Lambda(lambda x: 2 * x), lambda: layers.Dense(2)
        )
    ),
    "time_distributed": Case(
        sequential(
            lambda: layers.TimeDistributed(layers.Dense(2)),
            layers.GlobalAveragePooling1D,
            shape=(4, 3),
        ),
        x=SEQUENCE,
    ),
    "bidirectional": Case(
        sequential(
            lambda: layers.Bidirectional(layers.LSTM(2)),
            lambda: layers.Dense(2),
            shape=(4, 3),
        ),
        x=SEQUENCE,
    ),
    "rnn_with_initial_state": Case(initial_state, x=SEQUENCE),
    "masks": Case(
        sequential(
            lambda: layers.Embedding(9, 3, mask_zero=True),
            lambda: layers.Dense(2),
            dtype="int32",
        ),
        answers=True,
        x=np.where(IDS > 4, IDS, 0),
        y=np.repeat(Y[:, None], 6, 1),
        compile=lambda: {"metrics": ["mae"], "weighted_metrics": ["mse"]},
        fit=lambda: {"sample_weight": np.repeat(WEIGHTS[:, None], 6, 1)},
    ),
    "regularizers": Case(
        sequential(
            lambda: layers.Dense(
                3, kernel_regularizer="l2", activity_regularizer="l1"
            ),
            lambda: layers.Dense(2, bias_regularizer="l1"),
        )
    ),
    "own_state_loss_and_metric": Case(
        sequential(lambda: layers.Dense(3), Penalized, lambda: layers.Dense(2))
    ),
    "only_add_loss": Case(
        sequential(lambda: layers.Dense(3), Penalized),
        compile=lambda: {"loss": None},
        fit=lambda: {"y": None},
    ),
    "own_train_step": Case(OwnStep, answers=True),
    "inherited_train_step": Case(Heir),
    "own_loss_and_metrics": Case(OwnLoss, answers=True),
    "saturated_softmax": Case(
        sequential(lambda: layers.Dense(2, "softmax")),
        x=1e3 * X,
        y=CLASSES,
        compile=lambda: {
            "loss": "sparse_categorical_crossentropy",
            "metrics": ["accuracy"],
        },
    ),
    "saturated_sigmoid": Case(
        sequential(
            lambda: layers.Dense(1), lambda: layers.Activation("sigmoid")
        ),
        x=1e3 * X,
        y=CLASSES[:, None],
        compile=lambda: {"loss": "binary_crossentropy", "metrics": ["AUC"]},
    ),
    "saturated_softmax_of_channels": Case(
        sequential(
            lambda: layers.Dense(4),
            lambda: layers.Reshape((2, 2)),
            lambda: layers.Softmax(axis=1),
        ),
        x=1e3 * X,
        y=np.stack([Y, -Y], 1) > 0,
        compile=lambda: {"loss": keras.losses.CategoricalCrossentropy(axis=1)},
    ),
    "saturated_eagerly": Case(
        sequential(lambda: layers.Dense(2, "softmax")),
        x=1e3 * X,
        y=CLASSES,
        compile=lambda: {
            "loss": "sparse_categorical_crossentropy",
            "run_eagerly": True,
        },
        fit=lambda: {"epochs": 1},
    ),
    "half_precision": Case(
        lambda: with_policy("mixed_float16", two_layers), tolerance=5e-3
    ),
    "bfloat16": Case(
        lambda: with_policy("mixed_bfloat16", two_layers), tolerance=5e-2
    ),
}


def with_policy(policy: str, model: Callable[[], keras.Model]) -> keras.Model:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        return model()
    finally:
        keras.config.set_dtype_policy(before)


# ------------------------------------------------------------------- compile
COMPILE = {
    "eagerly": {"run_eagerly": True},
    "several_steps_per_execution": {"steps_per_execution": 2},
    "a_function": {"loss": lambda a, b: keras.ops.mean((a - b) ** 2, -1)},
    "reduction_sum": {"loss": keras.losses.MeanSquaredError(reduction="sum")},
}
COMPILED = {k: Case(compile=lambda v=v: v) for k, v in COMPILE.items()}
# Each of its steps builds towers anew.
COMPILED["eagerly"] = dataclasses.replace(
    COMPILED["eagerly"], fit=lambda: {"epochs": 1}
)
COMPILED["metrics"] = Case(
    compile=lambda: {
        "metrics": [
            "mae",
            keras.losses.cosine_similarity,
            keras.metrics.RootMeanSquaredError(name="far"),
            keras.metrics.R2Score(name="near"),
        ],
        "weighted_metrics": ["mae"],
    },
    fit=lambda: {"sample_weight": WEIGHTS},
)


# ----------------------------------------------------------------- callbacks
def callback(*makers: Callable[[str], Any], **kwargs: Any) -> Case:
    """A fit with callbacks, each made with a folder of its own."""

    def fit() -> dict[str, Any]:
        return {
            "callbacks": [make_one(tempfile.mkdtemp()) for make_one in makers],
            "validation_data": (X[:5], Y[:5]),
            "epochs": 4,
        }

    return Case(fit=fit, **kwargs)


callbacks = keras.callbacks
CALLBACKS = {
    "what_only_watches_or_saves": callback(
        lambda folder: callbacks.ModelCheckpoint(
            os.path.join(folder, "{epoch}.keras"), save_best_only=True
        ),
        lambda folder: callbacks.ModelCheckpoint(
            os.path.join(folder, "{epoch}.weights.h5"), save_weights_only=True
        ),
        callbacks.BackupAndRestore,
        lambda folder: callbacks.TensorBoard(folder, histogram_freq=1),
        lambda _: callbacks.TerminateOnNaN(),
    ),
    "early_stopping": callback(
        lambda _: callbacks.EarlyStopping(
            "val_loss", patience=1, min_delta=10, restore_best_weights=True
        )
    ),
    "learning_rates": callback(
        lambda _: callbacks.LearningRateScheduler(
            lambda epoch, rate: rate / (1 + epoch)
        ),
        lambda _: callbacks.ReduceLROnPlateau(patience=1, min_delta=10),
    ),
    "swap_ema": callback(
        lambda _: callbacks.SwapEMAWeights(),
        compile=lambda: {"optimizer": optimizers.SGD(0.1, use_ema=True)},
    ),
}


# ---------------------------------------------------------- nests of outputs
# As outputs are declared; those of one are what Keras 2 code writes.
NESTS: dict[str, Any] = {
    "list": [0],
    "tuple": (0,),
    "list_in_list": [[0]],
    "dict_in_list": [{"a": 0}],
    "list_in_dict": {"a": [0]},
    "two": [0, 0],
    "two_in_dict": {"b": 0, "a": 0},
    "mixed": [0, {"a": 0}],
}
FLAT = ("list", "tuple", "two", "two_in_dict")
NAMES = ("a", "b")


def declaring(nest: Any, inside: str = "") -> Callable[[], keras.Model]:
    """A factory: outputs declared in a nest, maybe of a model inside another."""

    def model() -> keras.Model:
        x = keras.Input([6])
        count = len(tf.nest.flatten(nest))
        outputs = [
            layers.Dense(2, activity_regularizer="l2", name=name)(x)
            for name in NAMES[:count]
        ]
        graph = keras.Model([x], tf.nest.pack_sequence_as(nest, outputs))
        if inside == "stack":
            return chain([6], graph)
        again = keras.Input([6])
        return keras.Model(again, graph(again)) if inside else graph

    return model


def spelled(nest: Any) -> dict[str, Any]:
    """Arguments of `compile`, by how losses are given: also for no output."""
    count = len(tf.nest.flatten(nest))
    losses = ["mse", "mae"][:count]

    def like(values: list[Any]) -> Any:
        return tf.nest.pack_sequence_as(nest, values)

    return {
        "string": {"loss": "mse", "metrics": ["mae"]}
        if count == 1
        else {"loss": ["mse"] * count, "metrics": [["mae"]] * count},
        "nest": {
            "loss": like(losses),
            "loss_weights": like([2.0, 0.5][:count]),
        },
        "list": {"loss": losses, "metrics": losses[::-1]},
        "dict": {"loss": dict(zip(NAMES, losses))},
        "none": {"loss": None if count == 1 else ["mse", None]},
    }


def declared(name: str, how: str, bare: bool = False, inside: str = "") -> Case:
    nest, count = NESTS[name], len(tf.nest.flatten(NESTS[name]))
    targets = [Y, Y[::-1]][:count]
    return Case(
        declaring(nest, inside),
        y=Y if bare else tf.nest.pack_sequence_as(nest, targets),
        compile=lambda: spelled(nest)[how],
        fit=lambda: {"sample_weight": WEIGHTS} if count == 1 else {},
    )


# Of nests in nests plain Keras takes a bare target, or no loss at all.
DECLARED = {
    f"{name}_{how}": declared(name, how)
    for name in NESTS
    for how in (spelled(0) if name in FLAT else ["none"])
} | {
    f"{name}_{how}_bare_target": declared(name, how, True)
    for name in ("list", "tuple", "list_in_list", "dict_in_list")
    for how in ("string", "list")
}
DECLARED["list_in_stack"] = declared("list", "string", True, "stack")
DECLARED["list_in_model"] = declared("list", "string", True, "model")


CASES = {
    f"{group}_{name}": case
    for group, cases in {
        "optimizer": OPTIMIZERS,
        "data": DATA,
        "model": MODELS,
        "compile": COMPILED,
        "callback": CALLBACKS,
        "declared": DECLARED,
    }.items()
    for name, case in cases.items()
}
# What `loss_on_towers` refuses: steps and losses that want all outputs.
REFUSED = {
    "model_own_train_step",
    "model_inherited_train_step",
    "model_own_loss_and_metrics",
}


# Where a loss on the towers has masks, logits, weights or parts to mind.
ON_TOWERS = REFUSED | {
    "compile_metrics",
    "compile_reduction_sum",
    "declared_list_in_stack",
    "data_class_weights",
    "data_validation_of_another_batch_size",
    "model_dicts",
    "model_half_precision",
    "model_masks",
    "model_only_add_loss",
    "model_own_state_loss_and_metric",
    "model_saturated_sigmoid",
    "model_saturated_softmax",
    "model_saturated_softmax_of_channels",
    "model_told_no_phase",
}


# Like others, but for what Keras alone has to do with: whose variables move with
# the parameters is one to towers, however many an optimizer has of them.
SLOW = {
    "data_class_weights",
    "data_doubles",
    "data_generator",
    "data_integers",
    "data_one_row",
    "data_tf_data",
    "data_validation_of_another_batch_size",
    "data_validation_split",
    "model_added_balance",
    "model_added_constant",
    "model_added_mean",
    "model_added_of_weights",
    "model_added_sum",
    "model_bfloat16",
    "model_bidirectional",
    "model_frozen",
    "model_inherited_train_step",
    "model_lists",
    "model_models_in_models",
    "model_own_loss_and_metrics",
    "model_regularizers",
    "model_rnn_with_initial_state",
    "model_saturated_eagerly",
    "model_saturated_sigmoid",
    "model_saturated_softmax",
    "model_saturated_softmax_of_channels",
    "model_subclassed_with_arguments",
    "model_tied_weights",
    "model_time_distributed",
    "callback_early_stopping",
    "callback_learning_rates",
    "callback_swap_ema",
    "callback_what_only_watches_or_saves",
    "compile_reduction_sum",
    "model_dicts",
    "model_masks",
    "optimizer_Adadelta",
    "optimizer_Adagrad",
    "optimizer_Adamax",
    "optimizer_Ftrl",
    "optimizer_Lamb",
    "optimizer_Lion",
    "optimizer_Nadam",
    "optimizer_RMSprop",
    "optimizer_accumulated",
    "optimizer_global_clipnorm",
    "optimizer_nesterov",
} | {
    f"declared_{name}"
    for name in DECLARED
    if name not in ("list_in_stack", "dict_in_list_string_bare_target")
}


class FitTest(parameterized.TestCase):
    @parameterized.named_parameters(
        (name, name) for name in CASES if name not in SLOW
    )
    def test_fit(self, name: str) -> None:
        self.check(name, [False] + [True] * (name in ON_TOWERS))

    @parameterized.named_parameters((name, name) for name in CASES)
    @pytest.mark.rare
    def test_fit_in_both_ways(self, name: str) -> None:
        self.check(name, [False, True])

    def check(self, name: str, ways: list[bool]) -> None:
        case = CASES[name]
        expected = run(case, False)
        for loss_on_towers in ways:
            if loss_on_towers and name in REFUSED:
                with self.assertRaisesRegex(
                    ValueError, "its own (train_step|compute)"
                ):
                    run(case, True, True)
                continue
            with self.subTest(loss_on_towers=loss_on_towers):
                actual = run(case, True, loss_on_towers)
                assert_same(actual, expected, case.tolerance)


# What `fit` is given in another way than as arrays.
ITS_OWN_DATA = {name for name, case in CASES.items() if case.x is None}


class CompareTest(parameterized.TestCase):
    @parameterized.named_parameters(
        (name, name)
        for name in CASES
        if name not in ITS_OWN_DATA and not name.startswith("callback")
    )
    @pytest.mark.rare
    def test_compare_finds_no_difference(self, name: str) -> None:
        case = CASES[name]
        model = make(case.model)
        model.compile(**{"optimizer": "sgd", "loss": "mse", **case.compile()})
        model(tf.nest.map_structure(lambda x: x[:1], case.x))  # built
        fit = {"y": case.y, **case.fit()}
        comparison = towers.compare(
            model,
            placement(3, [2, 1, 1], **case.placed()),
            case.x,
            *(fit["y"], fit.get("sample_weight")),
        )
        self.assertTrue(comparison.equal, str(comparison))
        self.assertIsNotNone(comparison.weights, str(comparison))


def scopes(run_metadata: bytes) -> Any:
    """First parts of the names of what TensorBoard shows of a run."""
    metadata = tf.compat.v1.RunMetadata.FromString(run_metadata)
    for function in metadata.function_graphs:
        for library in function.pre_optimization_graph.library.function:
            for node in library.node_def:
                yield node.name.split("/")[0]


class CallbackTest(absltest.TestCase):
    def test_the_csv_log_is_the_plain_model_s(self) -> None:
        logs = []
        for wrap in (False, True):
            path = os.path.join(tempfile.mkdtemp(), "log.csv")
            log = callbacks.CSVLogger(path)
            case = Case(fit=lambda log=log: {"callbacks": [log]})
            run(case, wrap)
            with open(path) as file:
                logs.append(list(csv.DictReader(file)))
        numbers = [
            [{k: float(v) for k, v in row.items() if v != "NA"} for row in log]
            for log in logs
        ]
        for plain, towered in zip(*numbers, strict=True):
            self.assertEqual(list(towered), list(plain))
            close(list(towered.values()), list(plain.values()))

    def test_the_graph_in_tensorboard_shows_the_towers(self) -> None:
        folder = tempfile.mkdtemp()
        board = callbacks.TensorBoard(folder, profile_batch=1)
        run(Case(fit=lambda: {"callbacks": [board]}), True)
        names = set()
        for path in tf.io.gfile.glob(os.path.join(folder, "*", "*events*")):
            for record in tf.data.TFRecordDataset(path):
                event = tf.compat.v1.Event.FromString(record.numpy())
                for value in event.summary.value:
                    kind = value.metadata.plugin_data.plugin_name
                    if kind.startswith("graph_run_metadata"):
                        names |= set(scopes(value.tensor.string_val[0]))
        self.assertContainsSubset({f"tower_{i}" for i in range(3)}, names)

    def test_a_run_is_resumed_with_another_number_of_towers(self) -> None:
        expected = make(dense)
        expected.compile("adam", "mse")
        expected.fit(X, Y, batch_size=4, epochs=4, verbose=0, shuffle=False)

        class Interrupted(callbacks.Callback):
            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                if epoch == 1:
                    raise KeyboardInterrupt

        folder = tempfile.mkdtemp()
        for n, extra in ((4, [Interrupted()]), (2, [])):
            model = towers.TowerModel(make(dense, seed=n), placement(n))
            if n == 4:
                model.set_weights(make(dense).get_weights())
            model.compile("adam", "mse")
            try:
                model.fit(
                    X,
                    Y,
                    batch_size=4,
                    epochs=4,
                    verbose=0,
                    shuffle=False,
                    callbacks=[callbacks.BackupAndRestore(folder), *extra],
                )
            except KeyboardInterrupt:
                pass
        close(model.get_weights(), expected.get_weights())
        for a, e in zip(
            model.optimizer.variables, expected.optimizer.variables
        ):
            close(a, e)


class ScaledTest(absltest.TestCase):
    def test_the_same_steps_are_skipped_on_overflow(self) -> None:
        """Row 5 overflows, in the second of three steps, in float16."""
        x = X.copy()
        x[5] = 6e4
        seen = []
        for wrap in (False, True):
            model = with_policy("mixed_float16", lambda: make(dense))
            if wrap:
                model = towers.TowerModel(model, placement(3))
            scaled = optimizers.LossScaleOptimizer(
                optimizers.Adam(0.01), initial_scale=2.0**14
            )
            model.compile(scaled, "mse")
            model.fit(x, 1e3 * Y, batch_size=4, verbose=0, shuffle=False)
            inner = scaled.inner_optimizer
            seen.append((int(inner.iterations), float(scaled.dynamic_scale)))
        self.assertEqual(*seen)
        self.assertLess(seen[0][0], 3)
