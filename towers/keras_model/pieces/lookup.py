"""lookup: rows of a table whose rows are in pieces, by the piece that has each."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from towers.engine.host import device_here, on_host
from towers.foreign import keras_cut
from towers.keras_model.brought import brought
from towers.keras_model.notes import Notes
from towers.keras_model.pieces.scopes import on_piece
from towers.placement.pieces import Pieces


def looked_up(
    layer: Any, pin: Pieces, notes: Notes, ids: tf.Tensor
) -> tf.Tensor:
    """What `Embedding.call` returns, of rows that are looked up where they are.

    Args:
      layer: an `Embedding`, whose table is in pieces of rows.
      pin: where they are for this tower.
      notes: of the tower.
      ids: whole numbers of any shape.
    """
    table = vars(layer)[keras_cut.EMBEDDINGS]
    if ids.dtype not in (tf.int32, tf.int64):
        ids = tf.cast(ids, tf.int32)
    # As `keras.ops.take` counts from the end.
    ids = tf.where(ids < 0, ids + tf.cast(table.shape[0], ids.dtype), ids)

    def of_piece(j: int) -> Callable[[tf.Tensor], tf.Tensor]:
        def rows(some: tf.Tensor) -> tf.Tensor:
            with on_piece(pin, j, notes):
                return rows_of(table.pieces[j], brought(some))

        return rows

    rows = by_owner(ids, table.sizes, [*map(of_piece, range(len(pin)))])
    return tf.cast(rows, layer.compute_dtype)


def rows_of(piece: Any, ids: tf.Tensor) -> tf.Tensor:
    """Rows of a piece of a table, on the device that is open, which is its own.

    Args:
      piece: a Keras variable.
      ids: whole numbers [n], from its first row on.
    """
    return tf.gather(piece.value, ids)


def by_owner(
    ids: tf.Tensor,
    sizes: Sequence[int],
    lookups: Sequence[Callable[[tf.Tensor], tf.Tensor]],
) -> tf.Tensor:
    """Rows of a table in pieces: only a piece's ids, and its rows, cross.

    An id that is too large is looked up in the last piece, which says so.

    Args:
      ids: whole numbers of any shape.
      sizes: how many rows each piece has.
      lookups: of each piece, from ids [n] counted from its first, to rows
        [n, width].

    Returns:
      A tensor [*ids.shape, width].
    """
    firsts = [0, *itertools.accumulate(sizes[:-1])]
    with on_host(device_here()):  # where GPUs have no kernels for it
        flat = tf.reshape(ids, [-1])
        owner = tf.zeros_like(flat, tf.int32)
        for first in firsts[1:]:
            owner += tf.cast(flat >= tf.cast(first, flat.dtype), tf.int32)
        local = flat - tf.gather(tf.constant(firsts, flat.dtype), owner)
        k = len(lookups)
        asked = tf.dynamic_partition(local, owner, k)
        places = tf.dynamic_partition(tf.range(tf.size(flat)), owner, k)
        shape = tf.shape(ids)
    found = [lookup(some) for lookup, some in zip(lookups, asked)]
    width = found[0].shape[-1]
    rows = tf.dynamic_stitch(places, found)
    rows = tf.reshape(rows, tf.concat([shape, [width]], 0))
    return tf.ensure_shape(rows, [*ids.shape, width])
