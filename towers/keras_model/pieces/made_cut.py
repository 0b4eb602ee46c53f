"""made_cut: layers that are cut by themselves, before they have any weights."""

import functools
from typing import Any

import keras
import tensorflow as tf

from towers.foreign import keras_cut
from towers.foreign.keras_tracking import set_path
from towers.foreign.patches import patched
from towers.keras_model.pieces import whole
from towers.keras_model.pieces.cuts import is_cut
from towers.keras_model.pieces.joined import Joined
from towers.keras_model.pieces.recut import replace
from towers.keras_model.pieces.rules import (
    CUTTABLE,
    objections,
    refusal,
    rule_of,
    sizes_of,
    weights_of,
)
from towers.keras_model.pieces.starts import starts
from towers.placement.device_names import (
    HOST_HERE,
    available,
    is_reached,
    resolve,
)
from towers.placement.pieces import Pieces


def split_layer(layer: keras.Layer, where: Pieces) -> keras.Layer:
    """Cuts a layer before it is built, so that no device ever holds it whole.

    When it is built, each piece of its weights is made on its device, and begins with
    numbers of its own, of the distribution that the whole would have. Give a
    placement the same pieces: another one cuts the layer anew, or joins it.

    >>> words = towers.split_layer(
    ...     keras.layers.Embedding(1000, 64, name="words"),
    ...     towers.row_wise(["/CPU:0", "/CPU:1"]))
    >>> model = keras.Sequential([keras.Input([9], dtype="int32"), words])
    >>> [table.shape[0] for table in words.weights]
    [500, 500]
    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"], layer_devices={
    ...     "words": towers.row_wise(["/CPU:0", "/CPU:1"])})
    >>> model = towers.TowerModel(model, placement)

    A layer that is built is cut at once, its numbers kept; before an optimizer has
    slots of them. What looks at all of a weight to begin with, as an orthogonal start
    does, is made on the host. `get_weights` and files of a plain model speak of pieces,
    those of the layer itself and of a `TowerModel` of whole weights.

    Args:
      layer: a Dense, EinsumDense, Embedding or convolution; a MultiHeadAttention that
        is built.
      where: `column_wise` or `row_wise`, for all towers.

    Returns:
      The layer.

    Raises:
      TypeError: `layer` is no layer, or `where` is not of pieces.
      ValueError: the layer cannot be cut so, or a device is unknown.
    """
    if not isinstance(layer, keras.Layer):
        raise TypeError(
            f"`layer` must be a keras.Layer; got {type(layer).__name__}."
        )
    if not isinstance(where, Pieces):
        raise TypeError(
            "`where` must be towers.column_wise([...]) or "
            f"towers.row_wise([...]); got {where!r}."
        )
    devices = available(None)
    where = where.resolved(
        "where", lambda argument, d: resolve(d, argument, devices)
    )
    if not isinstance(layer, CUTTABLE):
        raise _refused(layer, where, f"is a {type(layer).__name__}")
    _check(layer, where)
    if layer.built:
        for weight in weights_of(layer, where.by):
            if not is_cut(weight, len(where)):
                replace(weight, _reached(where), ())
        whole.spoken_of(layer)
    elif isinstance(layer, keras.layers.MultiHeadAttention):
        raise _refused(
            layer, where, "is not built: build it, or leave it to a placement"
        )
    else:
        keras_cut.set_build(layer, functools.partial(_built, layer, where))
    return layer


def _check(layer: Any, where: Pieces) -> None:
    for why in objections(layer, where):
        raise _refused(layer, where, why)


def _refused(layer: Any, where: Pieces, why: str) -> ValueError:
    return refusal(layer.name, where, why, "split_layer is asked")


def _reached(where: Pieces) -> list[str]:
    return [d if is_reached(d) else HOST_HERE for d in where.devices]


def _built(
    layer: Any, where: Pieces, build: Any, *args: Any, **kwargs: Any
) -> None:
    """Builds a layer whose weights are made in pieces."""
    add = layer.add_weight
    instead = functools.partial(_added, layer, where, add)
    with patched((layer, "add_weight", instead)):
        build(*args, **kwargs)
    _check(layer, where)
    whole.spoken_of(layer)


def _added(
    layer: Any, where: Pieces, add: Any, *args: Any, **kwargs: Any
) -> Any:
    """A weight of a layer, in pieces if it is one that is cut."""
    name = kwargs.get("name")
    rule = rule_of(layer, where.by)
    if rule is None:
        raise _refused(layer, where, "has no axis that is cut so")
    axes = {keras_cut.weight_name(rule.kernel): rule.kernel_axis}
    if rule.bias_axis is not None:
        axes[keras_cut.BIAS] = rule.bias_axis
    shape = kwargs.get("shape")
    if name not in axes or shape is None:
        return add(*args, **kwargs)
    axis, rest = axes[name], {**kwargs}
    sizes = sizes_of(shape[axis], len(where))
    if not all(sizes):
        why = f"has {shape[axis]} along axis {axis} of its {name}"
        raise _refused(layer, where, f"{why}, fewer than {len(where)} pieces")
    begin = starts(rest.pop("initializer", None), shape, sizes, axis)
    pieces = []
    for size, device, start in zip(sizes, _reached(where), begin):
        own = tuple(size if i == axis else n for i, n in enumerate(shape))
        with tf.device(device):
            pieces.append(add(**{**rest, "shape": own, "initializer": start}))
    path = pieces[0].path
    for j, piece in enumerate(pieces):
        set_path(piece, f"{path}_{j}")
    return Joined(pieces, axis, name, path)
