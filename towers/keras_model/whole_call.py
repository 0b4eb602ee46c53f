"""whole_call: a model called as plain Keras calls it, on specs of a whole batch.

Nothing is run. It tells what the model makes of other rows than a tower's, and
what Keras says of inputs that it does not take: of the shape that was given.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from towers.foreign import specs
from towers.foreign.keras_layers import all_layers
from towers.keras_model import checks
from towers.keras_model.attributes import as_before
from towers.keras_model.request import Request
from towers.verbs.batch import Batch

# Where an error may have a tower's name, though it is none of ours.
_NAMES = re.compile(r"tower_\d+|File \"[^\"]*\"|\{\{node .*?\}\}")


@contextlib.contextmanager
def speaks_of_all(model: Any, batch: Batch, request: Request) -> Iterator[None]:
    """While open, Keras speaks of the shape that was given, not of a shard's.

    Args:
      model: what each tower calls; or what its user's function gets.
      batch: what the towers share.
      request: tells the phase, and the call if there is more to it.
    """
    if request.users_fn is not None or batch.each is not None:
        yield
        return
    call = WholeCall(model, batch.nest, request.training, request.tower_fn)
    with call.refused_as_given():
        yield


class Asking(keras.StatelessScope):
    """The scope of a call that is no step's, but only asks a layer."""


@dataclasses.dataclass(frozen=True)
class WholeCall:
    """A call of a model with the whole batch.

    Attributes:
      model: a model, or a layer that is called by itself.
      inputs: the batch that was given.
      training: the phase.
      call: how the model is called, if there is more to it.
    """

    model: keras.Layer
    inputs: Any
    training: bool | None
    call: Callable[..., Any] | None = None

    def answers(self, inputs: Any, tell: Callable[[Any], Any]) -> list[Any]:
        """What `tell` says of each flat output of the model, called once more.

        Unlike `compute_output_spec` this calls it as towers do: with the phase,
        and with the casts of mixed precision.

        Args:
          inputs: a nest like the model's, of specs, and None for None.
          tell: of a tensor in the graph of the call.
        """
        return checks.eagerly(lambda: self._traced(inputs, tell))

    @contextlib.contextmanager
    def refused_as_given(self) -> Iterator[None]:
        """While open, what Keras refuses in a tower it refuses of the batch.

        Raises:
          Exception: what the model raises, of the shape of a batch and not of a
            shard.
        """
        try:
            yield
        except Exception as error:
            if "tower" not in _NAMES.sub("", str(error)).lower():
                self._raise_again(error)
            raise

    def _raise_again(self, error: Exception) -> None:
        """Raises an error as the plain model has it, if that has it too."""
        inputs = tf.nest.map_structure(specs.of, self.inputs)
        try:
            with checks.row_alone(self.model, inputs):
                self.answers(inputs, lambda _: None)
        except type(error) as plain:
            raise plain from None
        except Exception:  # as it cannot be called so
            return

    def _traced(self, inputs: Any, tell: Callable[[Any], Any]) -> list[Any]:
        answers: list[Any] = []
        flat = tf.nest.flatten(inputs)

        def call(*leaves: Any) -> None:
            each = iter(leaves)
            nest = tf.nest.pack_sequence_as(
                inputs, [None if s is None else next(each) for s in flat]
            )
            named = {} if self.training is None else {"training": self.training}
            with Asking():
                if self.call is not None:
                    outputs = self.call(self.model, nest)
                else:
                    outputs = self.model(nest, **named)
            answers[:] = [
                None if y is None else tell(tf.convert_to_tensor(y))
                for y in tf.nest.flatten(outputs)
            ]

        with as_before(all_layers(self.model)):
            tf.function(call, autograph=False).get_concrete_function(
                *[spec for spec in flat if spec is not None]
            )
        return answers
