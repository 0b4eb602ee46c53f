"""attached: what Keras attaches to a tensor, its mask and its logits.

They have no public names: `_keras_mask` and `_keras_logits`.
`attached_test.py` fails when that changes.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def get_mask(tensor: Any) -> tf.Tensor | None:
    """The Keras mask that a layer attached to its output."""
    return getattr(tensor, "_keras_mask", None)


def get_notes(outputs: Any) -> list[dict[str, tf.Tensor | None]]:
    """What Keras attached to each flat output: its mask and its logits.

    Losses on probabilities take the logits, if those are known, because
    probabilities underflow.
    """

    def logits(output: Any) -> tf.Tensor | None:
        if activation(output):
            return output.op.inputs[0]
        return getattr(output, "_keras_logits", None)

    return [
        {"mask": get_mask(x), "logits": logits(x)}
        for x in tf.nest.flatten(outputs)
    ]


def set_notes(outputs: Any, notes: Sequence[dict[str, Any]]) -> None:
    """Attaches to flat outputs what `get_notes` says of others."""
    for output, note in zip(tf.nest.flatten(outputs), notes):
        for name, value in note.items():
            if value is not None:
                setattr(output, f"_keras_{name}", value)


def activation(output: Any) -> str | None:
    """ "Softmax" or "Sigmoid", if the op that made a tensor is that."""
    if not isinstance(output, tf.Tensor) or hasattr(output, "numpy"):
        return None  # eager tensors do not know where they come from
    kind = output.op.type
    return kind if kind in ("Softmax", "Sigmoid") else None
