"""row_widths: sizes that a tower takes from its rows, where plain has a batch's.

`x[:, :tf.reduce_max(lengths)]` is as wide as the longest of a tower's rows. Where
an output shows it, joining tells. Where it does not, as under a mean over that
width, the numbers are others, and nothing else would tell. What a mask of the
rows' own lengths leaves out makes no other numbers, as in `tf.repeat`, and in the
sums over a ragged axis that are made of it.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.engine import all_towers, boundary, dependence
from towers.engine.fragments import needed_ops
from towers.keras_model import pins, widths
from towers.keras_model.sources import Sources

# By the type of an op, which inputs tell the sizes of its result, and whether they
# tell one for each axis, that of rows first.
SIZED: dict[str, tuple[tuple[int, ...], bool]] = {
    "BroadcastTo": ((1,), True),
    "DenseBincount": ((1,), False),
    "Fill": ((0,), True),
    "MirrorPad": ((1,), True),
    "OneHot": ((1,), False),
    "Pad": ((1,), True),
    "PadV2": ((1,), True),
    "RaggedBincount": ((2,), False),
    "Range": ((0, 1), False),
    "Reshape": ((1,), True),
    "ScatterNd": ((2,), True),
    "Slice": ((2,), True),
    "SparseToDense": ((1,), True),
    "StridedSlice": ((1, 2), True),
    "TensorListReserve": ((1,), False),
    "Tile": ((1,), True),
    "TopKV2": ((1,), False),
}
# What a tensor is passed on through with its values as they are.
_PASSED_ON = ("Cast", "ExpandDims", "Identity", "Reshape", "Squeeze")
# Comparisons of places to lengths, and which of their inputs are which.
_SHORTER = {"Less": (0, 1), "Greater": (1, 0)}
# What tells the shape of rows, and nothing that is in them.
_SHAPES = ("Rank", "Shape", "ShapeN", "Size")


def warn_of_hidden(
    graph: Any,
    results: Any,
    ops: Sequence[tf.Operation],
    sources: Sources,
) -> None:
    """Warns once of each layer that takes a width from rows, if none shows it.

    To be called in the tower.

    Args:
      graph: the `LayerGraph` of the model.
      results: a nest of what it computed.
      ops: those that it is made of.
      sources: what it is given.
    """
    suspects = [op for op in ops if op.type in SIZED and _is_open(op)]
    if not suspects:
        return
    cut = [op.outputs[0] for op in ops if _leaves_out(op)]
    rows = _contents(sources)
    shared = all_towers.shared()
    needed = {op.name for op in needed_ops(ops, results)}
    closed = [
        x
        for x in boundary.tensors_of(results)
        if x.shape[1:].is_fully_defined()
    ]
    for op in suspects:
        if (
            op.name in needed
            and _takes_from(op, rows, shared)
            and any(dependence.depends(x, op.outputs, cut) for x in closed)
        ):
            _warn(graph, op)


def _contents(sources: Sources) -> list[tf.Tensor]:
    """What a tower's rows hold; a sparse tensor's shape is the batch's."""
    tensors: list[tf.Tensor] = []
    for leaf in sources.own:
        if isinstance(leaf, tf.SparseTensor):
            tensors += [leaf.indices, leaf.values]
        else:
            tensors += boundary.tensors_of(leaf)
    return tensors


def _is_open(op: tf.Operation) -> bool:
    """Whether a size that is not known is not that of rows."""
    result = op.outputs[0]
    if op.type == "Range":
        return any(map(_is_wide, _spread(result)))
    return op.type == "TensorListReserve" or _is_wide(result)


def _is_wide(tensor: tf.Tensor) -> bool:
    return tensor.shape.rank is None or None in tensor.shape[1:].as_list()


def _spread(tensor: tf.Tensor) -> list[tf.Tensor]:
    """The tensors of more axes that are made of a vector, past other vectors."""
    results: list[tf.Tensor] = []
    ahead = [tensor]
    while ahead:
        for op in ahead.pop().consumers():
            for x in op.outputs:
                (ahead if x.shape.rank == 1 else results).append(x)
    return results


def _takes_from(
    op: tf.Operation, rows: Sequence[tf.Tensor], shared: Sequence[tf.Tensor]
) -> bool:
    """Whether an op takes a size, but that of rows, from what rows hold."""
    places, by_axis = SIZED[op.type]
    sizes = [
        size
        for place in places
        for size in (_of_axes(op, place) if by_axis else [op.inputs[place]])
    ]
    return any(
        dependence.depends(size, rows, shared, _SHAPES) for size in sizes
    )


def _of_axes(op: tf.Operation, place: int) -> list[tf.Tensor]:
    """What tells the sizes of axes after the first."""
    vector = op.inputs[place]
    if vector.op.type != "Pack":
        return [vector]
    ignored = 0
    if op.type == "StridedSlice":
        mask = ("", "begin_mask", "end_mask")[place]
        ignored = op.get_attr(mask) | op.get_attr("shrink_axis_mask")
    return [
        x for i, x in enumerate(vector.op.inputs) if i and not ignored >> i & 1
    ]


def _leaves_out(op: tf.Operation) -> bool:
    """Whether a result is of what is within its row's length alone."""
    if op.type == "Where":
        return op.inputs[0].shape.rank != 1 and _is_mask(op.inputs[0])
    if op.type == "GatherV2":
        places = _origin(op.inputs[1])
        return places.type == "Where" and _is_mask(places.inputs[0])
    if op.type == "Reshape":
        return _is_repeated(op)
    if op.type != "Sum" or _is_wide(op.outputs[0]):
        return False
    return _is_mask(op.inputs[0]) or _is_masked(op.inputs[0].op)


def _is_repeated(op: tf.Operation) -> bool:
    """Whether it is the end of a `tf.repeat` of one row, which needs no mask."""
    tile, shape = op.inputs[0].op, op.inputs[0].shape
    ranks = shape.rank, op.outputs[0].shape.rank
    return (
        tile.type == "Tile"
        and None not in ranks
        and shape[:2].as_list() == [1, None]
        and tile.inputs[0].shape[:2].as_list() == [1, 1]
        and ranks[0] == ranks[1] + 1
    )


def _is_masked(op: tf.Operation) -> bool:
    """Whether a result is 0 behind the ends of rows."""
    if op.type == "Mul":
        return any(map(_is_mask, op.inputs))
    if op.type not in ("Select", "SelectV2") or not _is_mask(op.inputs[0]):
        return False
    other = op.inputs[2]
    value = tf.get_static_value(other)
    return other.op.type == "ZerosLike" or value is not None and not value.any()


def _is_mask(tensor: tf.Tensor) -> bool:
    """Whether a tensor tells what is within the lengths that it is as wide as."""
    op = _origin(tensor)
    if op.type not in _SHORTER:
        return False
    places, lengths = (_origin(op.inputs[i]) for i in _SHORTER[op.type])
    return places.type == "Range" and dependence.depends(
        places.inputs[1], lengths.outputs
    )


def _origin(tensor: tf.Tensor) -> tf.Operation:
    """The op whose values a tensor has, whatever its shape."""
    while tensor.op.type in _PASSED_ON or (
        tensor.op.type == "StridedSlice" and tensor.op.get_attr("new_axis_mask")
    ):
        tensor = tensor.op.inputs[0]
    return tensor.op


def _warn(graph: Any, op: tf.Operation) -> None:
    paths = {path for path, _ in pins.layer_paths(graph.models)}
    layer = widths.layer_at(paths, op)
    widths.warn_once(
        graph,
        layer,
        f"{widths.path_or_model(graph, layer)!r} takes a width from the rows that it "
        f"is given, by {op.type} {op.name!r}, which in a tower is that of the tower's rows "
        "and not of the batch's. What averages over it, or reads it in turn "
        "without a mask, gives other numbers than the plain model. Ask all "
        "towers for it, as in towers.all_towers(tf.reduce_max, lengths) in a "
        "layer with `needs_all_towers = True`, or take one that is fixed.",
    )
