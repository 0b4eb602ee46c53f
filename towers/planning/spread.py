"""spread_layers: consecutive layers of a model on each of several devices."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from towers.foreign.keras_layers import is_built
from towers.keras_model.checks import check_model
from towers.keras_model.layer_graph import LayerGraph
from towers.placement.device_names import available, few, resolve
from towers.placement.pieces import Pieces
from towers.planning import steps as model_steps
from towers.planning.oversized import cut_up, shares

# By how much a stage may be larger than it need be, for a better cut.
_ABOUT = 1.04
_SHOWN = 8  # layers of a `LayerSpread` whose devices its `repr` has


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one device gets.

    Attributes:
      device: its name.
      paths: of its layers, in the order of the graph; not of those in pieces, whose
        bytes there are counted with its own.
      parameter_bytes: of trainable variables.
      slot_bytes: of the optimizer's, those of a few bytes left out.
      state_bytes: of other variables.
      activation_bytes: of what the layers compute for a batch, at most.
      received: how many values come from other stages, for a batch.
    """

    device: str
    paths: tuple[str, ...]
    parameter_bytes: int
    slot_bytes: int
    state_bytes: int
    activation_bytes: int
    received: int

    @property
    def bytes(self) -> int:
        """The bytes of all parts together."""
        return (
            self.parameter_bytes
            + self.slot_bytes
            + self.state_bytes
            + self.activation_bytes
        )


class LayerSpread(dict):
    """Devices, or pieces, by layers' paths, for `layer_devices`; printed, the stages.

    Attributes:
      stages: one per device.
    """

    stages: tuple[Stage, ...] = ()

    def __repr__(self) -> str:
        if len(self) <= _SHOWN:
            return super().__repr__()
        devices = few([*dict.fromkeys(map(str, self.values()))])
        return f"<LayerSpread: {len(self):,} layers on {devices}>"

    def __str__(self) -> str:
        lines = []
        for stage in self.stages:
            ends = dict.fromkeys([*stage.paths[:1], *stage.paths[-1:]])
            lines.append(
                f"{stage.device}: {stage.bytes:,} bytes in {len(stage.paths)} "
                f"layers, {' to '.join(ends) or 'none'} "
                f"(parameters {stage.parameter_bytes:,}, slots "
                f"{stage.slot_bytes:,}, state {stage.state_bytes:,}, "
                f"activations {stage.activation_bytes:,}; receives "
                f"{stage.received} values from other stages)"
            )
        lines += [
            f"{path} in pieces on {pin}"
            for path, pin in self.items()
            if isinstance(pin, Pieces)
        ]
        return "\n".join(lines)


def spread_layers(
    model: Any,
    devices: Sequence[str],
    limits: Any = None,
    batch_size: int | None = None,
    optimizer: Any = None,
    verbose: bool = True,
) -> LayerSpread:
    """Puts consecutive layers of a model on each device, balanced by bytes.

    What counts is what a device holds: parameters, slots of the optimizer, other
    state, and what layers compute for a batch if its size is given. Of all ways to
    cut the order of the graph, those whose largest stage is within 4 % of the least
    are about as good, and of these the one is taken in which fewest values go from
    stage to stage: not through a residual block, if it can be helped. A layer that
    exceeds the limit of each device is cut into pieces on all of them, if it can be:
    a table row-wise, others column-wise; no other is. Models inside that are
    functional or sequential are looked into; layers that hold others are not.

    >>> model = keras.Sequential([
    ...     keras.Input([64]), keras.layers.Dense(64, name="a"),
    ...     keras.layers.Dense(64, name="b"), keras.layers.Dense(64, name="c"),
    ...     keras.layers.Dense(64, name="d")])
    >>> where = towers.spread_layers(model, ["/CPU:0", "/CPU:1"], verbose=False)
    >>> where
    {'a': '/CPU:0', 'b': '/CPU:0', 'c': '/CPU:1', 'd': '/CPU:1'}
    >>> [stage.parameter_bytes for stage in where.stages]
    [33280, 33280]
    >>> placement = towers.Placement(["/CPU:0"], layer_devices=where)

    Args:
      model: a built `keras.Model`. What a model of your own class calls outside
        of its layers stays on the tower.
      devices: names, in the order of the stages.
      limits: how many bytes a device may hold: one number for all, a list, or a
        dict by device.
      batch_size: the rows that are in a stage at once: of the whole batch, if
        towers are micro-batches. None counts no activations.
      optimizer: whose slots count, an optimizer or its name; by default the
        model's, if it is compiled.
      verbose: whether to print what each device gets.

    Returns:
      A dict from paths to devices, for `Placement(layer_devices=...)`, whose
      `stages` tell the bytes of each device.

    Raises:
      TypeError: the model, or a limit, is of the wrong kind.
      ValueError: the model is not built, a device is not there, or the model
        does not fit.
    """
    check_model(model)
    if isinstance(devices, str) or not devices:
        raise ValueError(
            "`devices` must be a list of at least one device name; got "
            f"{devices!r}."
        )
    visible = available(None)
    names = [
        resolve(d, f"devices[{i}]", visible) for i, d in enumerate(devices)
    ]
    bounds = _bounds(limits, devices, names)
    template = getattr(model, "template", model)
    if not is_built(template):
        raise ValueError(
            f"`model` {model.name!r} is not built, so the sizes of its layers "
            "are not known. Call it once on real data first."
        )
    steps = model_steps.steps_of(template, batch_size)
    slots = model_steps.slot_bytes(model, optimizer)
    load = _loads(template, steps, slots)
    pieces = cut_up(steps.steps, load, bounds, names)
    apart = [*zip(*(shares(load[i], len(names)) for i in pieces))]
    rest = [b - sum(map(sum, own)) for b, own in zip(bounds, apart)] or bounds
    sizes = [0 if i in pieces else sum(x) for i, x in enumerate(load)]
    best = _best(steps, sizes, rest)
    if best is None:
        all_sizes = [sum(x) for x in load]
        cut = [steps.steps[i].path for i in pieces]
        raise ValueError(_refusal(steps, all_sizes, bounds, names, cut))
    order, cuts = best
    spread, stages = LayerSpread(), []
    spread.update((steps.steps[i].path, pin) for i, pin in pieces.items())
    for k, device in enumerate(names):
        mine = [i for i in order[cuts[k] : cuts[k + 1]] if i not in pieces]
        paths = [steps.steps[i].path for i in mine]
        spread.update(dict.fromkeys(paths, device))
        held = [*(load[i] for i in mine), *(apart[k] if apart else ())]
        sums = [sum(part) for part in zip(*held)] or [0] * 4
        received = sum(
            maker not in mine and bool(takers & {*mine})
            for maker, takers, _ in steps.values
        )
        stages.append(
            Stage(device, tuple(paths), *sums, received=received)  # type: ignore[misc]
        )
    spread.stages = tuple(stages)
    if verbose:
        print(spread)
    return spread


def _bounds(
    limits: Any, devices: Sequence[str], names: Sequence[str]
) -> list[float]:
    """The bytes that each device may hold."""
    if isinstance(limits, Mapping):
        by_name = {
            resolve(device, "limits", None): size
            for device, size in limits.items()
        }
        unknown = [d for d in by_name if d not in names]
        if unknown:
            raise ValueError(
                f"`limits` names {', '.join(unknown)}, which `devices` does "
                f"not: {', '.join(names)}."
            )
        each: list[Any] = [by_name.get(name) for name in names]
    elif isinstance(limits, Sequence) and not isinstance(limits, str):
        each = list(limits)
    else:
        each = [limits] * len(devices)
    if len(each) != len(devices):
        raise ValueError(
            f"`limits` must hold one number of bytes for each of the "
            f"{len(devices)} devices; got {len(each)}."
        )
    for one in each:
        if one is not None and (
            isinstance(one, bool) or not isinstance(one, (int, float))
        ):
            raise TypeError(
                "`limits` must be numbers of bytes: one for all, a list, or a "
                f"dict by device; got {one!r}."
            )
    return [math.inf if one is None else one for one in each]


def _loads(
    model: Any, steps: model_steps.Steps, slots: dict[int, int]
) -> list[tuple[int, int, int, int]]:
    """Bytes of parameters, slots, state and activations, by step."""
    # By stand-ins for devices, as pins say it: a variable may be of two layers.
    graph = LayerGraph(
        model, (), {step.path: str(i) for i, step in enumerate(steps.steps)}
    )
    parts = [[0, 0, 0, step.activation_bytes] for step in steps.steps]
    for i, step in graph.pinned.items():
        variable = graph.variables[i]
        part = parts[int(str(step))]
        size = model_steps.variable_bytes(variable)
        part[0 if i in graph.trainable else 2] += size
        part[1] += slots.get(id(variable), 0)
    return [(p[0], p[1], p[2], p[3]) for p in parts]


def _best(
    steps: model_steps.Steps,
    load: Sequence[int],
    bounds: Sequence[float],
) -> tuple[list[int], list[int]] | None:
    """An order of the steps, and where each stage begins and ends; if they fit."""
    orders = [[*range(len(load))], steps.depth_first()]
    least = []
    for order in orders:
        sizes = [load[i] for i in order]
        least.append(_cut(sizes, [(0, 0)] * (len(load) + 1), bounds, max)[0])
    if math.isinf(min(least)):
        return None
    roof = [min(b, _ABOUT * min(least)) for b in bounds]
    ways = []
    for order in orders:
        sizes = [load[i] for i in order]
        cost, cuts = _cut(sizes, steps.crossing(order), roof, _summed)
        ways.append((cost, order, cuts))
    _, order, cuts = min(ways, key=lambda way: way[0])
    return order, cuts


def _summed(so_far: Any, stage: Any) -> Any:
    """Costs of two cuts: values, bytes, and how unequal the stages are."""
    return tuple(a + b for a, b in zip(so_far, stage))


def _cut(
    sizes: Sequence[int],
    crossing: Sequence[tuple[int, int]],
    bounds: Sequence[float],
    together: Any,
) -> tuple[Any, list[int]]:
    """The best cut of a sequence into one stage per bound, in their order.

    By dynamic programming over (stages, steps).

    Args:
      sizes: bytes of each step.
      crossing: what a cut before each step costs.
      bounds: the most that each stage may hold.
      together: the cost of all stages, from that of those before and the next:
        the maximum of sizes, or the sum of what crosses.
    """
    n, largest = len(sizes), together is max
    before = [0]
    for size in sizes:
        before.append(before[-1] + size)
    worst: Any = math.inf if largest else (math.inf,) * 3
    nothing: Any = 0 if largest else (0, 0, 0)
    best: list[Any] = [nothing] + [worst] * n
    starts: list[list[int]] = []
    for bound in bounds:
        now: list[Any] = [worst] * (n + 1)
        start = [0] * (n + 1)
        for end in range(n + 1):
            for first in range(end, -1, -1):
                size = before[end] - before[first]
                if size > bound:
                    break
                # Among cuts that cost the same, the one with even sizes.
                cost: Any = (
                    size if largest else (*crossing[end], float(size) ** 2)
                )
                whole = together(best[first], cost)
                if whole < now[end]:
                    now[end], start[end] = whole, first
        best = now
        starts.append(start)
    cuts = [n]
    for start in reversed(starts):
        cuts.append(start[cuts[-1]])
    return best[n], cuts[::-1]


def _refusal(
    steps: model_steps.Steps,
    load: Sequence[int],
    bounds: Sequence[float],
    names: Sequence[str],
    cut: Sequence[str],
) -> str:
    """Why a model does not fit, with figures; also with some in pieces."""
    largest = max(range(len(load)), key=lambda i: load[i])
    least, _ = _cut(
        load, [(0, 0)] * (len(load) + 1), [math.inf] * len(bounds), max
    )
    room = ", ".join(f"{d} {b:,}" for d, b in zip(names, bounds))
    return (
        f"The model does not fit: it takes {sum(load):,} bytes in all, "
        f"{load[largest]:,} of them in its largest layer "
        f"{steps.steps[largest].path!r}, and {least:,} on one of "
        f"{len(names)} devices at the least, but `limits` allows {room}"
        f"{', also with ' * bool(cut)}{', '.join(cut)}{' in pieces' * bool(cut)}. "
        "Give more devices, larger limits or a smaller `batch_size`."
    )
