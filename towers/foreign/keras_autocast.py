"""keras_autocast: the dtype that Keras casts a variable to where it is read.

Mixed precision is an `AutocastScope` that a layer opens around its call, which
variables ask for (`get_autocast_scope`), unless they are made without
(`_autocast`). `keras_autocast_test.py` fails when one of them changes.
"""

from typing import Any

import tensorflow as tf
from keras.src.backend.common.variables import get_autocast_scope

_HALVES = ("bfloat16", "float16")


def half_here(variable: Any) -> tf.DType | None:
    """The half dtype that a read of a float32 variable is cast to here, if any."""
    scope = get_autocast_scope()
    if scope is None or scope.dtype not in _HALVES or not variable._autocast:
        return None
    return tf.as_dtype(scope.dtype)
