"""parameter_copies: what each tower gets of each variable, and by which way."""

import dataclasses
import functools
from collections.abc import (
    Callable,
    Collection,
    Container,
    Mapping,
    Sequence,
)
from typing import Any

import tensorflow as tf

from towers.engine.host import host_of, on_host
from towers.keras_model import layer_graph
from towers.keras_model.homes import Home
from towers.keras_model.kinds import Kind
from towers.keras_model.moments import statistics
from towers.keras_model.whereabouts import Whereabouts
from towers.placement.device_names import process_of, same_device
from towers.placement.placement import Placement
from towers.verbs.handing_out import Promised, handed_out
from towers.verbs.overwritten import replicate_overwritten
from towers.verbs.parcels import is_small, parcelled, replicate_together
from towers.verbs.relays import Relays, by_relays, size_of
from towers.verbs.replicate import replicate
from towers.verbs.scatter import scatter
from towers.verbs.split import Shards
from towers.verbs.stand_ins import stand_ins


@dataclasses.dataclass(frozen=True)
class _Read:
    """A variable that has been read, to go to the towers.

    Attributes:
      value: what was read, where the variable lives.
      device: that.
      places: per tower, where that takes it.
      shards: the batch.
      kept: by device per tower None, or whether it had rows.
    """

    value: tf.Tensor
    device: str
    places: Sequence[str]
    shards: Shards
    kept: Callable[[str], list[Any]]

    @property
    def each(self) -> list[tf.Tensor]:
        """As it is, for each tower."""
        return [self.value] * len(self.shards.fed)


def _dealt(read: _Read) -> list[Any]:
    return scatter(read.value, read.shards.ranges, read.device)


def _on_host(read: _Read) -> list[tf.Tensor]:
    with on_host(read.device):
        value = tf.identity(read.value)
    return [value] * len(read.shards.fed)


def _alike(read: _Read) -> list[tf.Tensor]:
    return read.each


# How each kind of variable goes to the towers: what each tower has of it. What is
# small travels with others of its kind.
_TO_TOWERS: dict[Kind, Callable[[_Read], list[Any]]] = {
    Kind.TRAINED: _alike,
    Kind.OVERWRITTEN: _alike,
    Kind.SEED: _on_host,
    Kind.ROWS: _dealt,
    Kind.STATISTIC: _alike,
    Kind.METRIC: _alike,
    Kind.OWN: _alike,
}


@dataclasses.dataclass(frozen=True)
class Copies:
    """What towers are given of a model's variables.

    Attributes:
      values: of all variables, where they live.
      each: per tower, its copies of them.
      located: per tower, where it is in the batch, for what it draws, see
        `draws.located`; None where nothing is.
      parameters: per tower, its copies of those that are trained, as wide; of
        tables of which it reads rows what is read if somebody asks, `Promised`.
    """

    values: list[Any]
    each: list[list[Any]]
    located: list[tf.Tensor | None]
    parameters: list[list[Any]]


def replicated(
    graph: layer_graph.LayerGraph,
    homes: list[Home],
    placement: Placement,
    shards: Shards,
    halves: Mapping[int, tf.DType],
    are_handed_out: bool = False,
    tables: Collection[int] = (),
) -> Copies:
    """Copies of all variables for each tower.

    Args:
      graph: names the variables.
      homes: where they live.
      placement: says where the towers are.
      shards: the batch.
      halves: by place the dtype of those that cross in half of theirs.
      are_handed_out: whether anyone but the towers may take their parameters.
      tables: the places of those that are not read, see `stand_ins`.
    """
    kept = functools.cache(shards.rows.kept)
    values, columns = [], []
    places = _places(graph, placement)
    with tf.name_scope("replicate"):
        unread = {
            k: stand_ins(homes[k].variable, device, kept(device))
            for k, device in ((k, homes[k].device) for k in tables)
        }
        for k, home in enumerate(homes):
            with tf.device(home.device):
                values.append(unread[k][0] if k in unread else home.read())
        for k, (home, kind) in enumerate(zip(homes, graph.kinds)):
            with tf.device(home.device):
                if kind is Kind.ROWS:
                    values[k] = of_all_rows(
                        graph.variables[k], values[k], shards
                    )
                read = _Read(values[k], home.device, places[k], shards, kept)
                columns.append(unread.get(k) or _TO_TOWERS[kind](read))
        where = Whereabouts(shards, placement) if graph.seeds else None
        if where is not None:
            columns.append(where.sent())
        parcels = _parcels(*(graph, homes, values, places, halves, tables))
        if where is not None and where.travels:
            _with_seeds(parcels, graph, where).append(len(values))
        ways = _ways(parcels, [column[0] for column in columns])
        for key, members in parcels.items():
            device, targets, dtype, _ = key
            kind = [*graph.kinds, Kind.SEED][members[0]]
            if kind is Kind.OVERWRITTEN:
                some = [values[k] for k in members]
                handed = replicate_overwritten(some, device, targets, kept)
            elif dtype.is_floating:
                some = [values[k] for k in members]
                trained = kind is Kind.TRAINED
                half = halves.get(members[0])
                within = functools.partial(copies, trained=trained, half=half)
                handed = (
                    by_relays(some, device, targets, ways[key], kept, within)
                    if key in ways
                    else within(some, device, targets, kept)
                )
            elif len(members) > 1 or key in ways:
                handed = parcelled(
                    [columns[k] for k in members],
                    *(device, targets, ways.get(key, targets)),
                )
            else:
                continue
            for k, column in zip(members, handed):
                columns[k] = column
        n = len(placement.devices)
        located = [None] * n if where is None else where.taken(columns.pop())
        each = [list(own) for own in zip(*columns)] or [[]] * n
        shown = [{k: own[k] for k in graph.trainable} for own in each]
        for k in sorted(shown[0]) if are_handed_out else ():
            for i, device in enumerate(placement.devices):
                if k in tables:
                    promised = Promised(
                        each[i][k], homes[k].read, homes[k].device
                    )
                    shown[i][k], each[i][k] = promised, promised.taken
                elif k in halves:
                    there = graph.elsewhere(i, device).get(k, device)
                    pair = handed_out(values[k], each[i][k], there)
                    shown[i][k], each[i][k] = pair
    return Copies(values, each, located, [[*own.values()] for own in shown])


def _places(
    graph: layer_graph.LayerGraph, placement: Placement
) -> list[tuple[str, ...]]:
    """For each variable, where each tower takes its copy."""
    each = [
        (graph.elsewhere(i, device), device)
        for i, device in enumerate(placement.devices)
    ]
    return [
        tuple(there.get(k, device) for there, device in each)
        for k in range(len(graph.variables))
    ]


def _parcels(
    graph: layer_graph.LayerGraph,
    homes: Sequence[Home],
    values: Sequence[tf.Tensor],
    places: Sequence[tuple[str, ...]],
    halves: Mapping[int, tf.DType],
    tables: Container[int],
) -> dict[Any, list[int]]:
    """What travels together: by from where, to where, in which dtype, and group.

    Args:
      graph: names the variables.
      homes: where they live.
      values: theirs.
      places: where they go, see `_places`.
      halves: those that are sent in a half dtype, and in which.
      tables: the places of those that do not.
    """
    parcels: dict[Any, list[int]] = {}
    dtypes = [halves.get(k, x.dtype) for k, x in enumerate(values)]
    groups = _groups(graph, halves)
    small = list(map(is_small, values, dtypes))
    for k, (home, kind) in enumerate(zip(homes, graph.kinds)):
        if kind is Kind.ROWS or k in tables:
            continue
        device = home.device if kind is not Kind.SEED else host_of(home.device)
        together = small[k] and not all(
            same_device(place, device) for place in places[k]
        )
        key = device, places[k], dtypes[k], groups[k] if together else k
        parcels.setdefault(key, []).append(k)
    return parcels


def _with_seeds(
    parcels: dict[Any, list[int]],
    graph: layer_graph.LayerGraph,
    where: Whereabouts,
) -> list[int]:
    """The parcel for what tells towers where they are: with seeds, if those come
    from there."""
    for (device, places, dtype, _), members in parcels.items():
        is_seed = members[0] in graph.seeds and dtype == tf.int64
        goes_there = places == where.hosts and same_device(device, where.home)
        if is_seed and goes_there:
            return members
    return parcels.setdefault((where.home, where.hosts, tf.int64, None), [])


def _ways(
    parcels: dict[Any, list[int]], values: Sequence[tf.Tensor]
) -> dict[Any, list[str]]:
    """By what relays parcels go, if by any; the largest choose first.

    Args:
      parcels: see `_parcels`.
      values: by member.
    """
    devices = {name for device, places, *_ in parcels for name in places}
    devices.update(device for device, *_ in parcels)
    if len(set(map(process_of, devices))) < 2:
        return {}
    sizes = {
        key: sum(size_of(values[k], key[2]) for k in members)
        for key, members in parcels.items()
    }
    relays, by_parcel = Relays(), {}
    for key in sorted(sizes, key=lambda key: -sizes[key]):
        device, places, *_ = key
        ways = relays.ways(device, places, sizes[key])
        if ways != list(places):
            by_parcel[key] = ways
    return by_parcel


def _groups(
    graph: layer_graph.LayerGraph, halves: Mapping[int, tf.DType]
) -> list[Any]:
    """Which variables are used, or have gradients, only with which others.

    What travels together comes as a whole, or not at all: in training no tower
    asks for moving statistics, and of frozen weights nobody wants gradients. Nor
    does what is cast for that go with what is of that dtype.
    """
    models = [{id(v) for v in model.variables} for model in graph.models]
    norms = {
        id(v): layer.trainable
        for layer in graph.batch_norms.values()
        for v in statistics(layer)
    }
    return [
        (
            tuple(id(v) in own for own in models),
            *(kind, norms.get(id(v)), k in halves),
        )
        for k, (v, kind) in enumerate(zip(graph.variables, graph.kinds))
    ]


def copies(
    values: Sequence[tf.Tensor],
    home: str,
    places: Sequence[str],
    kept: Callable[[str], Sequence[tf.Tensor | None]],
    trained: bool,
    half: tf.DType | None = None,
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
      half: the dtype in which they cross, and so do gradients of towers that are
        alone on a device; sums are of float32.
    """
    units: dict[Any, list[int]] = {}  # of towers that share what crosses
    for i, place in enumerate(places):
        alone = same_device(place, home)
        units.setdefault(i if alone else place, []).append(i)
    flags = [kept(home)[u[0]] if len(u) == 1 else None for u in units.values()]
    if len(values) == 1:
        sent = [replicate(values[0], home, flags, half)]
    else:
        targets = [places[unit[0]] for unit in units.values()]
        sent = replicate_together(values, home, targets, flags, trained, half)
    by_tower: list[dict[int, tf.Tensor]] = [{} for _ in values]
    for column, of_value in zip(sent, by_tower):
        for unit, copy in zip(units.values(), column):
            there = [copy]
            if len(unit) > 1:
                device = places[unit[0]]
                with tf.device(device):
                    copy = tf.identity(copy)
                flags = [kept(device)[i] for i in unit]
                there = replicate(copy, device, flags, half)
            of_value.update(zip(unit, there))
    return [[of_value[i] for i in range(len(places))] for of_value in by_tower]


def of_all_rows(variable: Any, state: tf.Tensor, shards: Shards) -> tf.Tensor:
    """The state of a stateful RNN, if that is of as many rows as the batch."""
    count = state.shape[0]
    problem = (  # in Keras's words
        "If an RNN is stateful, the batch size of the input sequences must be "
        "the same as the batch size of the initial state. "
        f"{variable.path}: - Expected batch size: {count}; leave out a last "
        "batch that is smaller."
    )
    rows = shards.ranges.true
    if all(isinstance(r, int) for r in rows) and sum(rows) != count:
        raise ValueError(problem)
    with on_host(state.device):
        check = tf.debugging.assert_equal(
            tf.reduce_sum(shards.rows.counts), count, message=problem
        )
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(state)
