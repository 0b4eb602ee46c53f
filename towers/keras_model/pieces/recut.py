"""recut: layers cut in place, cut anew, and put together again.

A layer keeps its class, its config, its name and its files. What was a variable is
k of them, each with its slots, and a `Joined` stands for them.
"""

from collections.abc import Sequence, Sized
from typing import Any

import numpy as np

from towers.foreign import keras_slots, keras_tracking
from towers.foreign.keras_layers import all_layers
from towers.foreign.tf_cluster import wait_for_all
from towers.keras_model.pieces import whole
from towers.keras_model.pieces.cuts import Cuts, count_of, is_cut, places_of
from towers.keras_model.pieces.joined import Joined, all_joined
from towers.keras_model.pieces.rules import Weight, sizes_of
from towers.placement.device_names import HOST_HERE, is_reached, process_of


def split(model: Any, cuts: Cuts, optimizers: Sequence[Any]) -> bool:
    """Cuts a model's variables as is asked for; whether any were not so.

    What is in pieces and is not to be is put together.

    Args:
      model: a model, or a nest of them, whose layers are meant.
      cuts: what is asked for.
      optimizers: those that keep slots of the variables.

    Raises:
      ValueError: an optimizer looks at whole variables.
    """
    for optimizer in optimizers if cuts.pins else ():
        keras_slots.check_by_piece(optimizer)
    keys = {weight.key for weight, _ in cuts.weights}
    wrong = [
        weight
        for layer in all_layers(model)
        for weight in _cut_now(layer)
        if weight.key not in keys
    ]
    for weight in wrong:
        replace(weight, None, optimizers)
    changed = [
        (weight, pin)
        for weight, pin in cuts.weights
        if not is_cut(weight, count_of(pin))
    ]
    for weight, pin in changed:
        devices = [
            where if isinstance(where, str) and is_reached(where) else HOST_HERE
            for where in places_of(pin)
        ]
        replace(weight, devices, optimizers)
    whole.spoken_of(model)
    for optimizer in optimizers:
        keras_slots.save_as_one(
            optimizer,
            lambda: all_joined(model),
            Joined,
        )
    return bool(wrong or changed)


def _cut_now(layer: Any) -> list[Weight]:
    return [
        Weight(layer, attribute, value.axis)
        for attribute, value in vars(layer).items()
        if isinstance(value, Joined)
    ]


def replace(
    weight: Weight, devices: Sequence[str] | None, optimizers: Sequence[Any]
) -> None:
    """Puts pieces on these devices, or the whole, in a variable's place."""
    old, axis = weight.value, weight.axis
    before = old.pieces if isinstance(old, Joined) else [old]
    where = [HOST_HERE] if devices is None else devices
    sizes = sizes_of(old.shape[axis], len(where))

    def join(values: Sequence[np.ndarray]) -> np.ndarray:
        if isinstance(old, Joined):
            return np.concatenate(values, old.axis)
        return values[0]

    def cut(value: np.ndarray) -> list[np.ndarray]:
        return np.split(value, np.cumsum(sizes)[:-1], axis)

    paths = [old.path] if devices is None else piece_paths(weight, devices)
    new = [
        keras_tracking.like(old, part, device, path)
        for part, device, path in zip(cut(old.numpy()), where, paths)
    ]
    stands = new[0]
    if devices is not None:
        stands = Joined(new, axis, old.name, old.path)
    keras_tracking.replace_variables(
        weight.owner, weight.attribute, before, new, stands
    )
    for optimizer in optimizers:
        keras_slots.replace_trained(optimizer, before, new, join, cut)
    if any(map(process_of, where)):
        wait_for_all()  # a step would not


def piece_paths(weight: Weight, pieces: Sized) -> list[str]:
    """The paths of a variable's pieces, in Keras, one for each of `pieces`."""
    return [f"{weight.value.path}_{j}" for j in range(len(pieces))]
