"""parameters: where variables live, and moving them there."""

import contextlib
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign import keras_compile, keras_optimizer
from towers.foreign.keras_layers import (
    device_of,
    made_by_strategy,
    mark_device,
    raw,
    replace_raw,
)
from towers.foreign.tf_cluster import wait_for_all
from towers.keras_model import checks, layer_graph
from towers.keras_model.held import held_variables
from towers.keras_model.pieces.recut import split
from towers.placement.device_names import (
    HOST_HERE,
    is_reached,
    process_of,
    same_device,
)
from towers.placement.placement import (
    Placement,
    check_placement,
    resolve_devices,
)


def place_variables(model: Any, placement: Placement) -> None:
    """Moves a model's variables, and its optimizers', where placement says.

    Values are kept. Variables of layers that it has in pieces are cut, see
    `column_wise`, and put together where they were cut otherwise. Functions that
    Keras made of the model before are dropped, since they would go on with the old
    variables; a `tf.function` of your own that was traced before must be made again.

    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> towers.place_variables(model, towers.Placement(
    ...     ["/CPU:0", "/CPU:1"], parameter_device="/CPU:1"))
    >>> model.weights[0].value.device[-5:]
    'CPU:1'

    Args:
      model: a built `keras.Model`.
      placement: its `parameter_device` is a device or a policy.

    Raises:
      TypeError: `model` is no Keras model, `placement` no `Placement`.
      ValueError: the policy returns the wrong number of devices, or a bad one; or a
        layer cannot be cut as the placement asks, or its optimizer looks at whole
        variables.
      RuntimeError: called inside a graph.
    """
    checks.check_model(model)
    check_placement(placement)
    if not tf.executing_eagerly():
        raise RuntimeError(
            "place_variables moves variables and must be called eagerly; got "
            "a call inside a graph. Call it before the tf.function."
        )
    if move_variables(model, placement):
        model.train_function = None
        model.test_function = None
        model.predict_function = None


def move_variables(
    model: Any, placement: Placement, kept: Container[int] = ()
) -> bool:
    """As `place_variables`, without dropping anything; whether any moved.

    Args:
      model, placement: as for `place_variables`.
      kept: ids of those variables of the model's that stay where they are.
    """
    template = getattr(model, "template", model)
    graph = layer_graph.LayerGraph(template, (), placement.layer_devices)
    if graph.cuts.pins or graph.joined:
        optimizers = keras_compile.optimizers(model)
        if split(template, graph.cuts, optimizers):
            graph = layer_graph.LayerGraph(
                template, (), placement.layer_devices
            )
    variables, devices = graph.variables, parameter_devices(graph, placement)
    where = {id(v): device for v, device in zip(variables, devices)}
    held = {id(x.variable) for x in held_variables(graph.layers)}
    pairs = [
        (v, device)
        for v, device in zip(variables, devices)
        if id(v) not in kept and id(raw(v)) not in held
    ]
    pairs += _of_optimizers(model, placement, where)
    pairs += [
        (v, placement.output_device)
        for v in keras_compile.metric_variables(model)
    ]
    return _move(pairs)


def place_slots(model: Any, placement: Placement) -> None:
    """Moves what the optimizers of a placed model keep beside its variables.

    What Keras makes for itself, and not like a variable, is on the default device.
    """
    _move(_of_optimizers(model, placement, {}))


def place_metrics(model: Any, placement: Placement) -> bool:
    """Moves compiled metrics to the outputs; whether any moved."""
    device = str(placement.output_device)
    variables = keras_compile.metric_variables(model)
    return _move([(v, device) for v in variables])


def _move(pairs: Sequence[tuple[Any, str]]) -> bool:
    """Moves variables, each to its device; whether any moved.

    Of another process, it waits until they are there: a step would not.
    """
    moved = [device for v, device in pairs if move_variable(v, device)]
    if any(map(process_of, moved)):
        wait_for_all()
    return bool(moved)


def _of_optimizers(
    model: Any, placement: Placement, where: Mapping[int, str]
) -> list[tuple[Any, str]]:
    """What a model's optimizers keep, which are pinned, and its devices.

    Args:
      model, placement: as for `place_variables`.
      where: by a variable's id its device, if it is to be moved.
    """
    shared = (
        placement.output_device
        if callable(placement.parameter_device)
        else placement.parameter_device
    )
    pairs = []
    for optimizer in keras_compile.optimizers(model):
        keras_optimizer.pin_optimizer(optimizer)
        for variable, owner in keras_optimizer.optimizer_variables(optimizer):
            device = str(shared)
            if owner is not None:
                device = where.get(id(owner)) or device_of(owner)
            pairs.append((variable, device))
    return pairs


class Placed:
    """Which variables of a `TowerModel` have been placed, and as what."""

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[Any, tf.Variable]] = {}

    def place_new(self, model: Any) -> bool:
        """Places what has been made since; whether there was anything.

        What was placed once stays: a graph that is being made may read it.
        """
        return self._place(model, layer_graph.variables_of(model.template))

    def note(self, model: Any) -> bool:
        """Notes where variables are now; whether any has moved, or is gone."""
        return self._note(layer_graph.variables_of(model.template))

    def renewed(self, model: Any) -> bool:
        """As `place_new`, then `note`; whether there was anything."""
        variables = layer_graph.variables_of(model.template)
        new = self._place(model, variables)
        if new:  # some may have been put together, or cut
            variables = layer_graph.variables_of(model.template)
        return self._note(variables) or new

    def _place(self, model: Any, variables: Sequence[Any]) -> bool:
        new = [v for v in variables if id(v) not in self._by_id]
        if new:
            with tf.init_scope():
                # The optimizer's too, if the model is compiled.
                move_variables(model, model.placement, self._by_id)
                new = [v for v in new if is_initialized(v)]
            self._by_id.update((id(v), (v, raw(v))) for v in new)
        return bool(new)

    def _note(self, variables: Sequence[Any]) -> bool:
        now = {id(v): (v, raw(v)) for v in variables}
        before, self._by_id = self._by_id, now
        return any(
            i not in now or now[i][1] is not old
            for i, (_, old) in before.items()
        )


def parameter_devices(
    graph: layer_graph.LayerGraph, placement: Placement
) -> list[str]:
    """The device of each variable: its layer's, or as the policy says."""
    pinned = graph.pinned
    rest = [i for i in range(len(graph.variables)) if i not in pinned]
    policy = placement.parameter_device
    if not callable(policy):
        names = [policy] * len(rest)
    else:
        answer = policy([graph.variables[i] for i in rest])
        if isinstance(answer, str) or not isinstance(answer, Iterable):
            raise TypeError(
                "The policy in `parameter_device` must return a list of "
                f"{len(rest)} devices, one per variable; got {answer!r}. Write "
                "towers.balanced(devices), with its devices, or a function "
                "from a list of variables to the list of theirs."
            )
        names = list(answer)
        if len(names) != len(rest):
            raise ValueError(
                f"The policy in `parameter_device` must return {len(rest)} "
                f"devices, one per variable; got {len(names)}."
            )
        names = resolve_devices("parameter_device(...)", names, placement)
    where = {**pinned, **dict(zip(rest, names))}
    return [where[i] for i in range(len(where))]


def move_variable(variable: Any, device: str) -> bool:
    """Moves a Keras variable's value to `device`; False if it is there.

    What a `tf.distribute` strategy made, of parts on its devices, becomes an
    ordinary variable.
    """
    old = raw(variable)
    in_parts = made_by_strategy(old)
    if same_device(device_of(variable), device) and not in_parts:
        return False
    if not is_initialized(variable):
        return False
    with (
        old.distribute_strategy.scope()
        if in_parts
        else contextlib.nullcontext()
    ):
        value = old.read_value()  # of all replicas, where each has its own
    # Of those that are absent, TensorFlow takes only this process's for its CPU.
    with tf.device(device if is_reached(device) else HOST_HERE):
        new = tf.Variable(
            value,
            trainable=old.trainable,
            dtype=old.dtype,
            name=old.name.split(":")[0],
        )
    replace_raw(variable, new)
    if not same_device(new.device, device):
        mark_device(variable, device)
    return True


def is_initialized(variable: Any) -> bool:
    """Whether there is a value: not in the first graph of a `tf.function`."""
    return not tf.executing_eagerly() or bool(raw(variable).is_initialized())
