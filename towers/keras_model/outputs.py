"""outputs: gathered outputs, with what Keras attaches to them."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from towers.foreign import keras_layers
from towers.placement.placement import Placement
from towers.verbs.gather import spread

ACTIVATIONS = {"Softmax": tf.nn.softmax, "Sigmoid": tf.nn.sigmoid}


def gathered_outputs(
    replays: list[dict[str, Any]],
    merge: Any,
    gather: Callable[..., Any],
    placement: Placement,
) -> Any:
    """Gathered outputs, with what Keras attaches to them.

    Where a model ends in a softmax or sigmoid, its logits are gathered and the
    last op is done again: Keras computes such a loss from logits, since
    probabilities underflow, and no more bytes cross.
    """
    rules = spread(merge, replays[0]["outputs"])
    joined = [rule == "concat" for rule in rules]
    again = [
        next(iter(names), None) if j else None
        for names, j in zip(replays[0]["activations"], joined)
    ]
    each = [
        [
            note["logits"] if a else output
            for output, note, a in zip(
                tf.nest.flatten(replay["outputs"]), replay["notes"], again
            )
        ]
        for replay in replays
    ]
    notes = [
        [
            {
                "mask": note["mask"] if j else None,
                "logits": note["logits"] if j and not a else None,
            }
            for note, j, a in zip(replay["notes"], joined, again)
        ]
        for replay in replays
    ]
    flat, merged = gather(each, rules), gather(notes, "concat", "note")
    with tf.device(placement.output_device):
        for i, activation in enumerate(again):
            if activation is not None:
                merged[i]["logits"] = flat[i]
                flat[i] = ACTIVATIONS[activation](flat[i])
    outputs = tf.nest.pack_sequence_as(replays[0]["outputs"], flat)
    keras_layers.set_notes(outputs, merged)
    return outputs
