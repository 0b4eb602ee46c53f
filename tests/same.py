"""same: a step and a `fit` in towers, and the plain model's beside them."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from models import close, make

import towers

Pair = tuple[keras.Model, towers.TowerModel]


def step_of(
    call: Callable[[Any], Any],
    model: keras.Model,
    of: Callable[..., tf.Tensor] = tf.reduce_mean,
    inputs: bool = False,
) -> Callable[[Any], Any]:
    """A function of a batch to outputs, the loss, and gradients.

    Args:
      call: of the batch, to outputs and losses.
      of: what the loss takes of the squares of outputs.
      inputs: if gradients are of the batch's floats, too.
    """

    def step(x: Any) -> Any:
        x = tf.nest.map_structure(
            lambda v: v if tf.is_tensor(v) else tf.convert_to_tensor(v), x
        )
        parts = tf.nest.flatten(x, expand_composites=True) if inputs else []
        floats = [part for part in parts if part.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(floats)
            outputs, losses = call(x)
            each = [of(tf.square(y)) for y in tf.nest.flatten(outputs)]
            loss = tf.add_n([*each, *losses])
        sources = [v.value for v in model.trainable_variables]
        gradients = tape.gradient(
            loss,
            [*sources, *floats],
            unconnected_gradients="zero",
        )
        return outputs, loss, [tf.convert_to_tensor(g) for g in gradients]

    return step


def plain_step(
    model: keras.Model, training: bool | None = True, **how: Any
) -> Callable[[Any], Any]:
    """A plain step, op by op, as that needs no tracing."""

    def call(x: Any) -> Any:
        return model(x, training=training), model.losses

    return step_of(call, model, **how)


def towered_step(
    model: keras.Model,
    where: towers.Placement,
    spec: Any = None,
    training: bool | None = True,
    options: Any = (),
    **how: Any,
) -> Any:
    """The same in towers, as a `tf.function`; `options` are of `build_towers`."""

    def call(x: Any) -> Any:
        graph = towers.build_towers(
            model, x, where, training=training, **dict(options)
        )
        graph.apply_updates()
        return graph.outputs, graph.losses

    signature = None if spec is None else [spec]
    return tf.function(step_of(call, model, **how), input_signature=signature)


def unknown_rows(x: Any) -> Any:
    """Specs of a batch of any number of rows."""
    return tf.nest.map_structure(
        lambda v: tf.TensorSpec([None, *v.shape[1:]], v.dtype), x
    )


def same_step(
    model: keras.Model,
    where: towers.Placement,
    *batches: Any,
    spec: Any = None,
    training: bool | None = True,
    tolerance: float = 1e-5,
    look: Callable[..., Any] = lambda call: call(),
    options: Any = (),
    **how: Any,
) -> Any:
    """Sees that a step is the plain one: outputs, loss, gradients and updates.

    Args:
      model: built; left as the last step leaves it.
      where: of the towers.
      batches: each is a step of its own, from the same state.
      spec: what the step is traced for; if None, each batch.
      training: as of `build_towers`.
      tolerance: of the largest number.
      look: is given the call of each step in towers: `Executed`, say.
      options: more arguments of `build_towers`.
      how: as of `step_of`.

    Returns:
      What was seen of the first step.
    """
    others = model.non_trainable_variables
    before = [v.numpy() for v in others]
    plain = plain_step(model, training, **how)
    towered = towered_step(model, where, spec, training, options, **how)

    def run(step: Callable[[Any], Any], x: Any, numbers: list[Any]) -> None:
        for variable, value in zip(others, before):
            variable.assign(value)
        numbers += [*step(x), *(v.numpy() for v in others)]

    seen: list[Any] = []
    for x in batches:
        expected: list[Any] = []
        actual: list[Any] = []
        run(plain, x, expected)
        seen.append(look(functools.partial(run, towered, x, actual)))
        for a, e in zip(actual, expected, strict=True):
            close(a, e, tolerance)
    return seen[0]


def pair(
    model: Callable[[], keras.Model], where: towers.Placement, **options: Any
) -> Pair:
    """A plain model, and one with the same weights in towers."""
    return make(model), towers.TowerModel(make(model), where, **options)


def sgd() -> keras.optimizers.Optimizer:
    """Plain, so that a difference of weights is one of gradients."""
    return keras.optimizers.SGD(0.1)


def compiled(
    model: keras.Model, loss: Any = "mse", optimizer: Any = sgd, **kwargs: Any
) -> keras.Model:
    """The model, compiled; the plain one runs op by op, if it may.

    Of several outputs Keras weighs losses by rows there, and not in a graph.
    """
    one = len(getattr(model, "outputs", None) or [0]) == 1
    eager = one and not isinstance(model, towers.TowerModel)
    model.compile(optimizer(), loss, **{"run_eagerly": eager, **kwargs})
    return model


def same_fit(
    models: Pair,
    *data: Any,
    loss: Any = "mse",
    optimizer: Any = sgd,
    tolerance: float = 1e-5,
    histories: float = 1e-5,
    predict: bool = False,
    look: Callable[..., Any] = lambda call: call(),
    compiling: Any = (),
    **fit: Any,
) -> Any:
    """Trains both alike, and sees that histories and weights are the same.

    Args:
      models: the plain one and the one in towers, as of `pair`.
      data: x and y, or a dataset.
      loss: of both.
      optimizer: makes one for each; None if they are compiled.
      tolerance: of weights and predictions.
      histories: the tolerance of what `fit` says.
      predict: if what they predict of x is to be compared.
      look: is given the call of `fit` in towers: `Executed`, say.
      compiling: further arguments of `compile`.
      fit: of `fit`; rows are not shuffled.

    Returns:
      What was seen of the one in towers.
    """
    plain, towered = models
    if optimizer is not None:
        for model in models:
            compiled(model, loss, optimizer, **dict(compiling))
    fit = {"shuffle": False, "verbose": 0, **fit}
    expected = plain.fit(*data, **fit).history
    actual: dict[str, Any] = {}
    seen = look(lambda: actual.update(towered.fit(*data, **fit).history))
    np.testing.assert_array_equal(list(actual), list(expected))
    for name, values in expected.items():
        close(actual[name], values, histories)
    close(towered.get_weights(), plain.get_weights(), tolerance)
    if predict:
        outputs = [model.predict(data[0], verbose=0) for model in models]
        close(*outputs[::-1], tolerance)
    return seen
