"""jit_choice: whether each tower is an XLA program, by what `compile` was told.

Never the step itself: that is on several devices, and XLA would run it on one.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from towers.keras_model import checks, layer_graph
from towers.placement.placement import Placement

# Where `keras.Model.compile` has them among its arguments.
_RUN_EAGERLY, _JIT_COMPILE = 5, 7


def jit_of_compile(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], own: bool
) -> tuple[bool | str, tuple[Any, ...], dict[str, Any]]:
    """Whether towers are to be XLA programs, and what is left for the step.

    Args:
      name: the model's.
      args, kwargs: what `compile` was called with.
      own: whether that is the template's own, of whose positions nothing is
        known.

    Returns:
      True, False or "auto", and (args, kwargs) without it.
    """
    keras_s = () if own else args
    eagerly = kwargs.get(
        "run_eagerly", keras_s[_RUN_EAGERLY : _RUN_EAGERLY + 1] == (True,)
    )
    by_position = [*keras_s[_JIT_COMPILE : _JIT_COMPILE + 1], "auto"][0]
    jit = kwargs.get("jit_compile", by_position)
    if jit == "auto" and tf.config.list_physical_devices("GPU"):
        logging.info(
            "Towers of %r run without XLA, which Keras turns on by itself on "
            "GPUs: nobody has measured yet that it helps them. Say "
            "compile(jit_compile=True) to try.",
            name,
        )
    rest = dict(kwargs)
    if jit is True:
        if keras_s[_JIT_COMPILE:]:
            args = (*args[:_JIT_COMPILE], False, *args[_JIT_COMPILE + 1 :])
        else:
            rest["jit_compile"] = False
    return jit if not eagerly else False, args, rest


def jit_of_template(template: keras.Model) -> bool:
    """Whether a compiled template asked for XLA; warns if that cannot be told."""
    by_auto = bool(tf.config.list_physical_devices("GPU"))
    if template.jit_compile and by_auto:
        warnings.warn(
            f"The template {template.name!r} was compiled to use XLA, by "
            'jit_compile=True or, on a machine with GPUs, by "auto". '
            "Keras does not tell which, so this model trains without. "
            "Compile it with jit_compile=True for an XLA program per "
            "tower, or the template with False.",
            stacklevel=4,  # who made the TowerModel, past its decorator
        )
    return template.jit_compile and not by_auto


def checked_jit(model: Any, jit: bool) -> bool:
    """Whether each tower is to be an XLA program.

    Args:
      model: a `TowerModel`.
      jit: whether that is asked for.

    Raises:
      ValueError: XLA cannot compile each by itself; names the layer.
    """
    if jit:
        where: Placement = model.placement
        meet = model.synchronized and len(where.devices) > 1
        pins = where.layer_devices
        checks.check_compilable(
            layer_graph.LayerGraph(model.template, (), pins, synchronized=meet)
        )
    return jit
