"""towers: decide where a TensorFlow graph runs.

The map of the house, from the top down. Each part imports what is below it only:

  planning        what looks at a placement from outside, or works one out:
                  `placement_plan`, `compare`,
                  `spread_layers`, `pipeline`, `measure_weights`,
                  `timeline`, `plot_placement`, `PlacementReport`
  wrapper         a Keras model on the outside: `TowerModel`, `to_multi_gpu`
  build           split, replicate, forward, gather: the story on one screen,
                  beside what it hands out (tower_graph), the ways to it
                  (builder: `build_towers`), at once (eager) and in
                  tf.compat.v1 (v1_graph), SavedModels (export), and inputs
                  that towers read themselves (`per_tower`)
  keras_model     a Keras model as a pure function of its variables and inputs
  verbs           split, scatter, replicate, gather, join, average, and the rows
  engine          one tower on its device, there and back; README.md says why
  report          what TensorFlow ran where: `execution_report`
  cluster         workers in other processes: `serve`, `Cluster`, `WorkerLost`
  placement       where: `Placement`, names of devices, policies
  foreign         the one door to private names of Keras and TensorFlow
"""

import importlib
from typing import TYPE_CHECKING, Any

# isort: split
# First, for who calls the command line.
import towers.log_level  # noqa: F401

# isort: split
# Then: `foreign` refuses other backends than TensorFlow, with what to do.
from towers.foreign.doors import opened

with opened("towers"):
    from towers.builder import build_towers
    from towers.cluster.cluster import Cluster
    from towers.cluster.lost import WorkerLost
    from towers.engine.all_towers import all_towers
    from towers.foreign.tf_autograph import keep_as_they_are
    from towers.inputs_per_tower import per_tower
    from towers.keras_model.memory import memory_errors
    from towers.keras_model.merge_rules import merge_losses_by, merge_state_by
    from towers.keras_model.parameters import place_variables
    from towers.keras_model.pieces.made_cut import split_layer
    from towers.placement.pieces import column_wise, row_wise
    from towers.placement.placement import Placement
    from towers.placement.policies import balanced, round_robin
    from towers.tower_graph import Tower, TowerGraph
    from towers.verbs.average import average_gradients
    from towers.verbs.gather import gather_outputs
    from towers.verbs.split import split_batch
    from towers.wrapper.multi_gpu import to_multi_gpu
    from towers.wrapper.tower_model import TowerModel

if TYPE_CHECKING:  # and else when it is asked for, see `_LATER`
    from towers.cluster.worker import serve
    from towers.export import export_towers
    from towers.planning.callbacks import PlacementReport
    from towers.planning.compare import Comparison, compare
    from towers.planning.measure import measure_weights
    from towers.planning.pictures import plot_placement
    from towers.planning.pipeline import pipeline
    from towers.planning.plan import PlacementPlan, placement_plan
    from towers.planning.spread import spread_layers
    from towers.planning.timeline import Timeline, timeline
    from towers.report.execution import execution_report
    from towers.report.report import ExecutionReport

__version__ = "0.3.0"
__all__ = [
    "all_towers",
    "Cluster",
    "Comparison",
    "ExecutionReport",
    "Placement",
    "PlacementReport",
    "Timeline",
    "PlacementPlan",
    "Tower",
    "TowerGraph",
    "TowerModel",
    "WorkerLost",
    "average_gradients",
    "balanced",
    "build_towers",
    "column_wise",
    "compare",
    "execution_report",
    "export_towers",
    "gather_outputs",
    "measure_weights",
    "memory_errors",
    "merge_losses_by",
    "merge_state_by",
    "per_tower",
    "pipeline",
    "place_variables",
    "plot_placement",
    "placement_plan",
    "round_robin",
    "row_wise",
    "serve",
    "split_batch",
    "split_layer",
    "spread_layers",
    "timeline",
    "to_multi_gpu",
]

# What no step needs, and may need private names that no step does.
_LATER = {
    "Comparison": "planning.compare",
    "ExecutionReport": "report.report",
    "PlacementPlan": "planning.plan",
    "PlacementReport": "planning.callbacks",
    "Timeline": "planning.timeline",
    "compare": "planning.compare",
    "execution_report": "report.execution",
    "export_towers": "export",
    "measure_weights": "planning.measure",
    "pipeline": "planning.pipeline",
    "placement_plan": "planning.plan",
    "plot_placement": "planning.pictures",
    "serve": "cluster.worker",
    "spread_layers": "planning.spread",
    "timeline": "planning.timeline",
}

keep_as_they_are(
    [globals()[name] for name in __all__ if name not in _LATER], __name__
)

if not TYPE_CHECKING:  # which would take any name for one of ours

    def __getattr__(name: str) -> Any:
        """What is in `_LATER`, when it is first asked for."""
        if name not in _LATER:
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}"
            )
        with opened(f"{__name__}.{name}"):
            module = importlib.import_module(f"{__name__}.{_LATER[name]}")
        value = getattr(module, name)
        keep_as_they_are([value], __name__)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
