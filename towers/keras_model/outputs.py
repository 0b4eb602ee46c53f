"""outputs: gathered outputs, with what Keras attaches to them."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign import keras_layers
from towers.keras_model import batchless, layer_graph
from towers.keras_model.request import Request
from towers.placement.placement import Placement
from towers.verbs.gather import check_structures, spread

ACTIVATIONS = {"Softmax": tf.nn.softmax, "Sigmoid": tf.nn.sigmoid}


def check_outputs(
    graph: layer_graph.LayerGraph,
    inputs: Any,
    divided: Sequence[bool],
    replays: list[Any],
    request: Request,
) -> None:
    """Raises unless outputs are of one structure, and can be joined.

    Args:
      graph: the model.
      inputs: the nest that it is called with.
      divided: for each leaf of that whether it is split.
      replays: what each tower computed.
      request: what is asked for.
    """
    each = [replay["outputs"] for replay in replays]
    check_structures(each)
    if request.users_fn is not None:
        return
    unordered = {i for replay in replays for i in replay["unordered"]}
    if unordered or not (all(divided) and all(map(_are_open, each))):
        rules = spread(request.merge, each[0])
        batchless.check_joined(
            graph, inputs, divided, request, each, rules, unordered
        )


def _are_open(outputs: Any) -> bool:
    """Whether no output of a tower knows its number of rows, as shards do not."""
    return all(
        x is None or not x.shape.rank or x.shape[0] is None
        for x in tf.nest.flatten(outputs)
    )


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
