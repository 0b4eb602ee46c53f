"""losses: what layers add as losses, from the towers' shards to the batch."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from towers.keras_model.merge_rules import (
    AVERAGED,
    FINITE,
    SHARES,
    STATE_RULES,
    SUMMED,
    UNKNOWN,
    first_warning,
)
from towers.verbs.gather import gathered, pooled
from towers.verbs.relays import units_of
from towers.verbs.rows import Rows, drop

# What `gather` does by another name, or by its own.
_GATHERED = {
    "same": "mean",
    SUMMED: "sum",
    AVERAGED: "mean",
    **{rule: rule for rule in ("concat", "mean", "none", "sum")},
}


def gathered_losses(
    layers: Sequence[Any],
    replays: Sequence[dict[str, Any]],
    gather: Callable[[Any, Any], Any],
    device: str,
    rows: Rows,
) -> tuple[list[tf.Tensor], list[Any]]:
    """What layers added as losses, and which layers those are.

    Args:
      layers: the model's, in which a loss has the place of the one that adds it.
      replays: what each tower computed.
      gather: merges a nest per tower by `gather_outputs`' rules.
      device: the output device.
      rows: how many each tower has.
    """
    each = [replay["losses"] for replay in replays]
    if len({len(losses) for losses in each}) > 1:
        raise ValueError(
            "Towers add different numbers of losses: "
            f"{[len(losses) for losses in each]}. Expected `add_loss` and "
            "activity regularizers to be the same in all, and not inside a "
            "function of all_towers; let that return its loss instead."
        )
    keys = [key for loss in each[0] for key in loss]
    columns = [
        [x for loss in losses for x in loss.values()] for losses in zip(*each)
    ]
    adders = [layers[i] for _, i in keys]
    _warn([x for x, (rule, _) in zip(adders, keys) if rule == UNKNOWN])
    easy = [k for k, (rule, _) in enumerate(keys) if rule in _GATHERED]
    merged: dict[int, Any] = {}
    if easy:
        towers = [[columns[k][t] for k in easy] for t in range(len(each))]
        rules = [_GATHERED[keys[k][0]] for k in easy]
        merged.update(zip(easy, gather(towers, rules)))
    for k in set(range(len(keys))) - set(easy):
        rule, column = keys[k][0], columns[k]
        if rule in _CHOSEN:
            one_of = functools.partial(_one_of, _CHOSEN[rule])
            (merged[k],) = pooled(one_of, [column], rows, device)
        elif rule in (UNKNOWN, FINITE):
            merged[k] = _finite_by_machine(column, rows, device)
        else:
            merged[k] = gathered(_MERGES[rule], column, rows, device)
    alone = {k for k in easy if keys[k][0] == "none"}
    totals = [merged[k][0] if k in alone else merged[k] for k in sorted(merged)]
    return totals, adders


def _by_share(column: Sequence[tf.Tensor], rows: Rows) -> tf.Tensor:
    """What is there for each row, divided by the rows of the batch."""
    shares = rows.shares(column[0].dtype)
    each = [shares[i] * x for i, x in enumerate(column)]
    return rows.concat(each)


def _mean_of_finite(column: Sequence[tf.Tensor], rows: Rows) -> tf.Tensor:
    total, share = _added_up(column, rows, range(len(column)))
    return total / share


def _added_up(
    column: Sequence[tf.Tensor], rows: Rows, towers: Sequence[int]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Some towers' finite losses, added up by shares; and those shares."""
    shares = rows.shares(column[0].dtype)
    counts = [
        tf.math.is_finite(x) & (rows.counts[i] > 0)
        for i, x in zip(towers, column)
    ]
    kept = [drop(shares[i], count) for i, count in zip(towers, counts)]
    each = [a * drop(x, count) for a, x, count in zip(kept, column, counts)]
    return tf.add_n(each), tf.add_n(kept)


def _finite_by_machine(
    column: Sequence[tf.Tensor], rows: Rows, device: str
) -> tf.Tensor:
    """As `_mean_of_finite`; what a machine's towers say is added up there."""
    units = units_of([x.device for x in column], device)
    if len(units) == len(column):
        return gathered(_mean_of_finite, column, rows, device)

    def added(unit: Sequence[int]) -> tf.Tensor:
        return gathered(
            lambda some, rows: tf.stack(_added_up(some, rows, unit)),
            [column[i] for i in unit],
            rows,
            column[unit[0]].device if len(unit) > 1 else device,
        )

    def divided(sums: Sequence[tf.Tensor], _: None) -> tf.Tensor:
        total, share = tf.unstack(tf.add_n(sums))
        return total / share

    return gathered(divided, [added(unit) for unit in units], None, device)


def _one_of(
    either: Callable[..., Any], columns: Sequence[Any], rows: Rows
) -> list[tf.Tensor]:
    return [rows.chosen(either, column) for column in columns]


_MERGES: dict[str, Callable[..., tf.Tensor]] = {
    SHARES: _by_share,
    "last": lambda column, rows: rows.last(column),
}
# Those of which machines may make one first.
_CHOSEN: dict[str, Callable[..., tf.Tensor]] = {
    "max": tf.maximum,
    "min": tf.minimum,
}


def _warn(layers: Sequence[Any]) -> None:
    """Tells once of layers whose losses merge by a rule that none has chosen."""
    names = [x.name for x in layers if first_warning(x)]
    if names:
        warnings.warn(
            f"A loss that is added by {', '.join(map(repr, names))} is not "
            "known to be a sum or a mean over rows, so what towers say of their "
            "shards does not add up to that of the batch. It is now their mean, "
            "weighted by rows. Compute it of the whole batch, by "
            "towers.all_towers in a layer with `needs_all_towers = True`; or say "
            "what is meant by "
            "towers.merge_losses_by(layer, rule), where the layer is made, with "
            f"one of {', '.join(map(repr, STATE_RULES))}. Sums and means "
            "that are added up are known apart: add each by itself.",
            UserWarning,
            stacklevel=2,
        )
