"""keras_cut: where the layers of Keras that can be cut keep what is cut of them.

Keras has no public word for a weight before LoRA and quantizing are applied to it
(`_kernel`, `_embeddings`), nor for what attention by heads consists of
(`_num_heads`, `_query_dense`, `_key_dense`, `_value_dense`, `_gate_dense`,
`_output_dense`, `_dropout_layer`). `keras_cut_test.py` fails when one changes.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras

from towers.foreign.keras_layers import CALL_CONTEXT

BIAS = "bias"
EMBEDDINGS = "_embeddings"
HEADS = "_num_heads"
OUTPUT = "_output_dense"
SCORES_DROPOUT = "_dropout_layer"
_GATE = "_gate_dense"
_PROJECTIONS = ("_query_dense", "_key_dense", "_value_dense", _GATE)


def kernel_of(layer: keras.Layer) -> str:
    """The attribute that holds the kernel."""
    return "_kernel" if "_kernel" in vars(layer) else "kernel"


def weight_name(attribute: str) -> str:
    """What Keras calls the weight that an attribute holds."""
    return attribute.lstrip("_")


def set_build(layer: keras.Layer, build: Callable[..., None]) -> None:
    """Has a layer built another way, once.

    Args:
      layer: not built yet.
      build: `build(original, *args, **kwargs)`.
    """
    original = layer.build

    @functools.wraps(original)
    def built(*args: Any, **kwargs: Any) -> None:
        vars(layer)["build"] = original
        build(original, *args, **kwargs)

    vars(layer)["build"] = built


def projections(attention: keras.layers.MultiHeadAttention) -> list[str]:
    """The attributes with the layers that make heads, and that are called."""
    return [name for name in _PROJECTIONS if name in vars(attention)]


def is_remade(layer: Any) -> bool:
    """Whether its outputs are computed again in the backward pass."""
    return getattr(layer, "_remat_mode", None) is not None


def changed(layer: Any, attributes: dict[str, Any]) -> Any:
    """A copy that shares all but some attributes, and has no hooks.

    Keras's own `copy` saves and loads, and setting an attribute tracks it.
    """
    copy = object.__new__(type(layer))
    shadows = ("call", "compute_mask", CALL_CONTEXT, "activity_regularizer")
    own = {k: v for k, v in vars(layer).items() if k not in shadows}
    vars(copy).update(own, activity_regularizer=None, **attributes)
    return copy
