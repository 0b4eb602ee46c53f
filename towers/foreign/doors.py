"""doors: what is said where a private name is not there that a feature needs."""

import contextlib
import traceback
from collections.abc import Iterator

import keras
import tensorflow as tf

# The oldest and the newest that the tests have run with.
TESTED = {"TensorFlow": ("2.16.1", "2.21.0"), "Keras": ("3.7.0", "3.15.1")}


@contextlib.contextmanager
def opened(feature: str) -> Iterator[None]:
    """While open, what a feature needs is imported.

    Args:
      feature: what a user knows it by.

    Raises:
      ImportError: something of it is not there, as a private name that has moved;
        says which, in what versions it was there, and which these are.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        if isinstance(error, AttributeError) and not _is_at_a_door(error):
            raise
        here = {"TensorFlow": tf.__version__, "Keras": keras.__version__}
        tested = [f"{x} {old} to {new}" for x, (old, new) in TESTED.items()]
        versions = [f"{x} {version}" for x, version in here.items()]
        raise ImportError(
            f"{feature} needs what could not be imported: {error}. Expected "
            f"{' and '.join(tested)}, with which it was tested; got "
            f"{' and '.join(versions)}. Install versions from there."
        ) from error


def _is_at_a_door(error: BaseException) -> bool:
    """Whether an error was raised by the import of a module of this folder."""
    frames = traceback.walk_tb(error.__traceback__)
    names = {frame.f_globals.get("__name__", "") for frame, _ in frames}
    folder = __name__.rpartition(".")[0]
    return any(name.startswith(f"{folder}.") for name in names - {__name__})
