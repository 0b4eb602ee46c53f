"""pipeline: stages of a model on devices, and micro-batches that follow on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from towers.keras_model.layer_graph import LayerGraph
from towers.keras_model.pieces.recut import piece_paths
from towers.placement.device_names import check_count
from towers.placement.pieces import Pieces
from towers.placement.placement import Placement
from towers.planning.spread import spread_layers


def pipeline(
    model: Any,
    devices: Sequence[Any],
    micro_batches: int,
    limits: Any = None,
    batch_size: int | None = None,
    optimizer: Any = None,
    **kwargs: Any,
) -> Placement:
    """A placement with a stage of the model on each device.

    Each micro-batch is a tower: while a device computes one, the device of the
    next stage computes the one before. All of a batch are in flight at once, so
    a stage keeps what it computed for the whole batch until the backward pass
    has come to it (`batch_size` in the sizes that are balanced). Of s stages
    that take equally long, each waits (s - 1) / (m + s - 1) of the time with m
    micro-batches (Huang et al., "GPipe", 2019): 11 % for 2 and 8. The variables
    of a stage live on its device, are copied nowhere, and the micro-batches'
    gradients are summed there.

    >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(8),
    ...     keras.layers.Dense(8)])
    >>> placement = towers.pipeline(model, ["/CPU:0", "/CPU:1"], 4)
    >>> len(placement.devices), [*placement.layer_devices.values()]
    (4, ['/CPU:0', '/CPU:1'])
    >>> model = towers.TowerModel(model, placement)

    Several pipelines share the batch. Variables then live on the devices of the
    first one, and go once to those of each other, whose gradients come back as
    one sum.

    Args:
      model: a built `keras.Model`, which `spread_layers` cuts into stages.
      devices: one per stage; or a list of such lists, one for each pipeline.
      micro_batches: how many towers a pipeline has.
      limits, batch_size, optimizer: as for `spread_layers`.
      **kwargs: as for `Placement`. By default outputs are gathered, and the loss
        computed, on the last stage's device.

    Raises:
      TypeError: `model` is no Keras model, or `micro_batches` no integer.
      ValueError: pipelines have different numbers of stages, a device is not
        there, or the model is not built or does not fit.
    """
    check_count("micro_batches", micro_batches)
    alone = all(isinstance(device, str) for device in devices)
    lines = [devices] if alone else devices
    if not all(len(line) == len(lines[0]) for line in lines):
        raise ValueError(
            "`devices` must hold as many devices for each pipeline, one per "
            f"stage; got {[list(line) for line in lines]!r}."
        )
    spread = spread_layers(
        model, lines[0], limits, batch_size, optimizer, verbose=False
    )
    first = [stage.device for stage in spread.stages]
    kwargs.setdefault("output_device", first[-1])
    if len(lines) == 1:
        return Placement(
            first[:1] * micro_batches, layer_devices=spread, **kwargs
        )
    kwargs.setdefault("parameter_device", _Beside(model, spread, first[0]))
    pins = {
        path: [line[k] for line in lines for _ in range(micro_batches)]
        for k, stage in enumerate(spread.stages)
        for path in stage.paths
    }
    for path, pin in spread.items():
        if isinstance(pin, Pieces):
            own = [dataclasses.replace(pin, devices=tuple(x)) for x in lines]
            pins[path] = [one for one in own for _ in range(micro_batches)]
    return Placement(
        [line[0] for line in lines for _ in range(micro_batches)],
        layer_devices=pins,
        **kwargs,
    )


class _Beside:
    """A policy: variables on the devices of their layers."""

    def __init__(self, model: Any, spread: Any, rest: str):
        graph = LayerGraph(getattr(model, "template", model), (), spread)
        self._rest = rest
        self._devices = {
            graph.variables[i].path: device
            for i, device in graph.pinned.items()
        }
        for weight, pin in graph.cuts.weights:
            for path, device in zip(piece_paths(weight, pin), pin.devices):
                self._devices[path] = device

    def __call__(self, variables: Sequence[Any]) -> list[str]:
        return [self._devices.get(v.path, self._rest) for v in variables]
