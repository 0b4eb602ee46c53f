"""draws: what a tower draws are rows of the whole draw, bit for bit."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

from towers.engine import draws
from towers.foreign import tf_random

SEED = [123456, 7]
INTEGERS = (tf.int32, tf.int64, tf.uint32, tf.uint64)
FLOATS = (tf.float16, tf.bfloat16, tf.float32, tf.float64)


def of_numbers(function, dtypes, **options):
    """By dtype, what a function draws of a shape."""
    name = getattr(function, "__name__", "")
    return {
        f"{name} {dtype.name} {options}": functools.partial(
            function, seed=SEED, dtype=dtype, **options
        )
        for dtype in dtypes
    }


# What draws of a shape, by a name.
DRAWS = {
    **of_numbers(tf.random.stateless_uniform, FLOATS),
    **of_numbers(tf.random.stateless_normal, FLOATS),
    **of_numbers(tf.random.stateless_truncated_normal, FLOATS),
    **of_numbers(
        tf.random.stateless_gamma,
        [x for x in FLOATS if x != tf.bfloat16],  # TensorFlow has none
        alpha=2.0,
    ),
    **of_numbers(
        tf.random.stateless_uniform, INTEGERS[:2], minval=-7, maxval=1000
    ),
    **of_numbers(
        tf.random.stateless_uniform, INTEGERS, minval=None, maxval=None
    ),
}


def parts(rows):
    """(first row, rows) of what a tower may have of so many."""
    third = max(rows // 3, 1)
    return sorted(
        {(0, rows), (0, third), (third, rows - third), (1, 2), (rows - 1, 1)}
    )


def rows_of(where, axis, is_compiled):
    """What a stateless function draws for a tower, as `tf_random` asks."""

    def drawn(name, by, original, given):
        def make(shape, counter, parameters):
            changed = {"shape": shape, "counter": counter, **parameters}
            return original(**{**given, **changed})

        asked = draws.Draw(
            *(make, tf_random.shape_of(given), tf_random.sizes(given)),
            given["counter"],
            *(axis, 1, where, tf_random.parameters(given)),
        )
        layout = draws.Layout(*tf_random.counted(name, given, is_compiled))
        if draws.can_count(asked, layout):
            return draws.rows_by_counter(asked, layout)
        return draws.rows_of_whole(asked)

    return drawn


def of_towers(kinds, shape, axis, is_open, is_compiled):
    """By name, of each tower of `parts` its rows, which stand in `axis`."""
    total, places = shape[axis], parts(shape[axis])
    specs = [tf.TensorSpec([None if is_open else n, 0]) for _, n in places]
    numbers = [tf.TensorSpec([3], tf.int64)] * len(places)

    @tf.function(
        input_signature=[specs, numbers],
        jit_compile=is_compiled,
        autograph=False,
    )
    def call(xs, numbers):
        results = {name: [] for name in kinds}
        for (_, n), x, place in zip(places, xs, numbers):
            rows = tf.shape(x)[0] if is_open else n
            here = [*shape[:axis], rows, *shape[axis + 1 :]]
            where = draws.place_of(place)
            with tf_random.asks(None, rows_of(where, axis, is_compiled)):
                for name, each in results.items():
                    each.append(DRAWS[name](here))
        return results

    return call(
        [tf.zeros([n, 0]) for _, n in places],
        [tf.constant([start, total, 1], tf.int64) for start, _ in places],
    )


class RowsTest(parameterized.TestCase):
    def check(self, shape, kinds, is_open, is_compiled=False, axis=0):
        @tf.function(jit_compile=is_compiled, autograph=False)
        def whole():
            return {name: DRAWS[name](shape) for name in kinds}

        plain = whole()
        towers = of_towers(kinds, shape, axis, is_open, is_compiled)
        for name in kinds:
            exact = not (is_compiled and plain[name].dtype.is_floating)
            for (start, n), here in zip(parts(shape[axis]), towers[name]):
                there = plain[name].numpy().take(range(start, start + n), axis)
                words = f"{name} {shape} {start} {n}"
                if exact:
                    np.testing.assert_array_equal(here, there, words)
                else:  # XLA's loops may round otherwise, in the last place
                    dtype = tf.as_dtype(there.dtype)
                    bits = {2: 8, 4: 22, 8: 51}[dtype.size]
                    np.testing.assert_allclose(
                        *(tf.cast(x, tf.float64) for x in (here, there)),
                        rtol=2.0 ** (1 - bits),
                        err_msg=words,
                    )

    # A row has of_row % 4 of 0, 1, 2 and 3 numbers.
    @parameterized.product(
        shape=([9, 3], [12, 4], [10, 3, 2], [7], [33, 1, 1, 1], [9, 5]),
        is_open=(True, False),
    )
    @pytest.mark.rare(after=1)
    def test_all_dtypes_of_all_functions(self, shape, is_open):
        self.check(shape, DRAWS, is_open)

    @pytest.mark.rare
    def test_what_several_threads_draw(self):
        self.check([2000, 130], DRAWS, False)

    @parameterized.product(
        shape=([11, 4], [12, 6], [7], [8], [9, 5], [11, 2, 3], [16, 3]),
        is_open=(True, False),
    )
    @pytest.mark.rare
    def test_xla_s_numbers_are_xla_s(self, shape, is_open):
        kinds = [x for x in DRAWS if "gamma" not in x]  # of which it has none
        self.check(shape, kinds, is_open, is_compiled=True)

    @parameterized.parameters(True, False)
    @pytest.mark.rare(after=1)
    def test_rows_may_be_in_another_axis(self, is_open):
        self.check([3, 7, 2], DRAWS, is_open, axis=1)
