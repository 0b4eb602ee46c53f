"""tf_random: what all of TensorFlow's random functions come to.

Those with a state ask the private `random_seed.get_seed` for the seeds of their op.
`tf.random.stateless_*`, `tf.nn.experimental.stateless_dropout` and with them all of
`keras.random` call the generated functions of `gen_stateless_random_ops_v2` (with
a key and a counter) and `gen_stateless_random_ops` (with a seed), by these names
in the module `stateless_random_ops`. How much of a shape is known, the public
`tf.get_static_value` does not say of one that `tf.shape` gives; the private
`tensor_util.constant_value_as_shape` does. `tf_random_test.py` fails when one of
them changes.
"""

import contextlib
import inspect
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import random_seed, tensor_util
from tensorflow.python.ops import stateless_random_ops

from towers.foreign.patches import CountedPatches

Function = Callable[..., Any]

_V2, _V1 = "gen_stateless_random_ops_v2", "gen_stateless_random_ops"
# Of a module, the functions that draw; of each, by what it is seeded.
_STATELESS = {
    _V2: {
        "stateless_random_uniform_v2": "key",
        "stateless_random_normal_v2": "key",
        "stateless_truncated_normal_v2": "key",
        "stateless_random_uniform_int_v2": "key",
        "stateless_random_uniform_full_int_v2": "key",
        "stateless_random_gamma_v3": "key",
        "stateless_shuffle": "key",
    },
    _V1: {
        "stateless_multinomial": "seed",
        "stateless_parameterized_truncated_normal": "seed",
        "stateless_random_binomial": "seed",
        "stateless_random_gamma_v2": "seed",
        "stateless_random_poisson": "seed",
    },
}
# How those with a counter count: so many numbers of up to 32 bits come from so many
# blocks. A truncated normal reserves for each number what it may reject.
_COUNTED = {
    "stateless_random_uniform_v2": (4, 1),
    "stateless_random_normal_v2": (4, 1),
    "stateless_random_uniform_int_v2": (4, 1),
    "stateless_random_uniform_full_int_v2": (4, 1),
    "stateless_truncated_normal_v2": (4, 256),
    "stateless_random_gamma_v3": (1, 256),
}
_PHILOX = (1, 3)  # what counts so; 3 chooses it
# Of others, those whose rows are the same whatever is drawn for other rows.
_BY_ROW = (
    "stateless_multinomial",
    "stateless_random_binomial",
    "stateless_random_gamma_v2",
    "stateless_random_poisson",
)
_PARAMETERS = ("alpha", "counts", "lam", "logits", "probs")
MOST = 2**31 - 1  # seeds of an op are taken modulo this


def asks(seeds: Function, drawn: Function) -> Any:
    """While open, who draws asks first.

    It may be open several times, in several threads: there is one for all.

    Args:
      seeds: `f(get_seed, op_seed)` to the two seeds of an op with a state.
      drawn: `f(name, by, original, arguments)` to what a stateless function of
        that name draws, which is seeded by the argument `by`.
    """
    return _ASKING.opened(seeds, drawn)


class _Instead(types.ModuleType):
    """A module with some functions in the place of its own."""

    def __init__(self, module: types.ModuleType, functions: dict[str, Any]):
        super().__init__(module.__name__)
        self._module = module
        vars(self).update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _patches(seeds: Function, drawn: Function) -> list[tuple[Any, str, Any]]:
    get_seed = random_seed.get_seed

    def instead(name: str, by: str, original: Function) -> Function:
        signature = inspect.signature(original)

        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs).arguments
            return drawn(name, by, original, dict(arguments))

        return call

    modules = {}
    for owner, names in _STATELESS.items():
        module = getattr(stateless_random_ops, owner)
        functions = {
            name: instead(name, by, getattr(module, name))
            for name, by in names.items()
            if hasattr(module, name)  # older TensorFlow lacks some
        }
        modules[owner] = _Instead(module, functions)
    return [
        (random_seed, "get_seed", lambda op_seed: seeds(get_seed, op_seed)),
        *((stateless_random_ops, name, x) for name, x in modules.items()),
    ]


_ASKING = CountedPatches(_patches)


def is_by_row(name: str) -> bool:
    """Whether rows of a stateless function do not depend on other rows."""
    return name in _COUNTED or name in _BY_ROW


def parameters(arguments: dict[str, Any]) -> dict[str, tf.Tensor]:
    """What a stateless function draws by, of its arguments."""
    return {
        name: tf.convert_to_tensor(x)
        for name, x in arguments.items()
        if name in _PARAMETERS
    }


def shape_of(arguments: dict[str, Any]) -> tf.Tensor:
    """Of what a stateless function draws, int32 or int64 [rank]."""
    if "shape" in arguments:
        return tf.convert_to_tensor(arguments["shape"])
    rows = arguments["logits"].shape[0]
    if rows is None:
        rows = tf.shape(arguments["logits"])[0]
    return tf.stack([rows, tf.cast(arguments["num_samples"], tf.int32)])


def sizes(arguments: dict[str, Any]) -> list[int | None] | None:
    """As much of that shape as is known; None if not even its rank is."""
    if "shape" not in arguments and "logits" not in arguments:
        return None  # as of what is shuffled
    shape = tensor_util.constant_value_as_shape(shape_of(arguments))
    return None if shape.rank is None else shape.as_list()


def counted(
    name: str, arguments: dict[str, Any], is_compiled: bool
) -> tuple[int, int, bool] | None:
    """How a stateless function counts; None if not by its shape alone.

    Args:
      name: the function's.
      arguments: its own, by name.
      is_compiled: whether XLA makes the numbers. It makes a truncated normal of
        one uniform number, and two normal ones of two at a time.

    Returns:
      How many numbers come from a group of blocks, how many blocks that is, and
      whether they come in pairs.
    """
    if name not in _COUNTED:
        return None
    algorithm = tf.get_static_value(tf.convert_to_tensor(arguments["alg"]))
    if algorithm not in _PHILOX:
        return None
    elements, blocks = _COUNTED[name]
    if name == "stateless_random_gamma_v3":
        rank = tf.convert_to_tensor(arguments["shape"]).shape[0]
        of_all = arguments["alpha"].shape.rank in (0, rank)
        return (elements, blocks, False) if of_all else None
    like = arguments.get("minval")
    dtype = tf.as_dtype(
        arguments.get("dtype") or getattr(like, "dtype", "float32")
    )
    if is_compiled:
        blocks = 1
    if dtype.size == 8:
        elements, blocks = elements // 2, max(blocks // 2, 1)
    in_pairs = is_compiled and name == "stateless_random_normal_v2"
    return elements, blocks, in_pairs


@contextlib.contextmanager
def nothing_drawn() -> Iterator[None]:
    """While open, what Python's and NumPy's generators draw is taken back."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
