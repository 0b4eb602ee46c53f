"""build_towers: split, replicate, forward, gather. The whole story."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import tensorflow as tf

from towers import v1_graph
from towers.eager import run_eagerly
from towers.engine.calls import How
from towers.foreign import keras_layers
from towers.inputs_per_tower import PerTower, refuse_divided
from towers.keras_model import calls, checks, layer_graph
from towers.keras_model.given import Given
from towers.keras_model.losses import gathered_losses
from towers.keras_model.outputs import check_outputs, gathered_outputs
from towers.keras_model.parameter_copies import replicated
from towers.keras_model.parameters import Home
from towers.keras_model.request import Request
from towers.keras_model.state import Before, merge_state
from towers.keras_model.tower import forward
from towers.keras_model.whole_call import WholeCall
from towers.placement.placement import Placement, check_placement
from towers.tower_graph import Tower, TowerGraph
from towers.verbs.batch import Batch, BatchPerTower, checked_batch
from towers.verbs.gather import gather_known
from towers.verbs.split import own_shards, split_shards


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
        device, scope and true shard.
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
        longer, or more where much could be folded or fused. Towers that meet,
        or have layers on devices of their own, start as ever; those compiled
        by XLA are rewritten by that.
      synchronized: whether every `BatchNormalization` that trains takes the
        mean and variance of all rows, as in the plain model, whatever its own
        `synchronized` says; `TowerModel` tells what it costs and where it is
        refused. Where layers do so, a `tower_fn` is begun once more, to see
        whether they train.

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
      RuntimeError: eager execution is switched off for the whole program.
    """
    checks.check_model(model, nested=tower_fn is not None)
    check_placement(placement)
    request = Request(
        placement,
        training,
        merge,
        tower_fn,
        tuple(layer_outputs),
        how=_how(jit_compile, quick_start),
        synchronized=synchronized,
    )
    if jit_compile and _is_built(model):
        _layer_graph(model, request)  # refused before arrays become ops
    if isinstance(inputs, PerTower):
        inputs = inputs.next_batch(placement)
    own = inputs.towers if isinstance(inputs, BatchPerTower) else None
    if tower_fn is None:
        if own is not None:
            refuse_divided(arguments or {}, whole)
        each = [
            calls.model_call([nest], arguments or {}, whole, training=training)
            for nest in ([inputs] if own is None else own)
        ]
        return build_call(
            model,
            each[0],
            placement,
            merge,
            layer_outputs,
            how=request.how,
            synchronized=synchronized,
            each=None if own is None else [call.batch for call in each],
        )
    if arguments:
        raise ValueError(
            "`arguments` are those of the model's call, which `tower_fn` makes "
            f"itself; got both. Pass {', '.join(arguments)} with the inputs, "
            "in `whole` if it is no batch."
        )
    if own is None:
        return _built(model, checked_batch(inputs, whole=whole), request)
    checked = [
        checked_batch(nest, f"inputs of tower {i}", whole)
        for i, nest in enumerate(own)
    ]
    nests = [batch.nest for batch in checked]
    return _built(model, Batch(nests[0], checked[0].whole, nests), request)


def build_call(
    model: Any,
    call: calls.ModelCall,
    placement: Placement,
    merge: Any = "concat",
    layer_outputs: Sequence[str] = (),
    part_of: Any = None,
    how: How = How.BUILT,
    each: Sequence[Any] | None = None,
    synchronized: bool = False,
) -> TowerGraph:
    """As `build_towers`, for a call of a model, or of a layer.

    Args:
      model: what is called.
      call: with what.
      placement, merge, layer_outputs: as for `build_towers`.
      part_of: the model of which a layer is called by itself, in which
        `layer_devices` are known.
      how: whether towers are built op by op, or called as functions.
      each: None, or the tensors that each tower has already, as in `call.batch`.
      synchronized: as for `build_towers`.
    """
    request = Request(
        placement,
        call.training,
        merge,
        call,
        tuple(layer_outputs),
        part_of,
        how,
        synchronized,
    )
    whole = [i in call.whole for i in range(len(call.batch))]
    graph = _built(model, Batch(call.batch, whole, each), request)
    made = [
        dataclasses.replace(tower, inputs=call.inputs(tower.inputs))
        for tower in graph.towers
    ]
    return dataclasses.replace(graph, towers=made)


def _built(model: Any, batch: Batch, request: Request) -> TowerGraph:
    """Towers of a checked batch; in a graph of their own in eager code."""

    def build(batch: Batch) -> TowerGraph:
        return _in_graph(model, batch, request)

    if tf.executing_eagerly():
        return run_eagerly(build, batch, request.placement)
    return build(batch)


def _in_graph(model: Any, batch: Batch, request: Request) -> TowerGraph:
    """Towers of a model, a layer or several models, in this graph."""
    if isinstance(request.tower_fn, calls.ModelCall):
        checks.ensure_called(model, request.tower_fn)
    graph = _layer_graph(model, request)
    homes, penalties = _homes(graph, request.placement)
    with checks.phase_known(request.training), _as_given(graph, batch, request):
        built = assemble(graph, homes, penalties, batch, request)
    if v1_graph.in_v1_graph() and not Given().is_open:
        return v1_graph.settled(graph, built)
    return built


def _as_given(
    graph: layer_graph.LayerGraph, batch: Batch, request: Request
) -> AbstractContextManager[None]:
    """While open, Keras speaks of the shape that was given, not of a shard's."""
    if request.users_fn is not None or batch.each is not None:
        return nullcontext()
    return WholeCall(
        graph.models[0], batch.nest, request.training, request.tower_fn
    ).refused_as_given()


def _layer_graph(model: Any, request: Request) -> layer_graph.LayerGraph:
    """The model as a pure function, which XLA can take if it is to; no op.

    Raises:
      ValueError: it cannot, or there is no such layer; names the layer.
    """
    pins = request.placement.layer_devices
    graph = layer_graph.LayerGraph(
        model,
        request.layer_outputs,
        *((pins,) if request.part_of is None else ()),
        part_of=request.part_of
        and layer_graph.LayerGraph(request.part_of, (), pins),
        synchronized=request.is_synchronized,
    )
    if request.how is How.COMPILED:
        checks.check_compilable(graph, request.training, request.users_fn)
    return graph


def _is_built(model: Any) -> bool:
    """Whether all models of a nest have their variables."""
    models = [x for x in tf.nest.flatten(model) if isinstance(x, keras.Model)]
    return all(map(keras_layers.is_built, models))


def assemble(
    graph: layer_graph.LayerGraph,
    homes: list[Home],
    penalties: list[tf.Tensor],
    batch: Batch,
    request: Request,
) -> TowerGraph:
    """The story: a checked model, with variables at `homes`, as towers."""
    placement = request.placement
    divide = split_shards if batch.each is None else own_shards
    shards = divide(batch, placement)
    values, copies, told = replicated(graph, homes, placement, shards)
    with tf.name_scope(""):
        begun = [
            Tower(i, device, _scope(i), shards.true[i])
            for i, device in enumerate(placement.devices)
        ]
    where = [home.device for home in homes]
    replays, verdict = forward(
        graph, where, shards, copies, told, begun, request
    )
    check_outputs(graph, batch.nest, shards.divided, replays, request)

    def gather(each: Any, rule: Any, label: str = "output") -> Any:
        return gather_known(each, placement, rule, shards.rows, label)

    outputs = gathered_outputs(replays, request.merge, gather, placement)
    losses, adders = gathered_losses(
        graph, replays, gather, str(placement.output_device), shards.rows
    )
    merged = merge_state(
        Before(graph, values, where, shards.rows),
        [replay["state"] for replay in replays],
        verdict,
        [replay["moments"] for replay in replays],
    )
    towers = [
        dataclasses.replace(
            tower,
            outputs=replay["outputs"],
            parameters=[own[k] for k in graph.trainable],
            layer_outputs=replay["layer_outputs"],
        )
        for tower, replay, own in zip(begun, replays, copies)
    ]
    return TowerGraph(
        outputs,
        towers,
        shards.rows.counts,
        [(homes[k].owner, merged[k]) for k in sorted(merged)],
        losses + penalties,
        adders,
        [(v, home.variable) for v, home in zip(graph.variables, homes)],
    )


def _how(jit_compile: bool, quick_start: bool) -> How:
    if jit_compile:
        return How.COMPILED
    return How.AS_IS if quick_start else How.BUILT


def _homes(
    graph: layer_graph.LayerGraph, placement: Placement
) -> tuple[list[Home], list[tf.Tensor]]:
    """Where each variable lives, and the weight regularisers."""
    given = Given()
    if v1_graph.in_v1_graph():
        homes, penalties = v1_graph.enter(graph, placement)
        if not given.is_open:
            return homes, penalties
    else:
        homes = [
            Home(keras_layers.raw(v), keras_layers.device_of(v), v)
            for v in graph.variables
        ]
    if given.is_open:  # which hears of what would be assigned, too
        homes = [
            dataclasses.replace(home, owner=v, given=given.of(v))
            for v, home in zip(graph.variables, homes)
        ]
    terms = [graph.regularization_loss(i, homes[i]) for i in graph.trainable]
    return homes, [term for term in terms if term is not None]


def _scope(i: int) -> str:
    with tf.name_scope(f"tower_{i}") as scope:
        return scope
