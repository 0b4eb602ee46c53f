"""signature: what a model is called with, as specs, and what it returns, named."""

import functools
import inspect
import operator
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign.keras_layers import is_built
from towers.foreign.specs import shaped
from towers.verbs.batch import whole_leaves, whole_paths


def input_specs(
    model: Any, signature: Any, whole: Sequence[Any], rows: int | None
) -> Any:
    """A nest of TensorFlow's specs, dense ones named.

    Args:
      model: the model, or a nest of them.
      signature: what the caller said of inputs, or None.
      whole: see `split_batch`.
      rows: how many; None for any number.
    """
    if signature is None:
        signature = input_signature(model)
    elif isinstance(signature, (list, tuple)) and len(signature) == 1:
        (signature,) = signature  # as Keras and tf.function have it
    if not tf.nest.flatten(signature):
        raise TypeError(
            "`input_signature` must be a nest of tf.TensorSpec like the "
            f"model's inputs; got {signature!r}, which holds none."
        )
    undivided = tf.nest.pack_sequence_as(
        signature, whole_leaves(signature, whole)
    )
    taken: set[str] = set()

    def named(path: tuple[Any, ...], spec: Any) -> tf.TypeSpec:
        if not hasattr(spec, "shape") or not hasattr(spec, "dtype"):
            raise TypeError(
                "`input_signature` must be a nest of tf.TensorSpec like the "
                f"model's inputs; got {spec!r}."
            )
        if spec.dtype is None:
            raise ValueError(
                "`input_signature` must say the dtype of each input; got "
                f'{spec!r}. Give it a dtype, such as "float32".'
            )
        shape = tf.TensorShape(spec.shape)
        if functools.reduce(operator.getitem, path, undivided):
            pass  # as it is
        elif not shape.rank:
            raise ValueError(
                "`input_signature` must have an axis of rows in each spec, "
                f"[rows, ...], or to be named in `whole`; got shape {shape}."
            )
        else:
            shape = tf.TensorShape([rows, *shape[1:]])
        if isinstance(spec, tf.RaggedTensorSpec):
            return shaped(spec, shape)
        if isinstance(spec, tf.SparseTensorSpec) or getattr(
            spec, "sparse", False
        ):
            return tf.SparseTensorSpec(shape, spec.dtype)
        if getattr(spec, "ragged", False):
            raise ValueError(
                "`input_signature` is not given, and a model does not say how "
                "its ragged inputs are ragged. Expected a nest with a "
                f"tf.RaggedTensorSpec, such as one of shape {shape}."
            )
        name = getattr(spec, "name", None) or ""
        if not name or name.startswith("keras_tensor"):
            name = "_".join(["inputs", *map(str, path)])
            if path and all(isinstance(key, str) for key in path):
                name = "_".join(path)
        while name in taken:
            name += "_"
        taken.add(name)
        return tf.TensorSpec(shape, spec.dtype, name)

    return _map_with_path(named, signature)


def several_arguments(model: Any, signature: Any) -> dict[str, Any] | None:
    """By its name what each argument of a call is, if there are several.

    A list for a model whose call takes several tensors is one for each, as Keras
    has it; for any other model it is a nest, like the inputs.

    Args:
      model: the model, or a nest of them.
      signature: what the caller said of inputs, or None for what the model was
        called with, if that is known.

    Raises:
      ValueError: it is not known.
    """
    if not isinstance(model, keras.Model) or getattr(model, "inputs", None):
        return None
    parameters = inspect.signature(model.call).parameters.values()
    arguments = [
        p
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD
        and p.name not in ("training", "mask")
    ]
    names = [p.name for p in arguments]
    needed = [p.name for p in arguments if p.default is p.empty]
    config = model.get_build_config() or {}
    shapes = config.get("shapes_dict") or {}
    if signature is None and len(shapes) > 1:
        built = {key.rpartition("_")[0]: x for key, x in shapes.items()}
        keys = [n for n in names if n in built]
        if len(keys) < len(built):  # named otherwise than in the call
            keys, built = names, dict(zip(names, shapes.values()))
        return {key: _spec(model, built[key]) for key in keys}
    several = max(len(needed), len(shapes)) > 1
    if signature is None and len(needed) > 1:
        raise ValueError(
            "`input_signature` must have a spec for each of the arguments "
            f"{', '.join(needed)}, as the model does not know what it was "
            "called with. Give a list, such as [tf.TensorSpec([None, 8]), "
            "tf.TensorSpec([None, 4])]; or a `build` with all their shapes."
        )
    listed = isinstance(signature, (list, tuple)) and len(signature) > 1
    return dict(zip(names, signature)) if several and listed else None


def whole_arguments(
    arguments: dict[str, Any], whole: Sequence[Any]
) -> list[tuple[Any, ...]]:
    """`whole` for a dict of arguments: what is none is of the first."""
    first = next(iter(arguments))
    paths = whole_paths(whole)
    return [p if p[0] in arguments else (first, *p) for p in paths]


def spec_parts(specs: Any) -> list[tf.TensorSpec]:
    """Specs of tensors; ragged and sparse ones as their parts, by number."""
    parts = tf.nest.flatten(specs, expand_composites=True)
    return [
        spec
        if spec.name
        else tf.TensorSpec(spec.shape, spec.dtype, f"inputs_part_{i}")
        for i, spec in enumerate(parts)
    ]


def _map_with_path(function: Any, nest: Any, path: tuple = ()) -> Any:
    """A nest of `function(path, leaf)`."""
    if isinstance(nest, dict):
        return {
            key: _map_with_path(function, value, (*path, key))
            for key, value in nest.items()
        }
    if isinstance(nest, (list, tuple)):
        mapped = [
            _map_with_path(function, value, (*path, i))
            for i, value in enumerate(nest)
        ]
        # As `serve` takes either but not the other.
        return tuple(mapped) if isinstance(nest, tuple) else mapped
    return function(path, nest)


def named_outputs(outputs: Any) -> dict[str, tf.Tensor]:
    """Outputs as a signature wants them: by name."""
    flat = tf.nest.flatten(outputs)
    if isinstance(outputs, dict) and len(flat) == len(outputs):
        named = {str(key): value for key, value in outputs.items()}
    else:
        named = {f"output_{i}": value for i, value in enumerate(flat)}
    return {key: tf.identity(y) for key, y in named.items() if y is not None}


def input_signature(model: Any) -> Any:
    """A nest like a model's inputs, with a shape and a dtype for each.

    Raises:
      ValueError: the model has not been told what it will be called with.
    """
    if isinstance(model, keras.Sequential) and model.built:
        return model.inputs[0]
    if getattr(model, "inputs", None):
        return model.input
    config = (
        model.get_build_config() if isinstance(model, keras.Model) else None
    )
    shape = (config or {}).get("input_shape")
    if shape is None or not is_built(model):
        raise ValueError(
            "`input_signature` is not given, and the inputs are not known from "
            "the model. Expected a nest of tf.TensorSpec, such as "
            'tf.TensorSpec([None, 8], "float32").'
        )

    return _spec(model, shape)


def _spec(model: Any, shape: Any) -> Any:
    """A nest of shapes, with the dtype that a model takes."""
    if isinstance(shape, dict):
        return {key: _spec(model, value) for key, value in shape.items()}
    if all(isinstance(d, int) or d is None for d in shape):
        return tf.TensorSpec(shape, model.input_dtype)
    each = [_spec(model, value) for value in shape]
    return tuple(each) if isinstance(shape, tuple) else each
