"""parameters: where variables live, and moving them there."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.engine.host import host_of, on_host
from towers.foreign import keras_compile, keras_optimizer
from towers.foreign.keras_layers import (
    device_of,
    made_by_strategy,
    mean_for,
    raw,
    replace_raw,
)
from towers.keras_model import checks, layer_graph
from towers.keras_model.moments import statistics
from towers.placement.device_names import same_device
from towers.placement.placement import (
    Placement,
    check_placement,
    resolve_devices,
)
from towers.verbs.parcels import is_small, parcelled, replicate_together
from towers.verbs.replicate import replicate, replicate_overwritten
from towers.verbs.rows import keep_flags
from towers.verbs.scatter import scatter
from towers.verbs.split import Shards


@dataclasses.dataclass(frozen=True)
class Home:
    """Where a model's variable lives for a graph.

    Attributes:
      variable: what the graph reads.
      device: what works on it.
      owner: what is assigned to; the Keras variable if the graph shares it.
    """

    variable: tf.Variable
    device: str
    owner: Any


def place_variables(model: Any, placement: Placement) -> None:
    """Moves a model's variables, and its optimizers', where placement says.

    Values are kept. Functions that Keras made of the model before are
    dropped, since they would go on with the old variables; a `tf.function` of
    your own that was traced before must be made again.

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
      ValueError: the policy returns the wrong number of devices, or a bad one.
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
    graph = layer_graph.LayerGraph(
        getattr(model, "template", model), (), placement.layer_devices
    )
    variables, devices = graph.variables, parameter_devices(graph, placement)
    where = {id(v): device for v, device in zip(variables, devices)}
    pairs = [
        (v, device)
        for v, device in zip(variables, devices)
        if id(v) not in kept
    ]
    pairs += _of_optimizers(model, placement, where)
    pairs += [
        (v, placement.output_device)
        for v in keras_compile.metric_variables(model)
    ]
    return any([move_variable(v, device) for v, device in pairs])


def place_slots(model: Any, placement: Placement) -> None:
    """Moves what the optimizers of a placed model keep beside its variables.

    What Keras makes for itself, and not like a variable, is on the default device.
    """
    for variable, device in _of_optimizers(model, placement, {}):
        move_variable(variable, device)


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
        self._known: dict[int, tuple[Any, tf.Variable]] = {}

    def place_new(self, model: Any) -> bool:
        """Places what has been made since; whether there was anything.

        What was placed once stays: a graph that is being made may read it.
        """
        variables = layer_graph.variables_of(model.template)
        new = [v for v in variables if id(v) not in self._known]
        if new:
            with tf.init_scope():
                # The optimizer's too, if the model is compiled.
                move_variables(model, model.placement, self._known)
                new = [v for v in new if is_initialized(v)]
            self._known.update((id(v), (v, raw(v))) for v in new)
        return bool(new)

    def note(self, model: Any) -> bool:
        """Notes where variables are now; whether any has moved, or is gone."""
        variables = layer_graph.variables_of(model.template)
        now = {id(v): (v, raw(v)) for v in variables}
        before, self._known = self._known, now
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
        names = list(policy([graph.variables[i] for i in rest]))
        if len(names) != len(rest):
            raise ValueError(
                f"The policy in `parameter_device` must return {len(rest)} "
                f"devices, one per variable; got {len(names)}."
            )
        names = resolve_devices("parameter_device(...)", names, placement)
    where = {**pinned, **dict(zip(rest, names))}
    return [where[i] for i in range(len(where))]


def replicated(
    graph: layer_graph.LayerGraph,
    homes: list[Home],
    placement: Placement,
    shards: Shards,
) -> tuple[list[Any], list[list[Any]]]:
    """Values of all variables, and copies per tower."""
    n, values = len(placement.devices), []
    columns: dict[int, list[Any]] = {}
    parcels: dict[Any, list[int]] = {}  # of what travels together
    elsewhere = [
        graph.elsewhere(i, device) for i, device in enumerate(placement.devices)
    ]
    kept = functools.cache(
        functools.partial(keep_flags, shards.rows, shards.may_be_empty)
    )
    with tf.name_scope("replicate"):
        kinds = _kinds(graph)
        for k, home in enumerate(homes):
            device = home.device
            with tf.device(device):
                value = home.variable.read_value()
                if graph.is_seed(k):
                    with on_host(device):
                        column = [graph.stream(k, value, i) for i in range(n)]
                    device = host_of(device)
                elif k in graph.row_states:
                    value = of_all_rows(graph.variables[k], value, shards)
                    column = scatter(value, shards.ranges, device)
                elif graph.is_overwritten(k):
                    column = replicate_overwritten(value, device, kept(device))
                else:
                    column = [value] * n
            values.append(value)
            columns[k] = column
            if k in graph.row_states or graph.is_overwritten(k):
                continue
            places = tuple(
                there.get(k, tower)
                for there, tower in zip(elsewhere, placement.devices)
            )
            together = is_small(value) and not all(
                same_device(place, device) for place in places
            )
            key = device, places, value.dtype, kinds[k] if together else k
            parcels.setdefault(key, []).append(k)
        for (device, places, dtype, _), members in parcels.items():
            if dtype.is_floating:
                some = [values[k] for k in members]
                trained = members[0] in graph.trainable
                given = copies(some, device, places, kept, trained)
            elif len(members) > 1:
                some = [columns[k] for k in members]
                given = parcelled(some, device, places)
            else:
                continue
            columns.update(zip(members, given))
    each = [columns[k] for k in range(len(homes))]
    return values, [list(own) for own in zip(*each)] or [[]] * n


def _kinds(graph: layer_graph.LayerGraph) -> list[Any]:
    """Which variables are used, or have gradients, only with which others.

    What travels together comes as a whole, or not at all: in training no tower
    asks for moving statistics, and of frozen weights nobody wants gradients.
    """
    models = [{id(v) for v in model.variables} for model in graph.models]
    trainable = set(graph.trainable)
    norms = {
        id(v): layer.trainable
        for layer in graph.batch_norms().values()
        for v in statistics(layer)
    }
    return [
        (
            tuple(id(v) in of_model for of_model in models),
            i in trainable,
            norms.get(id(v)),
            graph.is_metric(i),
            graph.is_seed(i),
        )
        for i, v in enumerate(graph.variables)
    ]


def copies(
    values: Sequence[tf.Tensor],
    home: str,
    places: Sequence[str],
    kept: Callable[[str], Sequence[tf.Tensor | None]],
    trained: bool,
) -> list[list[tf.Tensor]]:
    """One copy per tower of each value; they cross to each device once.

    Where several towers have theirs on one device, their gradients are summed
    there, and the sum crosses.

    Args:
      values: floats on `home`, small ones if there are several.
      home: where the variables live.
      places: where each tower takes its copies.
      kept: by device per tower None, or whether it had rows.
      trained: whether they are trainable.
    """
    units: dict[Any, list[int]] = {}  # of towers that share what crosses
    for i, place in enumerate(places):
        alone = same_device(place, home)
        units.setdefault(i if alone else place, []).append(i)
    flags = [kept(home)[u[0]] if len(u) == 1 else None for u in units.values()]
    if len(values) == 1:
        sent = [replicate(values[0], home, flags)]
    else:
        targets = [places[unit[0]] for unit in units.values()]
        sent = replicate_together(values, home, targets, flags, trained)
    made: list[dict[int, tf.Tensor]] = [{} for _ in values]
    for column, of_value in zip(sent, made):
        for unit, copy in zip(units.values(), column):
            there = [copy]
            if len(unit) > 1:
                device = places[unit[0]]
                with tf.device(device):
                    copy = tf.identity(copy)
                there = replicate(copy, device, [kept(device)[i] for i in unit])
            of_value.update(zip(unit, there))
    return [[of_value[i] for i in range(len(places))] for of_value in made]


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
    with tf.device(device):
        new = tf.Variable(
            value,
            trainable=old.trainable,
            dtype=old.dtype,
            name=old.name.split(":")[0],
        )
    replace_raw(variable, new)
    if not same_device(new.device, device):
        mean_for(variable, device)
    return True


def is_initialized(variable: Any) -> bool:
    """Whether there is a value: not in the first graph of a `tf.function`."""
    return not tf.executing_eagerly() or bool(raw(variable).is_initialized())


def of_all_rows(variable: Any, state: tf.Tensor, shards: Shards) -> tf.Tensor:
    """The state of a stateful RNN, if that is of as many rows as the batch."""
    count = state.shape[0]
    problem = (
        f"{variable.path!r} keeps a state for each of {count} rows, since its "
        "layer is stateful, but the batch has another number. Expected "
        f"batches of {count} rows; leave out a last one that is smaller."
    )
    rows = shards.ranges.true
    if all(isinstance(r, int) for r in rows) and sum(rows) != count:
        raise ValueError(problem)
    with on_host(state.device):
        check = tf.debugging.assert_equal(
            tf.reduce_sum(shards.rows), count, message=problem
        )
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(state)
