"""tf_slices: variables that `tf.train.Checkpoint` saves and restores as one.

TensorFlow's checkpoints know slices of a tensor: what is saved in some is restored in
others, or whole. An object says so by `_gather_saveables_for_checkpoint`, and what it
holds by `_trackable_children`; `SaveableObject` has no public name.
`tf_slices_test.py` fails when one of them changes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.training.saving.saveable_object import (
    SaveableObject,
    SaveSpec,
)


class Sliced(tf.__internal__.tracking.Trackable):
    """What is saved as one tensor, each piece from where it lives.

    Args:
      pieces: variables, which differ along one axis only.
      axis: that.

    Attributes:
      sizes: of the pieces, along the axis.
      shape: of the whole.
    """

    def __init__(self, pieces: Sequence[Any], axis: int):
        self.pieces, self.axis = list(pieces), axis
        self.sizes = tuple(piece.shape[axis] for piece in self.pieces)
        shape = list(self.pieces[0].shape)
        shape[axis] = sum(self.sizes)
        self.shape = tuple(shape)

    def _gather_saveables_for_checkpoint(self) -> dict[str, Callable[..., Any]]:
        return {"VARIABLE_VALUE": lambda name: _Slices(self, name)}


# A method of all that TensorFlow saves, see `saved_children`.
CHILDREN = "_trackable_children"


def saved_children(
    holder: Any, save_type: str = "checkpoint", **kwargs: Any
) -> dict[str, Any]:
    """What TensorFlow saves of who holds what is sliced.

    In a SavedModel, whose functions read the pieces, these by themselves.
    """
    kind = type(holder)
    parts = kind._trackable_children(holder, save_type, **kwargs)
    saved: dict[str, Any] = {}
    for name, child in parts.items():
        if isinstance(child, Sliced) and save_type != "checkpoint":
            own = child.pieces
            saved.update((f"{name}_{j}", piece) for j, piece in enumerate(own))
        else:
            saved[name] = child
    return saved


class _Slices(SaveableObject):
    """Reads and writes the pieces; `name` is the tensor's in the file."""

    def __init__(self, whole: Sliced, name: str):
        self._variables = [piece.value for piece in whole.pieces]
        specs = [
            SaveSpec(v.read_value, piece, name, v.dtype, v.device)
            for v, piece in zip(self._variables, _slices_of(whole))
        ]
        super().__init__(whole, specs, name)

    def restore(self, restored_tensors: Any, restored_shapes: Any) -> Any:
        pairs = zip(self._variables, restored_tensors)
        return tf.group(*[v.assign(value) for v, value in pairs])


def _slices_of(whole: Sliced) -> Iterator[str]:
    """Each piece as TensorFlow names a slice: all sizes, and where it begins."""
    begin, sizes = 0, " ".join(map(str, whole.shape))
    for size in whole.sizes:
        own = [f"0,{n}" for n in whole.shape]
        own[whole.axis] = f"{begin},{size}"
        yield f"{sizes} {':'.join(own)}"
        begin += size
