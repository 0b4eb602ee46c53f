"""join: what all towers say, computed on together, and handed out."""

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.engine import meeting
from towers.engine.host import on_host
from towers.engine.lockstep import Join
from towers.placement.placement import Placement
from towers.verbs.relays import Relays, replicate_between
from towers.verbs.rows import Rows
from towers.verbs.scatter import scatter
from towers.verbs.split import Shards


def joining(shards: Shards, placement: Placement) -> Join:
    """Answers calls of `all_towers`: join, compute once, hand out."""
    device, rows = str(placement.output_device), shards.rows
    relays = Relays()

    def join(calls: Sequence[meeting.Call]) -> list[Any]:
        kept = functools.cache(rows.kept)
        kept(device)
        first = calls[0]
        if not first.pure and False in rows.may_be_empty:
            # The parameters of a tower without rows get no gradient.
            first = calls[rows.may_be_empty.index(False)]
        with tf.device(device), tf.name_scope("all_towers") as scope:
            parts = [tf.nest.flatten(call.values) for call in calls]
            joined = [rows.concat(column) for column in zip(*parts)]
            values = tf.nest.pack_sequence_as(first.values, joined)
            here = joined[0].device if joined else device  # in full
            results = first.run(values, here, scope)
            columns = [
                scatter(_of_all_rows(x, rows, device), shards.ranges, device)
                if first.split
                else replicate_between(
                    x, device, placement.devices, relays, kept
                )
                for x in tf.nest.flatten(results)
            ]
        return [
            tf.nest.pack_sequence_as(results, list(leaves))
            for leaves in zip(*columns)
        ]

    return join


def _of_all_rows(result: tf.Tensor, rows: Rows, device: str) -> tf.Tensor:
    """A result that can be dealt out, as it has the rows of the batch."""
    problem = (
        "With split=True, all_towers deals out results of one row for each of "
        f"the batch's; got shape {result.shape}. Expected [all rows, ...]; or "
        "leave out split=True, and each tower gets the whole."
    )
    if not result.shape.rank:
        raise ValueError(problem)
    count = tf.shape(result)[0]
    with on_host(device):
        check = tf.debugging.assert_equal(
            count, tf.reduce_sum(rows.counts), message=problem
        )
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(result)
