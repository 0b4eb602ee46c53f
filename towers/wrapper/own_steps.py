"""own_steps: what a step of the user's calls of a model's layers, in towers.

Keras looks up `__call__` at a layer's class, but `call` at the layer. So that is
what a step finds shadowed: lists, `isinstance` and weights stay what they are.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from towers.foreign.keras_layers import (
    all_layers,
    in_symbols,
    keras_context,
    scope_here,
)
from towers.foreign.patches import patched
from towers.keras_model import checks
from towers.keras_model.model_calls import ModelCall, model_call
from towers.keras_model.replay import Values
from towers.keras_model.whole_call import Asking


@contextlib.contextmanager
def layers_in_towers(model: Any) -> Iterator[None]:
    """While open, a layer that is called by no other runs in towers.

    Each call is split by its own rows, and gathered. What has no rows, or makes
    something of all of them, as a layer that returns a loss, is called as ever.

    Args:
      model: a `TowerModel`.
    """

    cache = model.tower_calls.keeps_rows

    def keeps_rows(layer: keras.Layer, call: ModelCall) -> bool:
        shapes = [str(tf.type_spec_from_value(x)) for x in call.batch]
        key = (id(layer), *shapes, str(call.kind))
        if key not in cache:
            cache[key] = _keeps_rows(layer, call)
        return cache[key]

    def called(layer: keras.Layer) -> Callable[..., Any]:
        original = layer.call
        signature = inspect.signature(original)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if in_symbols() or isinstance(scope_here(), (Values, Asking)):
                # In a tower, or asked what it makes of other rows.
                return original(*args, **kwargs)
            cut = model_call(
                args,
                kwargs,
                _named(model.whole, signature),
                signature,
                inside=True,
            )
            if not cut.has_rows or not keeps_rows(layer, cut):
                return original(*args, **kwargs)
            return model.tower_calls.run(layer, cut)

        return call

    def built(layer: keras.Layer) -> Callable[..., Any]:
        original = layer.build

        @functools.wraps(original)
        def build(*args: Any, **kwargs: Any) -> None:
            # With values at once, that can be moved, and not in a graph.
            with tf.init_scope():
                original(*args, **kwargs)

        return build

    layers = all_layers(model.template)
    shadows = [(x, "call", called(x)) for x in layers]
    shadows += [(x, "build", built(x)) for x in layers if not x.built]
    with patched(*shadows):
        yield


def _named(whole: Any, signature: inspect.Signature) -> list[Any]:
    """Those names in `whole` that are of this layer's arguments."""
    names = [key[0] if isinstance(key, tuple) else key for key in whole]
    return [k for k, name in zip(whole, names) if name in signature.parameters]


def _keeps_rows(layer: keras.Layer, call: ModelCall) -> bool:
    """Whether a layer makes dense rows of rows, as far as it can tell."""
    args, kwargs = checks.symbols(call)
    try:
        with keras_context()():
            specs = tf.nest.flatten(layer.compute_output_spec(*args, **kwargs))
    except Exception:  # of a layer that cannot be asked
        return True
    return all(
        len(x.shape)
        and x.shape[0] is None
        and not (x.sparse or getattr(x, "ragged", False))
        for x in specs
        if isinstance(x, keras.KerasTensor)
    )
