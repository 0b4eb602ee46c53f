"""Placement: which device runs each tower, and where the rest happens."""

import dataclasses
import reprlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from towers.placement import device_names
from towers.placement.device_names import available, resolve
from towers.placement.layer_devices import (
    LayerDevices,
    as_printed,
    checked_layer_devices,
    devices_of,
)
from towers.placement.policies import POLICIES, Policy
from towers.placement.weights import checked_weights
from towers.placement.worked_out import WorkedOut

_SHORT = reprlib.Repr()  # of six of many, and of ends of what is long
_SHORT.maxdict = _SHORT.maxtuple = 6
_SHORT.maxstring = _SHORT.maxother = 80


@dataclasses.dataclass(frozen=True)
class Placement(WorkedOut):
    """Where towers, parameters, inputs and outputs live.

    Making one looks at the machine's devices, and that starts TensorFlow:
    call `tf.config.experimental.set_memory_growth` and the like before.

    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"], weights=[3, 1])
    >>> placement.devices
    ('/CPU:0', '/CPU:1')
    >>> placement.output_device
    '/CPU:0'

    Args:
      devices: one device name per tower, repeats allowed, in any spelling that
        `tf.device` takes ("/GPU:0", "gpu:0", "/job:worker/task:1/CPU:0").
      parameter_device: the device of the variables and of the optimizer's
        arithmetic, or a policy: a function from the list of variables to the
        list of their devices. "balanced" and "round_robin" are the policies of
        these names, over the towers' devices.
      weights: one share of the batch per tower, as non-negative numbers with a
        positive sum; None means equal shares. A tower of weight 0 gets no rows.
      input_device: where batches are split.
      output_device: where outputs are gathered. By default the parameter
        device if that is one device, else the first tower's.
      available: the device names to check against. None asks TensorFlow;
        "any" checks the spelling only, for a graph that will run elsewhere.
      layer_devices: layers that run on a device of their own, and all that
        they hold: by path in nested models ("encoder/embedding"), by name
        ("embedding"), or by a regular expression that matches a whole path
        ("encoder/.*"). A layer's own key beats that of one that holds it; of
        its own keys a path beats a name beats a pattern. One device is the
        same for all towers: the layer's variables live there, are copied to no
        tower, and are not shown to a policy. Of a table that nothing but its
        Embedding reads, towers send ids and get rows, and a step takes as long
        however many it has, with SGD; Adagrad computes over all of it, Adam and
        momentum change all of it, as in plain Keras. A list has one device per tower:
        the variables live where `parameter_device` says, and go from there to
        each device that needs them, once. In the place of a device `column_wise`
        or `row_wise` has those of a layer's pieces, with the same meaning.
      reasons: what is said about its weights; printed, and else of no account.

    Raises:
      TypeError: a device is no name, or an argument has the wrong type.
      ValueError: a name is malformed or absent, or the weights do not fit.
    """

    devices: Sequence[str]
    parameter_device: str | Policy = "/CPU:0"
    weights: Sequence[float] | None = None
    input_device: str = "/CPU:0"
    output_device: str | None = None
    available: Sequence[str] | str | None = None
    layer_devices: LayerDevices = dataclasses.field(
        default_factory=dict, hash=False
    )
    reasons: Sequence[str] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        visible = available(self.available)

        def resolve(argument: str, name: Any) -> str:
            return device_names.resolve(name, argument, visible)

        def set_field(field: str, value: Any) -> None:
            object.__setattr__(self, field, value)

        devices = self.devices
        if isinstance(devices, str) or not isinstance(devices, Sequence):
            raise TypeError(
                "`devices` must be a list of device names, one per tower; "
                f"got {devices!r}. For two towers on two GPUs, write "
                '["/GPU:0", "/GPU:1"].'
            )
        if not devices:
            raise ValueError(
                "`devices` is empty, but there must be at least one tower. "
                'For one tower on the host, write ["/CPU:0"].'
            )
        set_field(
            "devices",
            tuple(
                resolve(f"devices[{i}]", name) for i, name in enumerate(devices)
            ),
        )
        set_field("weights", checked_weights(self.weights, len(devices)))
        set_field("input_device", resolve("input_device", self.input_device))
        parameters = self.parameter_device
        if isinstance(parameters, str) and parameters in POLICIES:
            each = [*dict.fromkeys(self.devices)]
            set_field("parameter_device", POLICIES[parameters](each))
        elif not callable(parameters):
            set_field(
                "parameter_device", resolve("parameter_device", parameters)
            )
        default = (
            self.devices[0]
            if callable(self.parameter_device)
            else self.parameter_device
        )
        output = default if self.output_device is None else self.output_device
        set_field("output_device", resolve("output_device", output))
        pins = checked_layer_devices(
            self.layer_devices, len(self.devices), resolve
        )
        set_field("layer_devices", pins)

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights as given, or 1.0 for each tower."""
        return tuple(self.weights or [1.0] * len(self.devices))

    @property
    def pinned_devices(self) -> list[str]:
        """All devices that `layer_devices` names."""
        pins = self.layer_devices.values()
        return [device for pin in pins for device in devices_of(pin)]

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)
        short = {f.name: _SHORT.repr(getattr(self, f.name)) for f in fields}
        arguments = ", ".join(
            f"{name}={value}" for name, value in short.items()
        )
        return f"Placement({arguments})"

    def _repr_html_(self) -> str:
        """The sentences of `print`, which notebooks show."""
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        shares = self.shares
        towers = ", ".join(
            f"tower_{i} on {device} ({share / sum(shares):.0%} of the rows)"
            for i, (device, share) in enumerate(zip(self.devices, shares))
        )
        parameters = (
            "by policy"
            if callable(self.parameter_device)
            else f"on {self.parameter_device}"
        )
        return (
            f"{towers}; batches split on {self.input_device}, parameters "
            f"{parameters}, outputs gathered on {self.output_device}"
            + as_printed(self.layer_devices)
            + "".join(f"\n{reason}" for reason in self.reasons)
        )


def as_placement(placement: Any) -> Any:
    """What stands for a placement, as one: 2 for two GPUs, or a list of devices."""
    if isinstance(placement, int) and not isinstance(placement, bool):
        return Placement.gpus(placement)
    if isinstance(placement, (list, tuple)):
        return Placement(placement)
    return placement


def check_placement(placement: Any) -> None:
    """Raises a `TypeError` unless `placement` is a `Placement`."""
    if not isinstance(placement, Placement):
        raise TypeError(
            "`placement` must be a towers.Placement; got "
            f"{type(placement).__name__}. Write towers.Placement(devices=...)."
        )


def resolve_devices(
    argument: str, names: Iterable[Any], placement: Placement
) -> list[str]:
    """Checks names that a policy gave, as `Placement` checks its own."""
    visible = available(placement.available)
    return [
        resolve(name, f"{argument}[{i}]", visible)
        for i, name in enumerate(names)
    ]
