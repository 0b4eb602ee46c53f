"""joined: what stands for a variable that is in pieces."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from towers.foreign.keras_layers import all_layers
from towers.foreign.tf_slices import Sliced


class Joined(Sliced):
    """Stands for a variable of a layer that is in pieces.

    Who reads it gets them side by side, and what is assigned is dealt out.

    Args:
      pieces: Keras variables that differ along one axis only.
      axis: that, from 0.
      name, path: of the variable that it stands for.
    """

    def __init__(self, pieces: Sequence[Any], axis: int, name: str, path: str):
        super().__init__(pieces, axis)
        self.name, self.path = name, path

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.pieces[0].dtype

    @property
    def regularizer(self) -> Any:
        return self.pieces[0].regularizer

    @property
    def constraint(self) -> Any:
        return self.pieces[0].constraint

    @property
    def trainable(self) -> bool:
        return self.pieces[0].trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        for piece in self.pieces:
            piece.trainable = value

    @property
    def value(self) -> tf.Tensor:
        """All of it, on the device that is open."""
        each = [tf.convert_to_tensor(piece) for piece in self.pieces]
        return tf.concat(each, self.axis)

    def assign(self, value: Any) -> None:
        """Gives each piece its part, of an array or what is indexed like one.

        Raises:
          ValueError: its shape is another.
        """
        if tuple(value.shape) != self.shape:
            raise ValueError(
                f"{self.path!r} has the shape {self.shape}; got a value of "
                f"shape {tuple(value.shape)}."
            )
        for piece, part in zip(self.pieces, slices_of(value, self)):
            piece.assign(part)

    def numpy(self) -> np.ndarray:
        return np.concatenate([p.numpy() for p in self.pieces], self.axis)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self.numpy(), dtype)

    def __tf_tensor__(self, dtype: Any = None, name: Any = None) -> tf.Tensor:
        value = self.value
        return value if dtype is None else tf.cast(value, dtype)

    def __getitem__(self, index: Any) -> tf.Tensor:
        return self.value[index]

    def __repr__(self) -> str:
        return f"<{self.path} of {self.shape} in pieces of {self.sizes}>"


def _by_value(name: str) -> Callable[..., Any]:
    """An operator of a tensor's, of all of it."""

    def operator(self: Joined, *others: Any) -> Any:
        return getattr(self.value, name)(*others)

    return operator


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow"):
    for _side in ("", "r"):
        _operator = f"__{_side}{_name}__"
        setattr(Joined, _operator, _by_value(_operator))


def slices_of(value: Any, joined: Joined) -> Iterable[Any]:
    """What of a whole value is each piece's."""
    before = (slice(None),) * joined.axis
    ends = itertools.accumulate(joined.sizes)
    for size, end in zip(joined.sizes, ends):
        yield value[(*before, slice(end - size, end))]


def joined_of(layer: Any) -> list[Joined]:
    """What of a layer's own variables is in pieces."""
    return [x for x in vars(layer).values() if isinstance(x, Joined)]


def all_joined(model: Any) -> list[Joined]:
    """What is in pieces of a model's layers, or of a nest of models."""
    return [x for layer in all_layers(model) for x in joined_of(layer)]
