"""signature: what a model is called with, as specs, and what it returns, named."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign.keras_layers import is_built
from towers.verbs.batch import whole_leaves


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
            return tf.RaggedTensorSpec(
                shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype
            )
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

    def spec(shape: Any) -> Any:
        if isinstance(shape, dict):
            return {key: spec(value) for key, value in shape.items()}
        if all(isinstance(d, int) or d is None for d in shape):
            return tf.TensorSpec(shape, model.input_dtype)
        each = [spec(value) for value in shape]
        return tuple(each) if isinstance(shape, tuple) else each

    return spec(shape)
