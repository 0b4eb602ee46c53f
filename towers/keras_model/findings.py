"""findings: what a look at a model found, kept for as long as the model lives."""

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from towers.foreign import keras_layers
from towers.keras_model.layer_graph import LayerGraph
from towers.keras_model.model_calls import ModelCall
from towers.keras_model.request import Request

Found = TypeVar("Found")


class Findings(Generic[Found]):
    """What looks found: by a model, or a function of the user's, and by the call."""

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[Any, dict[Any, Found]] = (
            weakref.WeakKeyDictionary()
        )

    def of(
        self,
        graph: LayerGraph,
        request: Request,
        call: Any,
        look: Callable[[], Found],
        anew: bool = False,
    ) -> Found:
        """What was found before, or is found now.

        Args:
          graph, request: what is looked at, and what is asked of it.
          call: what else makes it another one, as the inputs' specs.
          look: finds it.
          anew: whether what was found before does not do.
        """
        owner = request.users_fn or graph.models[0]
        kept: dict[Any, Found] = {}
        try:
            kept = self._kept.setdefault(owner, kept)
        except TypeError:  # a function of which there are no weak references
            pass
        key = _call_of(graph, request), call
        if anew or key not in kept:
            kept[key] = look()
        return kept[key]


def _call_of(graph: LayerGraph, request: Request) -> Any:
    """The models, their variables, the phase, and which method is called."""
    call, phase = request.tower_fn, request.training
    if phase is None:
        phase = keras_layers.phase_here()
    return (
        tuple(weakref.ref(m) for m in graph.models),
        tuple(v.path for v in graph.variables),
        str(call.kind) if isinstance(call, ModelCall) else "",
        phase,
    )
