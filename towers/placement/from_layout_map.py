"""from_layout_map: what Keras's map of layouts says of a model's layers."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras

from towers.foreign import keras_axes, keras_cut, keras_layers
from towers.placement.pieces import column_wise, row_wise

_BATCH = "batch"


class Mesh(NamedTuple):
    """A mesh of devices, one row for each tower.

    Attributes:
      batch, model: the names of its axes; None for one that it has not.
      rows: the devices.
    """

    batch: str | None
    model: str | None
    rows: list[list[str]]


def mesh_of(layout_map: Any, batch_dim_name: str | None) -> Mesh:
    """The mesh that a map is over.

    Raises:
      TypeError: `layout_map` is no `LayoutMap`.
      ValueError: its mesh has more axes, or none of this name.
    """
    if not isinstance(layout_map, keras.distribution.LayoutMap):
        raise TypeError(
            "`layout_map` must be a keras.distribution.LayoutMap; got "
            f"{layout_map!r}. Other pins are said by Placement(devices, "
            "layer_devices={...})."
        )
    mesh = layout_map.device_mesh
    names = list(getattr(mesh, "axis_names", ()))
    if len(names) not in (1, 2):
        raise ValueError(
            "`layout_map` must be over a DeviceMesh with an axis of the batch, "
            f"one of the model, or both; got the axes {names}."
        )
    batch = batch_dim_name or (_BATCH if _BATCH in names else None)
    if batch is None and len(names) == 2:
        batch = names[0]  # as `ModelParallel` has it
    if batch is not None and batch not in names:
        raise ValueError(
            f"`batch_dim_name` is {batch!r}, but the mesh has the axes {names}. "
            "Give one of those."
        )
    model = next((name for name in names if name != batch), None)
    devices = mesh.devices
    if batch is None:
        devices = devices.reshape(1, -1)
    elif len(names) == 1:
        devices = devices.reshape(-1, 1)
    elif names[0] != batch:
        devices = devices.T
    return Mesh(batch, model, [[str(x) for x in row] for row in devices])


def laid_out(
    model: Any, layout_map: Any, mesh: Mesh
) -> tuple[dict[str, Any], list[str]]:
    """What is cut, for `layer_devices`, and what of the map is not done.

    Args:
      model: a built Keras model.
      layout_map: by which; a key is a variable's path, or matches all of it.
      mesh: that of the map.

    Raises:
      TypeError: `model` is no Keras model.
      ValueError: it is not built, or a layout cannot be.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a keras.Model; got {type(model).__name__}."
        )
    if not keras_layers.is_built(model):
        raise ValueError(
            f"`model` {model.name!r} is not built, so it has no variables that "
            "a layout could be of. Call it once on real data first."
        )
    layers = list(_layers(model))
    _check_keys(
        layout_map, [v.path for _, layer in layers for v in _own(layer)]
    )
    where: dict[str, Any] = {}
    reasons: list[str] = []
    for path, layer in layers:
        if any(path.startswith(f"{other}/") for other in where):
            continue  # inside of attention
        by = _cut(path, layer, layout_map, mesh, reasons)
        if by is not None:
            cut = tuple(by(row) for row in mesh.rows)
            where[path] = cut[0] if len(cut) == 1 else list(cut)
    if not where and mesh.batch is not None and mesh.model is not None:
        along = [x for x in layout_map.values() if mesh.batch in x.axes]
        if along:
            raise ValueError(
                f"All layouts are along {mesh.batch!r}, which is the axis of the "
                "batch, so nothing would be cut. Name the other one: "
                f"batch_dim_name={mesh.model!r}."
            )
    return where, [*dict.fromkeys(reasons)]


def _layers(layer: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All that a layer holds, by paths, what holds others first."""
    for child in keras_layers.children(layer):
        yield prefix + child.name, child
        yield from _layers(child, f"{prefix}{child.name}/")


def _own(layer: Any) -> list[Any]:
    """The variables that a layer has, and none that it holds."""
    below = {id(v) for x in keras_layers.children(layer) for v in x.variables}
    return [v for v in layer.variables if id(v) not in below]


def _check_keys(layout_map: Mapping[str, Any], paths: Sequence[str]) -> None:
    """Raises if a key is of no variable."""
    for key in layout_map:
        if key in paths or any(re.fullmatch(key, path) for path in paths):
            continue
        near = difflib.get_close_matches(key, paths, 3) or paths[:8]
        raise ValueError(
            f"`layout_map` has a layout for {key!r}, which is the path of no "
            f"variable, and matches none. The nearest are {', '.join(near)}."
        )


def _cut(
    path: str, layer: Any, layout_map: Any, mesh: Mesh, reasons: list[str]
) -> Any:
    """`column_wise`, `row_wise`, or None for a layer that is not cut."""
    if isinstance(layer, keras.layers.MultiHeadAttention):
        return _by_heads(path, layer, layout_map, mesh, reasons)
    by, beside = None, []
    for variable in _own(layer):
        axis = _axis(variable, layout_map, mesh, reasons)
        if axis is None:
            continue
        if variable.name == keras_cut.BIAS or len(variable.shape) < 2:
            beside.append(variable.path)
            continue
        axes = keras_axes.kernel_axes(layer)
        if axis not in axes:
            kind = type(layer).__name__
            raise ValueError(
                f"`layout_map` cuts {variable.path!r} along axis {axis}, but of "
                f"{path!r}, a {kind}, this is the axis of neither outputs nor "
                "inputs. Expected Dense, EinsumDense, Embedding, "
                "MultiHeadAttention or a convolution, and axis "
                f"{' or '.join(str(x) for x in axes if x is not None) or None}."
            )
        by = column_wise if axis == axes[0] else row_wise
    if by is not column_wise:  # else it goes with its kernel
        reasons += [f"{x} is whole, as its layer's outputs are" for x in beside]
    return by


def _by_heads(
    path: str, layer: Any, layout_map: Any, mesh: Mesh, reasons: list[str]
) -> Any:
    """`column_wise` for attention whose heads are all cut."""
    outputs = vars(layer)[keras_cut.OUTPUT]
    inner = [vars(layer)[name] for name in keras_cut.projections(layer)]
    axes = {}
    for below in [*inner, outputs]:
        kernel = vars(below)[keras_cut.kernel_of(below)]
        axes[kernel.path] = _axis(kernel, layout_map, mesh, reasons)
    if set(axes.values()) == {None}:
        return None
    heads = [1] * len(inner) + [0]  # [in, heads, size]; [heads, size, out]
    if list(axes.values()) != heads:
        expected = dict(zip(axes, heads))
        raise ValueError(
            f"`layout_map` cuts the kernels of {path!r} along {axes}, but "
            f"attention is cut by heads: along {expected}, all of them or none."
        )
    return column_wise


def _axis(
    variable: Any, layout_map: Any, mesh: Mesh, reasons: list[str]
) -> int | None:
    """The axis along which a variable is cut over the devices of a tower."""
    layout = layout_map[variable.path]  # raises if several keys match
    if layout is None:
        return None
    axes, path = tuple(layout.axes), variable.path
    names = {None, mesh.batch, mesh.model}
    unknown = [x for x in axes if x not in names]
    if unknown or len(axes) != len(variable.shape):
        raise ValueError(
            f"The layout of {path!r} is {axes}, but it has the shape "
            f"{tuple(variable.shape)}, and the mesh the axes "
            f"{[x for x in (mesh.batch, mesh.model) if x]}. Expected one of "
            "these, or None, for each axis."
        )
    if mesh.batch is not None and mesh.batch in axes:
        reasons.append(f"{path} is not cut along {mesh.batch!r}, the batch's")
    cut = [i for i, x in enumerate(axes) if x is not None and x == mesh.model]
    if len(cut) > 1:
        raise ValueError(
            f"The layout of {path!r} is {axes}: it is cut along two axes over "
            "the same devices. Expected one."
        )
    return cut[0] if cut else None
