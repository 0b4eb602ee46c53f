"""keras_axes: which axis of a kernel is of a layer's outputs, and which of its inputs.

It is how Keras's layers multiply, which nothing tells in words. `keras_axes_test.py`
fails when it changes.
"""

from typing import Any

from keras import layers

_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_TRANSPOSED = (
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.Conv3DTranspose,
)


def kernel_axes(layer: Any) -> tuple[int | None, int | None]:
    """(of the outputs, of the inputs), from 0; None for one that there is not.

    Of an embedding outputs are the width, and inputs the rows of its table.
    """
    if isinstance(layer, (layers.Dense, layers.Embedding)):
        return 1, 0
    if isinstance(layer, _TRANSPOSED):  # [..., out, in]
        return layer.rank, layer.rank + 1
    if isinstance(layer, _CONVOLUTIONS):  # [..., in, out]
        return layer.rank + 1, layer.rank
    if isinstance(layer, layers.EinsumDense):
        return _einsum_axis(layer, True), _einsum_axis(layer, False)
    return None, None


def einsum_letters(layer: Any, of_outputs: bool) -> tuple[str, str, str]:
    """Which letter of an equation is cut, if one is, and where it stands.

    That is the first of the kernel's that only outputs have, or only inputs.

    Args:
      layer: an `EinsumDense`.
      of_outputs: or of inputs.

    Returns:
      The letter, or ""; those of the kernel; those of outputs, or of inputs.
    """
    inputs, rest = layer.equation.replace(" ", "").split(",")
    weights, outputs = rest.split("->")
    here, there = inputs.strip("."), outputs.strip(".")
    if of_outputs:
        here, there = there, here
    letters = [x for x in weights if x in here and x not in there]
    return "".join(letters[:1]), weights, here


def _einsum_axis(layer: Any, of_outputs: bool) -> int | None:
    letter, weights, _ = einsum_letters(layer, of_outputs)
    return weights.index(letter) if letter else None
