"""rules: which layers can be cut, along which axes, and which cannot.

What each layer of Keras computes is a sum over some axes of its kernel for each
place in others. Along the others it is cut column-wise, along the first row-wise.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from towers.foreign import keras_cut
from towers.foreign.keras_axes import einsum_letters, kernel_axes
from towers.foreign.keras_layers import all_layers, is_keras_own
from towers.keras_model.pieces.activations import is_by_element
from towers.placement.pieces import COLUMN_WISE, Pieces

L = keras.layers
CONVOLUTIONS = (L.Conv1D, L.Conv2D, L.Conv3D)
TRANSPOSED = (L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose)
CUTTABLE = (
    *(L.Dense, L.EinsumDense, L.Embedding, L.MultiHeadAttention),
    *CONVOLUTIONS,
    *TRANSPOSED,
)
# Of what a class says of itself, what changes nothing of what it computes.
_HARMLESS = {"__init__", "get_config", "from_config"}
_ADDITIVE = (
    *(keras.regularizers.L1, keras.regularizers.L2),
    keras.regularizers.L1L2,
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a layer with one kernel is cut.

    Attributes:
      kernel: the attribute that holds it.
      kernel_axis: where that is cut.
      axis: where outputs are, column-wise, or inputs, row-wise.
      bias_axis: where the bias is cut; None if it is not.
      count: the attribute that says how many outputs there are, if one does.
    """

    kernel: str
    kernel_axis: int
    axis: int
    bias_axis: int | None = None
    count: str | None = None


@dataclasses.dataclass(frozen=True)
class Weight:
    """A variable that is cut.

    Attributes:
      owner: the layer that has it.
      attribute: which holds it, or what stands for it.
      axis: along which it is cut, from 0.
    """

    owner: Any
    attribute: str
    axis: int

    @property
    def value(self) -> Any:
        return vars(self.owner)[self.attribute]

    @property
    def key(self) -> tuple[int, str]:
        return id(self.owner), self.attribute


def rule_of(layer: Any, by: str) -> Rule | None:
    """How a layer is cut; None if that kind of layer, or its equation, cannot be."""
    columns = by == COLUMN_WISE
    axis = kernel_axes(layer)[0 if columns else 1]
    if axis is None:
        return None
    if isinstance(layer, L.Embedding):
        if columns:
            return Rule(keras_cut.EMBEDDINGS, axis, -1)
        return Rule(keras_cut.EMBEDDINGS, axis, 0)
    kernel = keras_cut.kernel_of(layer)
    if isinstance(layer, L.EinsumDense):
        return _einsum_rule(layer, columns, kernel, axis)
    last = getattr(layer, "data_format", "channels_last") == "channels_last"
    if not columns:
        return Rule(kernel, axis, -1 if last else 1)
    count = "units" if isinstance(layer, L.Dense) else "filters"
    return Rule(kernel, axis, -1 if last else 1, 0, count)


def _einsum_rule(layer: Any, columns: bool, kernel: str, axis: int) -> Rule:
    letter, _, here = einsum_letters(layer, columns)
    from_front = layer.equation.replace(" ", "").split(",")[0].endswith("...")
    place = here.index(letter) - (0 if from_front else len(here))
    bias_axis = None
    if columns and layer.bias_axes and letter in layer.bias_axes:
        # As Keras shapes it: from the first of its letters on.
        first = min(map(here.find, layer.bias_axes))
        bias_axis = here[first:].index(letter)
    return Rule(kernel, axis, place, bias_axis)


def weights_of(layer: Any, by: str) -> list[Weight]:
    """What of a built layer is cut."""
    if isinstance(layer, L.MultiHeadAttention):
        weights = []
        for name in keras_cut.projections(layer):
            inner = vars(layer)[name]
            weights.append(Weight(inner, keras_cut.kernel_of(inner), 1))
            if inner.bias is not None:
                weights.append(Weight(inner, keras_cut.BIAS, 0))
        outer = vars(layer)[keras_cut.OUTPUT]
        return [*weights, Weight(outer, keras_cut.kernel_of(outer), 0)]
    rule = rule_of(layer, by)
    if rule is None:
        return []
    weights = [Weight(layer, rule.kernel, rule.kernel_axis)]
    if rule.bias_axis is not None and layer.bias is not None:
        weights.append(Weight(layer, keras_cut.BIAS, rule.bias_axis))
    return weights


def sizes_of(n: int, k: int) -> tuple[int, ...]:
    """`n` in `k` pieces, the first of which may be larger by one."""
    return tuple(n // k + (i < n % k) for i in range(k))


def check(layer: Any, path: str, pin: Pieces) -> None:
    """Raises unless a layer of one of `CUTTABLE` can be cut so.

    Args:
      layer: it, built.
      path: its.
      pin: how.

    Raises:
      ValueError: it cannot.
    """
    for why in objections(layer, pin):
        raise refusal(path, pin, why)


def objections(layer: Any, pin: Pieces) -> Iterator[str]:
    """Why a layer of one of `CUTTABLE` cannot be cut so, built or not."""
    kind = next(kind for kind in CUTTABLE if isinstance(layer, kind))
    own = [
        name
        for parent in type(layer).__mro__[: type(layer).__mro__.index(kind)]
        for name, value in vars(parent).items()
        if name not in _HARMLESS and _is_computing(value)
    ]
    if own:
        yield f"is a {type(layer).__name__}, which has a `{own[0]}` of its own"
    if getattr(layer, "lora_enabled", False):
        yield "has LoRA enabled"
    if getattr(layer, "quantization_mode", None):
        yield f"is quantized ({layer.quantization_mode})"
    if getattr(layer, "groups", 1) != 1:
        yield f"has {layer.groups} groups"
    if keras_cut.is_remade(layer):
        yield "is computed again in the backward pass (remat)"
    if isinstance(layer, L.MultiHeadAttention):
        yield from _of_heads(layer, pin)
    elif rule_of(layer, pin.by) is None:
        yield f"has no axis for that in its equation, {layer.equation!r}"
    if layer.built:
        for weight in weights_of(layer, pin.by):
            yield from _of_weight(weight, len(pin))


def _is_computing(value: Any) -> bool:
    return callable(value) or isinstance(value, (property, classmethod))


def _of_heads(layer: Any, pin: Pieces) -> Iterator[str]:
    if pin.by != COLUMN_WISE:
        yield "is cut by heads, which is column-wise"
    inner = [vars(layer).get(x) for x in keras_cut.projections(layer)]
    if any(getattr(x, "activity_regularizer", None) for x in [layer, *inner]):
        yield "has an activity regularizer, which looks at all heads"


def _of_weight(weight: Weight, pieces: int) -> Iterator[str]:
    value, axis = weight.value, weight.axis
    if value.shape[axis] < pieces:
        yield (
            f"has {value.shape[axis]} along axis {axis} of "
            f"{value.path!r}, fewer than {pieces} pieces"
        )
    rule = value.constraint
    axes = getattr(rule, "axis", None)
    if rule is not None and not isinstance(rule, keras.constraints.NonNeg):
        axes = [axes] if isinstance(axes, int) else axes
        if (
            not is_keras_own(type(rule))
            or axes is None
            or axis in [a % len(value.shape) for a in axes]
        ):
            yield (
                f"has the constraint {type(rule).__name__} on {value.path!r}, "
                f"which looks along axis {axis}, where that is cut"
            )
    kind = value.regularizer
    if kind is not None and type(kind) not in _ADDITIVE:
        yield (
            f"has the regularizer {getattr(kind, '__name__', type(kind).__name__)} "
            f"on {value.path!r}, which is no sum over pieces"
        )


def refusal(
    path: str, pin: Pieces, why: str, asks: str = "`layer_devices` asks"
) -> ValueError:
    """The error for a layer that cannot be cut; and what asks for that."""
    return ValueError(
        f"{asks} for {path!r} in pieces, {pin!r}, but it {why}. "
        "Expected Dense, EinsumDense, Embedding, MultiHeadAttention or a "
        "convolution, as Keras has them; give this one a device, or narrow the "
        "pattern."
    )


def cut_layers(
    paths: Sequence[tuple[str, Any]], pinned: Sequence[tuple[Any, Any]]
) -> dict[int, Any]:
    """By a layer's id where its pieces are, for all towers or for each.

    Args:
      paths: of all layers, by their paths.
      pinned: layers and where they run, those that hold others first.

    Raises:
      ValueError: one that is to be cut cannot be; names it by its path.
    """
    names = {id(layer): path for path, layer in reversed(paths)}
    cut: dict[int, Any] = {}
    inside: dict[int, tuple[str, Any]] = {}  # of attention: its path and pin
    for layer, pin in pinned:
        path, first = names[id(layer)], _first(pin)
        if id(layer) in inside:
            holder, other = inside[id(layer)]
            if pin != other:
                raise refusal(
                    holder, _first(other), f"holds {path!r}, which is elsewhere"
                )
            continue
        if not isinstance(first, Pieces):
            continue
        if isinstance(layer, CUTTABLE):
            check(layer, path, first)
            cut[id(layer)] = pin
            if isinstance(layer, L.MultiHeadAttention):
                for below in held_by(layer):
                    inside[id(below)] = path, pin
        else:
            _check_other(layer, path, first)
    _check_holders(paths, cut, pinned)
    return cut


def _first(pin: Any) -> Any:
    return pin[0] if isinstance(pin, tuple) else pin


def held_by(layer: Any) -> list[Any]:
    """The layers inside of a layer, at any depth."""
    return [x for x in all_layers(layer) if x is not layer]


def _check_other(layer: Any, path: str, pin: Pieces) -> None:
    """Raises if a layer of another kind has something to be cut."""
    if not isinstance(layer, keras.Layer) or is_by_element(layer):
        return
    if isinstance(layer, L.RNN):
        raise refusal(path, pin, "is recurrent")
    below = {id(v) for x in held_by(layer) for v in x.weights}
    if any(id(v) not in below for v in layer.weights):
        kind = type(layer).__name__
        raise refusal(path, pin, f"is a {kind}, with variables of its own")


def _check_holders(
    paths: Sequence[tuple[str, Any]],
    cut: dict[int, Any],
    pinned: Sequence[tuple[Any, Any]],
) -> None:
    """Raises if a layer is cut that another calls in a loop, or row by row."""
    wheres = {id(layer): pin for layer, pin in pinned}
    for path, layer in paths:
        if isinstance(layer, (L.RNN, L.Wrapper)):
            for below in held_by(layer) if cut else ():
                if id(below) in cut:
                    kind = type(layer).__name__
                    why = f"holds {below.name!r}, which a {kind} calls its way"
                    raise refusal(path, _first(wheres[id(below)]), why)
