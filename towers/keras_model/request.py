"""request: what is asked of towers, besides the model and its inputs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

from towers.engine.calls import How
from towers.foreign import long_waits
from towers.keras_model import checks
from towers.keras_model.layer_graph import LayerGraph
from towers.keras_model.model_calls import ModelCall
from towers.placement.placement import Placement


@dataclasses.dataclass(frozen=True)
class Request:
    """What a builder of towers is asked for.

    Attributes:
      placement: where everything runs.
      training: the phase of calls that name none.
      merge: how outputs are gathered: a rule, or a nest of rules.
      tower_fn: what each tower computes, of the model and its shard: a call of
        the model, or the user's function.
      layer_outputs: paths of layers whose outputs are handed out.
      part_of: the model of which a layer is called by itself, in which
        `layer_devices` are known.
      how: whether towers are built op by op, or called as functions.
      synchronized: whether all batch norms that train take the statistics of
        the whole batch, whatever they say.
      hands_out: whether towers hand out their shards, and their copies of
        parameters.
    """

    placement: Placement
    training: bool | None
    merge: Any = "concat"
    tower_fn: Callable[..., Any] | None = None
    layer_outputs: Sequence[str] = ()
    part_of: Any = None
    how: How = How.BUILT
    synchronized: bool = False
    hands_out: bool = False

    @property
    def is_synchronized(self) -> bool:
        """Whether all batch norms are, and there are towers to meet."""
        return self.synchronized and len(self.placement.devices) > 1

    def graph_of(self, model: Any) -> LayerGraph:
        """The model as a pure function, which XLA can take if it is to; no op.

        Raises:
          ValueError: it cannot, or there is no such layer; names the layer.
        """
        devices, all_norms = self.placement.layer_devices, self.is_synchronized
        whole = self.part_of and LayerGraph(self.part_of, (), devices)
        graph = LayerGraph(
            *(model, self.layer_outputs, None if whole else devices),
            part_of=whole,
            synchronized=all_norms,
        )
        if graph.cuts.unready:
            graph.cuts.refuse()
        if self.how is How.COMPILED:
            checks.check_compilable(graph, self.training, self.users_fn)
        return graph

    def announced(self, model: Any) -> AbstractContextManager[None]:
        """While open, says that its towers are built, if that takes long."""
        names = [x.name for x in tf.nest.flatten(model) if hasattr(x, "name")]
        n = len(self.placement.devices)
        return long_waits.announced(
            f"building {n} towers of {', '.join(names)}"
        )

    def of_call(self, call: ModelCall) -> "Request":
        """The same of one call of the model, which says the phase."""
        return dataclasses.replace(self, tower_fn=call, training=call.training)

    def inputs_of(self, shard: Any) -> Any:
        """What a tower's model is called with first."""
        call = self.tower_fn
        return call.inputs(shard) if isinstance(call, ModelCall) else shard

    @property
    def is_split(self) -> bool:
        """Whether the model's rows are several towers'."""
        return self.users_fn is None and len(self.placement.devices) > 1

    @functools.cached_property
    def users_fn(self) -> Callable[..., Any] | None:
        """The `tower_fn`, if it is the user's."""
        is_call = isinstance(self.tower_fn, ModelCall)
        return None if is_call else self.tower_fn
