"""layer_devices: what a placement says of its layers, checked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from towers.placement.pieces import Pieces

Resolve = Callable[[str, Any], str]
LayerDevices = Mapping[str, str | Pieces | Sequence[str] | Sequence[Pieces]]


def checked_layer_devices(
    pins: Any, towers: int, resolve: Resolve
) -> dict[str, Any]:
    """By layer a device or `Pieces`, or a tuple with one per tower.

    Args:
      pins: what a placement was given.
      towers: how many there are.
      resolve: of an argument's name and a device's, how that is spelled.

    Raises:
      TypeError: it is no dict from names.
      ValueError: a device is unknown, a list does not have one for each tower, or
        its pieces are not alike.
    """
    pins = {} if pins is None else pins
    if not isinstance(pins, Mapping):
        raise TypeError(
            "`layer_devices` must be a dict from layers' names to devices; "
            f'got {pins!r}. Write {{"embedding": "/CPU:0"}}.'
        )
    return {
        name: _pin(name, pin, towers, resolve) for name, pin in pins.items()
    }


def _pin(name: Any, pin: Any, towers: int, resolve: Resolve) -> Any:
    if not isinstance(name, str):
        raise TypeError(
            "`layer_devices` must be a dict from layers' names to "
            f"devices; got the key {name!r}. Write the layer's name, "
            'or its path: "encoder/words".'
        )
    argument = f"layer_devices[{name!r}]"
    if isinstance(pin, str) or not isinstance(pin, Sequence):
        return _place(argument, pin, resolve)
    if len(pin) != towers:
        raise ValueError(
            f"`{argument}` must be one device, or a list with one for "
            f"each of the {towers} towers; got {list(pin)!r}. For a layer in "
            "pieces, write towers.column_wise([...])."
        )
    if len({_kind(one) for one in pin}) > 1:
        raise ValueError(
            f"`{argument}` must have the same for each tower: a device, or as "
            f"many pieces, cut the same way; got {list(pin)!r}."
        )
    return tuple(
        _place(f"{argument}[{i}]", one, resolve) for i, one in enumerate(pin)
    )


def _place(argument: str, place: Any, resolve: Resolve) -> Any:
    if isinstance(place, Pieces):
        return place.resolved(argument, resolve)
    return resolve(argument, place)


def _kind(place: Any) -> Any:
    return (place.by, len(place)) if isinstance(place, Pieces) else None


def devices_of(pin: Any) -> Iterator[str]:
    """All devices that one value of `layer_devices` names."""
    for place in pin if isinstance(pin, tuple) else [pin]:
        yield from place.devices if isinstance(place, Pieces) else [place]


def is_in_pieces(pin: Any) -> bool:
    """Whether one value of `layer_devices` is of pieces."""
    return isinstance(pin[0] if isinstance(pin, tuple) else pin, Pieces)


def as_printed(layer_devices: Mapping[str, Any]) -> str:
    """What a placement prints of it."""
    held: dict[Any, list[str]] = {}
    for name, pin in layer_devices.items():
        held.setdefault(pin, []).append(name)
    text = ""
    for pin, names in held.items():
        if len(names) > 4:  # as `spread_layers` has it
            names = [f"{names[0]} and {len(names) - 1} more"]
        several = pin if isinstance(pin, tuple) else [pin]
        by = "; " if isinstance(several[0], Pieces) else ", "
        where = by.join(map(str, several))
        text += "".join(f"; {name} on {where}" for name in names)
    return text
