"""attributes: tensors that layers keep in attributes while a tower calls them.

Python objects are one for all towers, so such a tensor is put away when its
tower waits or is done: the next finds the layer as it was. Afterwards it would be
one tower's where the batch's is meant. What is found in its place says so.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.engine.all_towers import waiting
from towers.foreign.containers import leaves
from towers.foreign.keras_layers import ADDED
from towers.foreign.patches import patched
from towers.foreign.tf_random import nothing_drawn

_MISSING = object()  # the value of no attribute


class OneTowers:
    """In the place of a tensor of one tower: whoever uses it is told."""

    _what = ""
    before: Any = None

    def __init__(self, layer: keras.Layer, name: str, before: Any):
        self._what = f"{type(layer).__name__} {layer.name!r} in `{name}`"
        self.before = before  # in the attribute, when no tower was there

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(self._words())

    def _words(self) -> str:
        return (
            f"What the layer {self._what} keeps of its call was computed in a "
            "tower, from that tower's rows, and is not there outside of it. "
            "Expected the model to return it, as one more output."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(self._words())

    def __repr__(self) -> str:
        return f"<of one tower: {self._what}>"


for _name in (
    *"tf_tensor array add radd sub rsub mul rmul truediv rtruediv".split(),
    *"matmul rmatmul pow rpow neg abs lt le gt ge".split(),
    *"getitem iter len bool float int call".split(),
):
    setattr(OneTowers, f"__{_name}__", OneTowers._refuse)


class _Kept:
    """What layers keep of one tower, from where its call began."""

    def __init__(self, layers: Sequence[keras.Layer]):
        self._layers = layers
        for layer in layers:
            for name, value in list(vars(layer).items()):
                if isinstance(value, OneTowers):
                    _set_attribute(layer, name, value.before)
        self._before = [dict(vars(layer)) for layer in layers]

    def tensors(self) -> Iterator[tuple[keras.Layer, str, Any, Any]]:
        """Layer, name, tensors and what was there before."""
        for layer, before in zip(self._layers, self._before):
            for name, value in list(vars(layer).items()):
                old = before.get(name, _MISSING)
                if value is not old and _has_tensors(value):
                    yield layer, name, value, old

    @contextlib.contextmanager
    def put_away(self) -> Iterator[None]:
        """While open, layers are as they were without this tower."""
        mine = list(self.tensors())
        for layer, name, _, before in mine:
            _set_attribute(layer, name, before)
        # Keras forgets what was added when a call begins, be it another tower's.
        with patched(*[(layer, ADDED, set()) for layer in self._layers]):
            yield
        for layer, name, value, _ in mine:
            _set_attribute(layer, name, value)


def _has_tensors(value: Any) -> bool:
    return any(
        isinstance(x, tf.RaggedTensor | tf.SparseTensor)
        or (tf.is_tensor(x) and tf.is_symbolic_tensor(x))
        for x in leaves(value)
    )


def _set_attribute(layer: keras.Layer, name: str, value: Any) -> None:
    """Sets what Keras need not know of."""
    if value is _MISSING:
        del vars(layer)[name]
    else:
        vars(layer)[name] = value


@contextlib.contextmanager
def kept_by(layers: Sequence[keras.Layer]) -> Iterator[None]:
    """While open, layers keep tensors of one tower, and none afterwards."""
    kept = _Kept(layers)
    try:
        with waiting(kept.put_away):
            yield
    finally:
        for layer, name, _, before in list(kept.tensors()):
            _set_attribute(layer, name, OneTowers(layer, name, before))


@contextlib.contextmanager
def as_before(layers: Sequence[keras.Layer]) -> Iterator[None]:
    """Takes back what layers note in attributes of their own meanwhile.

    And what is drawn from the generators of Python and NumPy.
    """
    before = [dict(vars(layer)) for layer in layers]
    try:
        with nothing_drawn():
            yield
    finally:
        for layer, attributes in zip(layers, before):
            for name in set(vars(layer)) - set(attributes):
                object.__delattr__(layer, name)
            for name, value in attributes.items():
                if vars(layer).get(name) is not value:
                    object.__setattr__(layer, name, value)
