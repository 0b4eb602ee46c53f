"""foreign: the one door to private names of Keras and TensorFlow.

A private name is one that begins with an underscore and is not ours, one of
`keras.src`, `tensorflow.python` or `tensorflow.core`, or `tf.__internal__`. Each
stands here, in a file that says why nothing public will do, and a test beside it
in `tests/foreign/` fails when it changes. `tests/promises/house_test.py` finds any
that stands elsewhere.

All that knows Keras comes by here, so this is where it is checked.
"""

try:
    import keras
except ImportError as error:  # another backend that is not installed
    raise RuntimeError(
        "towers needs Keras 3 on its TensorFlow backend, but importing Keras "
        f"failed: {error}. Set KERAS_BACKEND=tensorflow."
    ) from error


if not keras.__version__.startswith("3"):
    raise RuntimeError(
        f"towers needs Keras 3; got Keras {keras.__version__}. Upgrade with "
        "`pip install 'keras>=3'`."
    )


if keras.backend.backend() != "tensorflow":
    raise RuntimeError(
        "towers needs Keras on its TensorFlow backend, but KERAS_BACKEND is "
        f"{keras.backend.backend()!r}. Set KERAS_BACKEND=tensorflow before "
        "Keras is imported."
    )
