"""builder: `build_towers`, of any model, in eager code, a tf.function or tf.compat.v1."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers import v1_graph
from towers.build import assemble
from towers.eager import run_eagerly
from towers.engine.calls import How
from towers.keras_model import checks, model_calls
from towers.keras_model.homes import homes_of
from towers.keras_model.request import Request
from towers.keras_model.tower import forward
from towers.keras_model.whole_call import speaks_of_all
from towers.placement.placement import Placement, check_placement
from towers.tower_graph import TowerGraph
from towers.verbs.batch import Batch, checked_batch, checked_each, own_inputs


def build_towers(
    model: Any,
    inputs: Any,
    placement: Placement,
    training: bool | None = None,
    merge: Any = "concat",
    tower_fn: Callable[..., Any] | None = None,
    layer_outputs: Sequence[str] = (),
    whole: Sequence[Any] = (),
    arguments: Mapping[str, Any] | None = None,
    jit_compile: bool = False,
    quick_start: bool = False,
    synchronized: bool = False,
) -> TowerGraph:
    """Computes a Keras model in one tower per device.

    Meant for a `tf.function` of your own; called eagerly it builds and runs a
    graph each time, which is slow: not for loops.
    Differentiate through it with any tape: the backward pass of each tower
    stays on its device.

    In a graph of `tf.compat.v1` the model, built eagerly, gets variables of
    that graph on the parameter device, once for all towers built there, that
    start at its values and are in the collections that a Session program
    expects. The values are constants in the graph: models up to 2 GB.

    In a `keras.StatelessScope` towers read the values that it has for variables,
    and differentiate to them; `apply_updates` there changes no variable.

    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"])
    >>> graph = towers.build_towers(model, tf.ones([5, 3]), placement)
    >>> graph.outputs.shape, graph.rows.numpy().tolist()
    (TensorShape([5, 2]), [2, 3])

    Args:
      model: a Keras 3 model. Its variables are read where they are.
      inputs: what `model` is called with: a nest of [rows, ...] tensors,
        dense, ragged or sparse. Or what each tower reads on its own machine,
        a batch of `per_tower`.
      placement: where everything runs.
      training: as for `model(inputs, training=...)`; in a `tower_fn`, the phase
        of every call that names none.
      merge: see `gather_outputs`. An output of the model that is no batch, as
        a weight is none, needs another rule than "concat".
      tower_fn: `f(model, shard)`, run once per tower in the place of
        `model(shard)`, on the tower's device. `model` may then be a list or
        dict of models, and of metrics, whose updates add up over the towers.
        Inside, models and their methods read the tower's parameters. A tensor
        from outside gets no gradient there, and taking one is refused: pass
        it with the inputs, in `whole` if it is no batch. A model that is frozen
        (`trainable = False`) need not be passed: its weights are read where
        they are. Autograph converts the function where it converts the caller.
        If it has a third parameter named `tower`, it gets its `Tower`: index,
        device, scope and true shard. Under mixed precision it is called once
        more, in a graph that is never run, to see which weights it casts.
      layer_outputs: paths of layers ("conv2d", "encoder/conv2d") whose outputs
        each tower hands out.
      whole: keys of a dict of inputs, or positions in a list, that are no
        batch: every tower gets them as they are, see `split_batch`. Names of
        `arguments` too.
      arguments: further ones of the model's call, by name. Tensors are split
        by rows as the inputs are, but for scalars and those named in `whole`;
        Python values go to every tower.
      jit_compile: whether XLA compiles each tower, its forward and its backward
        pass, for its device. What XLA cannot take is refused: layers that say
        `supports_jit = False`, gradients of recurrent layers, layers with a
        device of their own, and towers that meet.
      quick_start: whether TensorFlow leaves towers as they are built, and does
        not rewrite them before the first step, which for many towers of a deep
        model takes half of the time until then. Steps take a few per cent
        longer, or more where much could be folded. Towers that meet, or have
        layers on devices of their own, start as ever, as do those of XLA.
      synchronized: whether each `BatchNormalization` that trains takes the mean
        and variance of all rows, whatever it says; see `TowerModel`. To see
        whether one trains, a `tower_fn` is begun once more.

    Returns:
      A `TowerGraph`. Call its `apply_updates()` when `training`; in a graph of
      `tf.compat.v1`, run what is in UPDATE_OPS with each step.

    Raises:
      TypeError: the model, the placement or an input is of the wrong kind, the
        model is or holds a `TowerModel`, or `training` is a tensor that a layer
        asks for its value.
      ValueError: inputs, merge rules or layer names do not fit, the model
        cannot be built, or towers return different structures, create
        variables or use some that are not the model's.
      RuntimeError: eager execution is off for the whole program.
    """
    checks.check_model(model, nested=tower_fn is not None)
    check_placement(placement)
    how = How.AS_IS if quick_start else How.BUILT
    how = How.COMPILED if jit_compile else how
    request = Request(
        *(placement, training, merge, tower_fn, tuple(layer_outputs)),
        how=how,
        synchronized=synchronized,
        hands_out=True,
    )
    if jit_compile and checks.are_built(model):
        request.graph_of(model)  # refused before arrays become ops
    own = own_inputs(inputs, placement)
    if tower_fn is None:
        call, batch = model_calls.shared_call(
            inputs, own, arguments or {}, whole, training
        )
        return build(model, batch, request.of_call(call))
    if arguments:
        raise ValueError(
            "`arguments` are those of the model's call, which `tower_fn` makes "
            f"itself; got both. Pass {', '.join(arguments)} with the inputs, "
            "in `whole` if it is no batch."
        )
    if own is None:
        return build(model, checked_batch(inputs, whole=whole), request)
    return build(model, checked_each(own, whole), request)


def build(model: Any, batch: Batch, request: Request) -> TowerGraph:
    """Towers of a checked batch; in a graph of their own in eager code.

    Args:
      model: a model, a layer that is called by itself, or a nest of models.
      batch: what it is called with.
      request: what else is asked for.
    """
    if tf.executing_eagerly():
        in_graph = functools.partial(build, model, request=request)
        return run_eagerly(in_graph, batch, request.placement)
    if isinstance(request.tower_fn, model_calls.ModelCall):
        checks.ensure_called(model, request.tower_fn)
    graph = request.graph_of(model)
    if checks.in_v1_graph():
        homes, penalties = v1_graph.enter(graph, request.placement)
    else:
        homes, penalties = homes_of(graph)
    with (
        request.announced(model),
        checks.phase_known(request.training),
        speaks_of_all(model, batch, request),
    ):
        built = assemble(graph, homes, penalties, batch, request, forward)
    return v1_graph.settled(graph, built) if checks.in_v1_graph() else built
