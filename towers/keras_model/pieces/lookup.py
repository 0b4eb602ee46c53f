"""lookup: rows of a table in pieces, looked up where these live."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from towers.engine.host import device_here, on_host
from towers.foreign import keras_cut
from towers.keras_model.brought import brought
from towers.keras_model.notes import Notes
from towers.keras_model.pieces import assembled
from towers.keras_model.pieces.piece_scopes import on_piece
from towers.placement.pieces import ROW_WISE, Pieces


def looked_up(
    layer: Any, pin: Pieces, notes: Notes, ids: tf.Tensor
) -> tf.Tensor:
    """What `Embedding.call` returns, of rows that are looked up where they are.

    Args:
      layer: an `Embedding`, whose table is in pieces, of rows or of its width.
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
                return rows_of(layer, table.pieces[j], brought(some), notes)

        return rows

    lookups = [of_piece(j) for j in range(len(pin))]
    if pin.by == ROW_WISE:
        return by_owner(ids, table.sizes, lookups)
    return assembled.side_by_side([f(ids) for f in lookups], -1, table.sizes)


def rows_of(layer: Any, piece: Any, ids: tf.Tensor, notes: Notes) -> tf.Tensor:
    """Rows of a piece of a table, on the device that is open, which is its own.

    Args:
      layer: an `Embedding`.
      piece: a Keras variable of its.
      ids: whole numbers of any shape, from the piece's first row on.
      notes: of the tower.
    """
    tables = notes.stateless.tables
    rows = None if tables is None else tables.rows(piece, ids, notes)
    rows = tf.gather(piece.value, ids) if rows is None else rows
    return tf.cast(rows, layer.compute_dtype)


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
        ids_by_owner = tf.dynamic_partition(local, owner, k)
        places = tf.dynamic_partition(tf.range(tf.size(flat)), owner, k)
        shape = tf.shape(ids)
    parts = [lookup(some) for lookup, some in zip(lookups, ids_by_owner)]
    width = parts[0].shape[-1]
    rows = tf.dynamic_stitch(places, parts)
    rows = tf.reshape(rows, tf.concat([shape, [width]], 0))
    return tf.ensure_shape(rows, [*ids.shape, width])
