"""suspects: the layer whose outputs are the first to differ in towers, and why."""

import dataclasses
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from towers.builder import build_towers
from towers.engine.graphs import as_function, as_graphs
from towers.foreign import keras_layers
from towers.keras_model.pins import layer_paths
from towers.planning.compared_steps import ComparedSteps
from towers.planning.figures import Results, figure_of
from towers.verbs.split import split_batch


def first_suspect(steps: ComparedSteps, training: bool) -> tuple[str, str]:
    """The layer that differs first, by path, and what is likely behind it.

    Args:
      steps: of the model that is compared.
      training: the phase in which it does.

    Returns:
      Two empty strings where no layer's outputs differ.
    """
    layers = {
        path: layer
        for path, layer in layer_paths([steps.model])
        if not isinstance(layer, keras.layers.InputLayer)
    }
    paths = [*layers]
    whole = dataclasses.replace(
        steps.placement,
        devices=steps.placement.devices[:1],
        weights=None,
        layer_devices={},
    )
    plain, order = _outputs(steps, whole, paths, training, [steps.x])
    with steps.moved(2) as x:
        moved, _ = _outputs(steps, whole, paths, training, [x])
    towered, _ = _outputs(steps, steps.placement, paths, training, [steps.x])
    own = [plain, towered, moved]
    for path in order:
        one, other, noisy = ({path: each.get(path)} for each in own)
        result = figure_of("", one, other, [noisy], steps.rounding)
        if not result.equal:
            shards = split_batch(
                steps.x, steps.placement, steps.options.get("whole", ())
            )
            try:
                parts, _ = _outputs(steps, whole, [path], training, shards)
            except (ValueError, tf.errors.OpError):  # not of so few rows
                parts = {}
            alone = figure_of("", one, parts, [noisy], steps.rounding)
            layer = layers[path]
            return path, _reason(path, layer, training, alone.equal)
    return "", ""


def _outputs(
    steps: ComparedSteps,
    placement: Any,
    paths: Any,
    training: bool,
    batches: Any,
) -> tuple[Results, list[str]]:
    """By path the outputs of layers in towers, of all rows, in order of calls.

    Args:
      steps: of the model that is compared.
      placement: of its towers.
      paths: those of layers.
      training: the phase.
      batches: inputs, each with rows that come after those of the one before.
    """
    order: list[str] = []

    def run(x: Any) -> Any:
        graph = build_towers(
            *(steps.model, x, placement, training),
            layer_outputs=paths,
            **steps.options,
        )
        order[:] = graph.towers[0].layer_outputs
        each = [
            {
                path: [
                    y
                    for y in tf.nest.flatten(tower.layer_outputs[path])
                    if isinstance(y, tf.Tensor)
                ]
                for path in order
            }
            for tower in graph.towers
        ]
        return each, graph.rows

    by_path: dict[str, list[list[Any]]] = {}
    for x in batches:
        with steps.kept(), as_graphs():
            each, rows = as_function(run, "layers")(x)
        for tower, count in zip(each, rows.numpy()):
            for path in order if count else ():
                arrays = [y.numpy() for y in tower[path]]
                by_path.setdefault(path, []).append(arrays)
    return {p: _joined(towers) for p, towers in by_path.items()}, order


def _joined(towers: list[list[Any]]) -> Any:
    """All numbers of a layer's outputs, rows after rows, as one array."""
    columns = [np.concatenate(c) if c[0].ndim else c[0] for c in zip(*towers)]
    floats = [c.astype("float64").ravel() for c in columns if c.dtype != object]
    return np.concatenate(floats) if floats else np.zeros([0])


def _reason(path: str, layer: Any, training: bool, alone: bool) -> str:
    """What is likely behind a layer that differs, in a sentence.

    Args:
      path: of the layer.
      layer: it.
      training: the phase.
      alone: whether the plain model, given each tower's rows by themselves, has
        there the numbers of the whole batch.
    """
    name = f"The layer {path!r} ({type(layer).__name__}) is the first to differ"
    if isinstance(layer, keras.layers.BatchNormalization) and training:
        return (
            f"{name}: it takes the mean and the variance of its tower's rows, "
            "not of the whole batch's. With synchronized=True it takes the whole "
            "batch's."
        )
    held = [layer] if isinstance(layer, keras.Layer) else []
    variables = [v for x in held for v in x.variables]
    if any(keras_layers.is_seed(v) for v in variables) or isinstance(
        layer, keras.layers.Dropout
    ):
        return f"{name}: it draws random numbers, and draws others in towers."
    if not alone:
        return (
            f"{name}: rows are mixed. What it makes of a row depends on the "
            "others of the batch, of which a tower has its own; the plain model "
            "given each tower's rows by themselves differs there, too. Let it "
            "ask all towers: see towers.all_towers."
        )
    kept = [v.name for v in variables if not v.trainable]
    if kept:
        return f"{name}: it keeps a state of its own, {', '.join(kept)}."
    return (
        f"{name}, and not for its rows: the plain model given each tower's rows "
        "by themselves has the whole batch's numbers there."
    )
