"""kinds: what a variable is, which says how it goes to towers and comes back.

A table of `parameter_copies` has for each kind the way to the towers, one of `state`
the way back of a new value.
"""

import enum


class Kind(enum.Enum):
    """What one variable of a `LayerGraph` is."""

    TRAINED = enum.auto()  # it has a gradient
    OVERWRITTEN = enum.auto()  # float8's: its gradient is its new value
    SEED = enum.auto()  # the state of a `SeedGenerator`
    ROWS = enum.auto()  # what a stateful RNN keeps for each row
    STATISTIC = enum.auto()  # of a batch norm, moved by moments of all rows
    METRIC = enum.auto()  # of a metric that a layer keeps, or towers are given
    OWN = enum.auto()  # no such: frozen, or state that a layer may assign
