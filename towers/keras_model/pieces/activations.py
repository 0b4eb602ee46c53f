"""activations: what is computed number by number, and so in pieces as well."""

from typing import Any

import keras

_NAMES = """
    relu relu6 elu selu celu gelu silu mish tanh sigmoid hard_sigmoid hard_silu
    hard_tanh softplus softsign exponential leaky_relu linear log_sigmoid
    squareplus soft_shrink hard_shrink tanh_shrink threshold sparse_plus
    sparse_sigmoid
""".split()
# Those that the installed Keras has.
_BY_ELEMENT = [
    getattr(keras.activations, name)
    for name in _NAMES
    if hasattr(keras.activations, name)
]
_LAYERS = (
    *(keras.layers.Activation, keras.layers.ReLU, keras.layers.LeakyReLU),
    *(keras.layers.ELU, keras.layers.Identity),
)


def is_known(activation: Any) -> bool:
    """Whether an activation, or None, is one of Keras's that go by number."""
    return activation is None or any(activation is x for x in _BY_ELEMENT)


def is_by_element(layer: Any) -> bool:
    """Whether a layer without weights makes of each number one."""
    return type(layer) in _LAYERS and is_known(
        getattr(layer, "activation", None)
    )
