"""session_values: values copied between a Keras model and a tf.compat.v1 graph."""

from collections.abc import Sequence
from typing import Any

from towers.foreign import keras_layers
from towers.keras_model import checks


def copy_to_model(pairs: Sequence[tuple[Any, Any]], session: Any) -> None:
    """Sets each Keras variable to its twin's value in `session`."""
    values = _run(session, [twin for _, twin in pairs])

    def assign() -> None:
        for (original, _), value in zip(pairs, values):
            keras_layers.raw(original).assign(value)

    checks.eagerly(assign)


def copy_from_model(pairs: Sequence[tuple[Any, Any]], session: Any) -> None:
    """Sets each twin in `session` to its Keras variable's value.

    Adds no op, so it works in a finalized graph.
    """
    originals = [keras_layers.raw(original) for original, _ in pairs]
    values = checks.eagerly(lambda: [v.numpy() for v in originals])
    initializers = [twin.initializer for _, twin in pairs]
    feed = {op.inputs[1]: value for op, value in zip(initializers, values)}
    _run(session, initializers, feed)


def _run(session: Any, fetches: Any, feed: Any = None) -> Any:
    """`session.run`, past the hooks of a MonitoredSession, which count steps."""
    if hasattr(session, "run_step_fn"):
        return session.run_step_fn(
            lambda step_context: step_context.session.run(fetches, feed)
        )
    return session.run(fetches, feed)
