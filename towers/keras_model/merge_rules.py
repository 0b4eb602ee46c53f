"""merge_rules: how towers' values of a layer's state, or losses, become one."""

from typing import Any

import keras
import tensorflow as tf

from towers.foreign.keras_layers import is_seed

STATE_RULES = ("sum", "max", "min", "mean", "last")
# Rules of losses, beside those that a layer may declare. What is there once for
# each row and divided by their number; the sum, or the mean, of what has rows
# in another axis than the first; and what nobody can tell.
SHARES, SUMMED, AVERAGED = "shares", "summed", "averaged"
UNKNOWN = "unknown"
# The mean by rows of the shards' losses that are finite: of no rows that count,
# a mean is 0 / 0.
FINITE = "finite"

# Attributes of a Keras variable, which goes on being the same object wherever
# its value is moved, and takes them along into its copies.
_RULE = "_towers_merge_rule"
_WARNED = "_towers_has_warned"


def merge_state_by(variable: keras.Variable, rule: str) -> None:
    """Declares how towers merge a variable that a layer assigns in its `call`.

    Each tower starts from the variable's value and assigns what its own rows
    make of it; the rule says what is kept. Towers without rows say nothing.
    The rule stays with the variable. Declared where a layer makes its
    variables, it is there in each copy, clone and loaded model:

    >>> class Counted(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.seen = self.add_weight(
    ...             name="seen", dtype="int32", initializer="zeros",
    ...             trainable=False)
    ...         towers.merge_state_by(self.seen, "sum")
    ...     def call(self, x):
    ...         self.seen.assign_add(keras.ops.shape(x)[0])
    ...         return x
    >>> model = keras.Sequential([keras.Input([3]), Counted()])
    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"])
    >>> _ = towers.TowerModel(model, placement)(np.ones([5, 3]))
    >>> int(model.layers[0].seen)
    5

    What does not depend on a tower's rows, such as a count of calls or what
    is made of weights only, is the same in all towers, and is assigned once
    whatever the rule. What depends on them and has no rule warns once: floats
    are then means by rows, and others what the last tower with rows says. The
    statistics of a `BatchNormalization`, seeds, and states of a stateful RNN
    have rules of their own. What is added to a metric merges as the graph
    tells that made it, a sum over rows or a mean, unless told otherwise. What
    needs the rows of the whole batch at once, `all_towers` computes.

    Args:
      variable: a `keras.Variable` of any shape: a weight of a layer.
      rule: "sum" adds what each tower added to the value before; "max" and
        "min" are taken element by element; "mean" is weighted by the towers'
        rows; "last" is the value of the last tower with rows.

    Raises:
      TypeError: `variable` is no `keras.Variable`.
      ValueError: the rule is unknown, or the variable's dtype has no such
        thing; or the variable is the state of a seed generator.
    """
    if not isinstance(variable, keras.Variable):
        raise TypeError(
            "`variable` of merge_state_by must be a keras.Variable, such as "
            f"a layer's `add_weight` returns; got {type(variable).__name__}."
        )
    _check_rule(rule, repr(variable.path))
    fit = _rules_of(tf.as_dtype(variable.dtype))
    if rule not in fit:
        raise ValueError(
            f"`rule` for {variable.path!r} is {rule!r}, but that is of dtype "
            f"{variable.dtype}. Expected one of {', '.join(map(repr, fit))}; "
            "or give the variable another dtype."
        )
    if is_seed(variable):
        raise ValueError(
            f"`variable` is {variable.path!r}, the state of a seed generator. "
            "Each tower draws its rows of what the model draws, and the state "
            "moves on once. Leave the rule out."
        )
    object.__setattr__(variable, _RULE, rule)


def merge_losses_by(layer: keras.Layer, rule: str) -> None:
    """Declares how towers merge the losses that a layer adds in its `call`.

    What is a sum or a mean over rows, has a value for each row, or is made of
    weights only, needs no rule: the graph that made it tells. Of a maximum, a
    product of means or a mean of what a mask leaves, towers cannot know what
    their shards' become together, and warn. The rule is for all losses that the
    layer adds itself, but for those that are the same in all towers. Declared
    where the layer is made, it is there in each copy, clone and loaded model:

    >>> class Peak(keras.layers.Layer):
    ...     def __init__(self, **kwargs):
    ...         super().__init__(**kwargs)
    ...         towers.merge_losses_by(self, "max")
    ...     def call(self, x):
    ...         self.add_loss(keras.ops.max(x))
    ...         return x
    >>> model = keras.Sequential([keras.Input([1]), Peak()])
    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"])
    >>> x = tf.constant([[4.0], [1.0], [2.0]])
    >>> float(towers.build_towers(model, x, placement).losses[0])
    4.0

    Args:
      layer: a `keras.Layer`, which may be a model.
      rule: "sum" adds what the towers say; "max" and "min" take one of them;
        "mean" is weighted by the towers' rows, and leaves out what is no finite
        number; "last" is that of the last tower with rows.

    Raises:
      TypeError: `layer` is no `keras.Layer`.
      ValueError: the rule is unknown.
    """
    if not isinstance(layer, keras.Layer):
        raise TypeError(
            "`layer` of merge_losses_by must be a keras.Layer that calls "
            f"`add_loss`; got {type(layer).__name__}."
        )
    _check_rule(rule, f"the losses of {layer.name!r}")
    object.__setattr__(layer, _RULE, rule)


def _check_rule(rule: Any, what: str) -> None:
    if not isinstance(rule, str) or rule not in STATE_RULES:
        raise ValueError(
            f"`rule` for {what} is {rule!r}. Expected one of "
            f"{', '.join(map(repr, STATE_RULES))}."
        )


def declared(variable: Any) -> str | None:
    """The rule that was declared for a variable, or a layer's losses."""
    return getattr(variable, _RULE, None)


def usual(dtype: tf.DType) -> str:
    """The rule of a variable for which none was declared."""
    return "mean" if dtype.is_floating else "last"


def first_warning(variable: Any) -> bool:
    """Whether nothing has been said of this; it is from now on."""
    warned = getattr(variable, _WARNED, False)
    object.__setattr__(variable, _WARNED, True)
    return not warned


def _rules_of(dtype: tf.DType) -> tuple[str, ...]:
    if dtype.is_floating:
        return STATE_RULES
    if dtype.is_integer:
        return "sum", "max", "min", "last"
    if dtype.is_bool:
        return "max", "min", "last"
    return ("sum", "mean", "last") if dtype.is_complex else ("last",)
