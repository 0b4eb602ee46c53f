"""piece_scopes: where the ops of a piece are, and how they are named."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf

from towers.keras_model.notes import Notes
from towers.placement.pieces import Pieces


@contextlib.contextmanager
def on_piece(pin: Pieces, j: int, notes: Notes) -> Iterator[None]:
    """While open, ops are those of a piece: in its scope, on its device."""
    scopes, outer = notes.scopes, notes.device
    scopes.append(f"{scopes[-1]}piece_{j}/")
    notes.device = pin.devices[j]
    try:
        with tf.name_scope(scopes[-1]), tf.device(notes.device):
            yield
    finally:
        notes.device = outer
        scopes.pop()
