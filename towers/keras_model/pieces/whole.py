"""whole: a layer in pieces speaks of whole variables, as the plain model does."""

import types
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from towers.foreign import keras_tracking, tf_slices
from towers.foreign.keras_layers import all_layers
from towers.keras_model.pieces.joined import Joined, all_joined, joined_of


def spoken_of(model: Any) -> None:
    """Has the layers of a model get, set, save and load whole variables.

    So they do by themselves as long as nothing of them is in pieces.
    """
    for layer in all_layers(model):
        _instead(layer, bool(all_joined(layer)), _OF_ALL)
        _instead(layer, bool(joined_of(layer)), _OF_OWN)


def _instead(layer: Any, is_needed: bool, functions: Mapping[str, Any]) -> None:
    """Has functions of a layer in the place of its methods, or not."""
    for name, function in functions.items():
        if is_needed:
            vars(layer)[name] = types.MethodType(function, layer)
        else:
            vars(layer).pop(name, None)


def as_whole(variables: Sequence[Any], joined: Sequence[Joined]) -> list[Any]:
    """Variables, with what stands for them in the place of pieces."""
    stands = {id(piece): one for one in joined for piece in one.pieces}
    each = [stands.get(id(v), v) for v in variables]
    return list({id(x): x for x in each}.values())


def get_weights(layer: Any) -> list[np.ndarray]:
    """What Keras's returned before anything was cut."""
    variables = as_whole(layer.weights, all_joined(layer))
    return [variable.numpy() for variable in variables]


def set_weights(layer: Any, weights: Sequence[Any]) -> None:
    """As Keras's, of whole variables.

    Raises:
      ValueError: there are more or fewer, or one has another shape.
    """
    variables = as_whole(layer.weights, all_joined(layer))
    if len(variables) != len(weights):
        raise ValueError(
            f"`weights` of {layer.name!r} must be {len(variables)} arrays; got "
            f"{len(weights)}. A layer in pieces takes whole variables."
        )
    arrays = [np.asarray(value) for value in weights]
    for variable, value in zip(variables, arrays):
        if tuple(variable.shape) != value.shape:
            raise ValueError(
                f"`weights` of {layer.name!r} must have {variable.path!r} in "
                f"the shape {tuple(variable.shape)}; got {value.shape}."
            )
    for variable, value in zip(variables, arrays):
        variable.assign(value)


def save_own_variables(layer: Any, store: MutableMapping[str, Any]) -> None:
    """As Keras's, of whole variables."""
    for i, variable in enumerate(_own(layer)):
        store[str(i)] = variable.numpy()


def load_own_variables(layer: Any, store: MutableMapping[str, Any]) -> None:
    """As Keras's, of whole variables.

    Raises:
      ValueError: the file has more or fewer, or of another shape.
    """
    variables = _own(layer)
    if len(store.keys()) != len(variables):
        raise ValueError(
            f"Layer {layer.name!r} expected {len(variables)} variables, but "
            f"received {len(store.keys())} variables during loading. "
            f"Expected: {[v.name for v in variables]}"
        )
    for i, variable in enumerate(variables):
        variable.assign(store[str(i)])


def _own(layer: Any) -> list[Any]:
    """A layer's own variables as its files have them, in their order."""
    return as_whole(keras_tracking.own_variables(layer), joined_of(layer))


# What takes the place of the methods of a layer, if any variable in it is in pieces;
# and if one of its own is.
_OF_ALL = {"get_weights": get_weights, "set_weights": set_weights}
_OF_OWN = {
    "save_own_variables": save_own_variables,
    "load_own_variables": load_own_variables,
    tf_slices.CHILDREN: tf_slices.saved_children,
}
