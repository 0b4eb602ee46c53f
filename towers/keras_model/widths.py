"""widths: ragged rows are made dense as wide as the batch's longest.

A tower's own longest row would make another number of what averages over a
width, or reads it in turn: so the widest is asked of all towers.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Container
from typing import Any

import tensorflow as tf

from towers.engine import all_towers
from towers.engine.host import device_here, on_host
from towers.foreign.patches import CountedPatches
from towers.foreign.tf_custom_gradients import in_custom_gradient
from towers.placement.scopes import layer_of, tower_of

_warned: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def of_batch(
    notes: Callable[[], Any],
) -> contextlib.AbstractContextManager[None]:
    """While open, ragged tensors of towers are as wide as those of all.

    Args:
      notes: gives the `Notes` of the tower that is being built, or None.
    """
    return _WIDENED.opened(notes)


def warn_once(graph: Any, path: str, text: str) -> None:
    """Tells of a layer once, however often its model is called in towers.

    Args:
      graph: the `LayerGraph` of the model.
      path: of the layer, "" outside of layers.
      text: what is to be said of it.
    """
    paths: set[str] = set()
    for model in graph.models[:1]:
        paths = _warned.setdefault(model, paths)
    if path not in paths:
        paths.add(path)
        warnings.warn(text, UserWarning, stacklevel=2)


def path_or_model(graph: Any, path: str) -> str:
    """A layer's path, or outside of layers the model's name."""
    return path or next((model.name for model in graph.models), "tower_fn")


def layer_at(paths: Container[str], op: tf.Operation) -> str:
    """The path of the layer that an op of a tower is of; "" outside of layers.

    Args:
      paths: those of all layers.
      op: of a tower.
    """
    tower = tower_of(op.name)
    scope = layer_of(tower[1]) if tower else ""
    while scope and scope not in paths:
        scope = scope.rpartition("/")[0]
    return scope


def _patches(notes: Callable[[], Any]) -> list[tuple[Any, str, Any]]:
    dense, sparse = tf.RaggedTensor.to_tensor, tf.RaggedTensor.to_sparse

    def to_tensor(
        ragged: tf.RaggedTensor,
        default_value: Any = None,
        name: str | None = None,
        shape: Any = None,
    ) -> tf.Tensor:
        sizes = _widened(ragged, shape, notes())
        result = dense(ragged, default_value, name, sizes or shape)
        if sizes:
            static = [
                x if isinstance(x, int) and x >= 0 else None for x in sizes
            ]
            result.set_shape(static)
        return result

    def to_sparse(
        ragged: tf.RaggedTensor, name: str | None = None
    ) -> tf.SparseTensor:
        result = sparse(ragged, name)
        sizes = _widened(ragged, None, notes())
        if not sizes:
            return result
        shape = tf.stack([result.dense_shape[0], *sizes[1:]])
        return tf.SparseTensor(result.indices, result.values, shape)

    return [
        (tf.RaggedTensor, "to_tensor", to_tensor),
        (tf.RaggedTensor, "to_sparse", to_sparse),
    ]


_WIDENED = CountedPatches(_patches)


def _widened(ragged: tf.RaggedTensor, shape: Any, notes: Any) -> list[Any]:
    """The sizes of a ragged tensor's axes, with those of the batch's longest.

    Args:
      ragged: of a tower.
      shape: those that are asked for.
      notes: the tower's, if there is one.

    Returns:
      An int or a scalar for each axis, -1 for rows; [] for those it has.
    """
    expected = _sizes(shape, ragged.shape.rank)
    if notes is None or not all_towers.is_one_of_many() or expected is None:
        return []
    lengths = [
        size if own is None else own
        for own, size in zip(expected, ragged.shape)
    ]
    wide = [i for i, size in enumerate(lengths) if i and size is None]
    splits, here = ragged.nested_row_splits, tf.compat.v1.get_default_graph()
    if not wide or all(tf.get_static_value(x) is not None for x in splits):
        return []
    if in_custom_gradient() or notes.body is not here:
        _warn(notes)
        return []
    with on_host(device_here()):
        own = tf.gather(ragged.bounding_shape(out_type=tf.int32), wide)
        widest = all_towers.met(
            *(
                _longest,
                (own[tf.newaxis],),
                path_or_model(notes.graph, notes.path),
            ),
            "makes ragged rows dense, as wide as the longest of all towers",
            "a `shape` for `to_tensor`",
        )
        sizes = tf.unstack(tf.cast(widest, splits[0].dtype), len(wide))
    for i, size in zip(wide, sizes):
        lengths[i] = size
    return [-1, *lengths[1:]] if expected[0] is None else lengths


def _longest(widths: tf.Tensor) -> tf.Tensor:  # [n, axes] -> [axes]
    return tf.reduce_max(widths, 0)


def _sizes(shape: Any, rank: int | None) -> list[Any] | None:
    """What is asked of each axis, None for what it has; None if not known."""
    if rank is None:
        return None
    if shape is None:
        return [None] * rank
    if isinstance(shape, tf.Tensor):
        shape = tf.get_static_value(shape)
        if shape is None:
            return None
        shape = shape.tolist()
    if isinstance(shape, tf.TensorShape):
        shape = [None] * rank if shape.rank is None else shape.as_list()
    if len(shape) != rank:
        return None  # which TensorFlow refuses
    return [None if isinstance(x, int) and x < 0 else x for x in shape]


def _warn(notes: Any) -> None:
    graph, path = notes.graph, notes.path
    warn_once(
        graph,
        path,
        f"{path_or_model(graph, path)!r} makes ragged rows dense in a loop, a "
        "tf.cond, a tf.function or a custom gradient, where other towers "
        "cannot be asked: as wide as the longest of its tower's rows, not of "
        "the batch. What averages over that width, or reads it in turn without "
        "a mask, gives other numbers than the plain model. Make them dense "
        "outside of it; or give `to_tensor` a `shape`.",
    )
