"""tf_errors: TensorFlow's errors with words of ours in front of its own."""

import tensorflow as tf


def in_words(error: tf.errors.OpError, words: str) -> tf.errors.OpError:
    """The same error of the same place, which says more."""
    copy = type(error)(error.node_def, error.op, f"{words}{error.message}")
    return copy.with_traceback(error.__traceback__)
