"""towers: decide where a TensorFlow graph runs."""

from towers.autograph import keep_as_they_are
from towers.build import build_towers
from towers.export import export_towers
from towers.gather import gather_outputs
from towers.gradients import average_gradients
from towers.meeting import all_towers
from towers.merge_rules import merge_state_by
from towers.model import TowerModel, to_multi_gpu
from towers.parameters import balanced, place_variables, round_robin
from towers.placement import Placement
from towers.report import ExecutionReport, execution_report
from towers.split import split_batch
from towers.tower_graph import Tower, TowerGraph

__version__ = "0.1.0"
__all__ = [
    "all_towers",
    "ExecutionReport",
    "Placement",
    "Tower",
    "TowerGraph",
    "TowerModel",
    "average_gradients",
    "balanced",
    "build_towers",
    "execution_report",
    "export_towers",
    "gather_outputs",
    "merge_state_by",
    "place_variables",
    "round_robin",
    "split_batch",
    "to_multi_gpu",
]

keep_as_they_are([globals()[name] for name in __all__], __name__)
