"""loss_on_towers: a step whose loss is computed where the outputs are."""

from typing import Any

import keras
import tensorflow as tf

from towers.builder import build
from towers.engine.calls import How
from towers.foreign.keras_compile import Compiled
from towers.keras_model import checks
from towers.keras_model.request import Request
from towers.keras_model.whole_call import WholeCall
from towers.verbs.arrivals import are_read_there
from towers.verbs.batch import checked_batch, whole_paths
from towers.verbs.parcels import in_parcels, out_of_parcels
from towers.wrapper import loss_parts


def loss_on_towers(model: Any, data: Any, training: bool | None) -> tf.Tensor:
    """The loss of a batch, put together from what the towers say.

    Updates metrics, and the state of layers, as Keras's own step does.

    Args:
      model: a compiled `TowerModel`, whose template is built.
      data: a batch as `fit` has it: inputs, targets and sample weights.
      training: the phase.

    Raises:
      ValueError: a loss or a metric cannot be put together from shards, or
        there is no loss.
    """
    x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
    checks.check_given(model.template, x)
    x = checked_batch(x, whole=model.whole).nest
    outputs = _built_losses(model, x, y, weights)
    compiled = Compiled.of(model)
    losses = len(compiled.flat_losses)
    where = model.placement
    # Beside a tower the count, and the gradient that waits for it, would come late.
    # What towers have read is not here to be counted.
    counted = (
        where.output_device not in where.devices
        and not are_read_there()
        and loss_parts.are_counted_by_targets(model, outputs)
    )
    state = compiled.metrics.variables if compiled.metrics is not None else []

    def on_tower(template: Any, shard: Any) -> Any:
        x, y, weights = shard
        y_pred = template(x, training=training)
        loss_parts.check_as_told(y_pred, outputs)
        sums, divisors = [], None
        if losses:
            numerators, divisors = loss_parts.parts(
                model, y, y_pred, weights, counted
            )
            sums.append(numerators)
        if state:
            sums += loss_parts.metric_sums(compiled.metrics, y, y_pred, weights)
        return in_parcels(sums), divisors

    request = Request(
        *(where, training, "sum", on_tower),
        how=How.COMPILED if model.jit_towers else How.BUILT,
        synchronized=model.synchronized,
    )
    batch = checked_batch((x, y, weights), whole=whole_of_data(model))
    with WholeCall(model.template, x, training).refused_as_given():
        graph = build(model.template, batch, request)
    graph.apply_updates()
    parcels, divisors = graph.outputs
    shapes = [tf.TensorShape([losses])] * bool(losses)
    sums = out_of_parcels(parcels, [*shapes, *[v.shape for v in state]])
    for variable, added in zip(state, sums[bool(losses) :]):
        variable.assign_add(added)
    terms = [tf.reduce_sum(loss) for loss in graph.losses]
    rows = tf.reduce_sum(graph.rows)
    if losses:
        like = tf.nest.map_structure(
            lambda x: tf.zeros([rows, *x.shape[1:]] if counted else [rows]),
            outputs,
        )
        parts = sums[0], divisors
        terms.append(loss_parts.merged_loss(model, parts, y, like, weights))
    if not terms:
        raise ValueError(
            "There is no loss to compute. Expected a `loss` in compile(), "
            "or a layer that calls `add_loss`."
        )
    total = tf.add_n(terms)
    compiled.tracker.update_state(total, sample_weight=rows)
    return total


def whole_of_data(model: Any) -> list[tuple[Any, ...]]:
    """The model's `whole` inputs, by their paths in (x, y, weights)."""
    return [(0, *path) for path in whole_paths(model.whole)]


def _built_losses(model: Any, x: Any, y: Any, weights: Any) -> Any:
    """Builds losses and metrics, outside of towers; a nest like outputs."""
    outputs = checks.output_spec(model.template, x)
    Compiled.of(model).build(y, outputs, weights)
    loss_parts.check_mergeable(model)
    return outputs
