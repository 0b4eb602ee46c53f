"""distributed: what else distributes while a `TowerModel` is made."""

import warnings

import keras
import tensorflow as tf


def check_distributed() -> None:
    """Refuses a strategy of tf.distribute; warns of a distribution of Keras's.

    Raises:
      RuntimeError: it is called under a strategy.
    """
    if tf.distribute.has_strategy():
        strategy = type(tf.distribute.get_strategy()).__name__
        raise RuntimeError(
            f"TowerModel was made under a tf.distribute {strategy}, which "
            "places ops itself. Make the model and the wrapper outside "
            "`strategy.scope()`."
        )
    distribution = keras.distribution.distribution()
    if distribution is not None:
        warnings.warn(
            f"keras.distribution is set to a {type(distribution).__name__}, "
            "which Keras does not heed on TensorFlow: it splits nothing, neither "
            "variables nor batches. A TowerModel goes by its placement alone. "
            "For what a LayoutMap says, write Placement.from_layout_map(model, "
            "layout_map); keras.distribution.set_distribution(None) ends this.",
            stacklevel=3,
        )
