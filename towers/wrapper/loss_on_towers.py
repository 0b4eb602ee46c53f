"""loss_on_towers: a step whose loss is computed where the outputs are."""

from typing import Any

import keras
import tensorflow as tf

from towers.build import build_towers
from towers.foreign.keras_compile import Compiled
from towers.keras_model import checks
from towers.verbs.batch import checked_batch, whole_paths
from towers.wrapper import loss_parts


def loss_on_towers(model: Any, data: Any, training: bool) -> tf.Tensor:
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
    structure = _built_losses(model, x, y, weights)
    metrics = Compiled.of(model).metrics
    models = {"template": model.template}
    if metrics is not None:
        models["metrics"] = metrics

    def on_tower(models: Any, shard: Any) -> Any:
        x, y, weights = shard
        y_pred = models["template"](x, training=training)
        if metrics is not None:
            loss_parts.update_metrics(metrics, y, y_pred, weights)
        if Compiled.of(model).loss is None:
            return None
        return loss_parts.parts(model, y, y_pred, weights)

    graph = build_towers(
        models,
        (x, y, weights),
        model.placement,
        training,
        merge="sum",
        tower_fn=on_tower,
        whole=whole_of_data(model),
        jit_compile=model.jit_towers,
    )
    graph.apply_updates()
    terms = [tf.reduce_sum(loss) for loss in graph.losses]
    rows = tf.reduce_sum(graph.rows)
    if graph.outputs is not None:
        like = tf.nest.map_structure(lambda _: tf.zeros([rows]), structure)
        terms.append(loss_parts.merged(model, graph.outputs, y, like))
    if not terms:
        raise ValueError(
            "There is no loss to compute. Expected a `loss` in compile(), "
            "or a layer that calls `add_loss`."
        )
    total = tf.add_n(terms)
    Compiled.of(model).tracker.update_state(total, sample_weight=rows)
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
